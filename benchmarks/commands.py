"""The commands of the library, and how they are called. No heavy imports."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class Command:
    """A command: the module whose ``run`` reads ``sys.argv``, and words to put in front of it."""

    module: str
    help: str
    words: tuple[str, ...] = ()


COMMANDS = {
    "d4rl": Command("benchmarks.d4rl.__main__", "Train and score algorithms on control data."),
    "llm": Command("benchmarks.llm.__main__", "Fine-tune a language model on a task and test it."),
    "finetune": Command(
        "benchmarks.llm.__main__", "Fine-tune a language model on your rows.", ("--recipe", "chat")
    ),
    "evaluate": Command(
        "benchmarks.llm.__main__", "Score a language model on MATH-500, AIME, ...", ("evaluate",)
    ),
    "loop": Command(
        "benchmarks.llm.__main__", "Sample, verify, fine-tune a language model, again.", ("loop",)
    ),
    "collect": Command("benchmarks.collect.__main__", "Make a dataset from policies or from SAC."),
    "weights": Command(
        "benchmarks.weights.__main__", "Show what the importance weights of a run do."
    ),
    "report": Command("benchmarks.report.__main__", "Write finished runs to one page."),
    "bandit": Command("benchmarks.bandit.__main__", "Show what the weights do on a bandit."),
    "demo": Command("benchmarks.demo", "Show where the weights help, and why, in ten minutes."),
    "speed": Command("benchmarks.speed.__main__", "Measure time and memory against plain code."),
    "env": Command("benchmarks.__main__", "Print versions and hardware, for a bug report."),
}


# The commands by module and words, such as ``llm evaluate``.
_NAMES = {
    " ".join([each.module.split(".")[1], *each.words]): name for name, each in COMMANDS.items()
}


def program(command: str) -> str:
    """How to call a command, given as module and words: ``iwsft evaluate`` for ``llm evaluate``."""
    name = _NAMES.get(command, command)
    listed = name.split()[0] in COMMANDS
    return f"iwsft {name}" if listed else f"python -m benchmarks.{name}"


def typed(module: str) -> str:
    """The command line of this process, for records."""
    return shlex.join([*program(module).split(), *sys.argv[1:]])
