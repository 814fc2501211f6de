"""The commands of the library, and how the user called the present one. No heavy imports."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass

_PROGRAMS = ("iwsft", "python -m benchmarks")


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


def program(command: str) -> str:
    """How to call a command the way the user called this one: ``iwsft d4rl``, for example.

    ``benchmarks.__main__`` leaves its own name and that of the command in ``sys.argv[0]``.
    """
    name, space, _ = sys.argv[0].rpartition(" ")
    if name in _PROGRAMS and space:
        return f"{name} {command.removeprefix('llm ')}"
    return f"python -m benchmarks.{command}"


def called_as(command: str) -> str:
    """The name by which the user called this command, with the words that belong to it."""
    name, module = sys.argv[0], command.split()[0]
    other = name.startswith(tuple(f"{each} " for each in _PROGRAMS)) and not name.endswith(module)
    return name if other else program(command)


def typed(module: str) -> str:
    """The command line as the user typed it, for records; its command is that of a module."""
    name, words = called_as(module), sys.argv[1:]
    if name.rpartition(" ")[0] in _PROGRAMS:
        words = words[len(COMMANDS[name.split()[-1]].words) :]
    return shlex.join([*name.split(), *words])
