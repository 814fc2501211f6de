"""Whether an answer is right. Comparisons that hang or crash count as wrong and are counted.

Math-Verify runs in a process of its own, so that a comparison can be ended. The process is this
module (``python -m ... MODULE:FUNCTION SECONDS BYTES``): it reads pairs from stdin and writes
verdicts, a line of JSON each.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Literal, Self

from benchmarks.llm.evaluation.answers import normalize_latex, parse_integer, parse_letter

AnswerKind = Literal["math", "integer", "letter"]

_MATH_VERIFY = "benchmarks.llm.evaluation.grading:compare_by_math_verify"
_START_SECONDS = 120.0
_MOST_BYTES = 8 * 2**30
# The process ends itself this much later than its parent would, should the parent be gone.
_ALARM_SECONDS = 30


class Grader:
    """Compares answers; LaTeX by Math-Verify in a process with a time limit.

    The process starts with the first comparison that needs it, and again after one that was ended.
    Leaving the grader's context ends it. ``compare`` is ``MODULE:FUNCTION`` that takes the correct
    answer and a given one. ``problems`` has a line for each comparison that hung or failed.
    """

    def __init__(self, *, seconds: float = 10.0, compare: str = _MATH_VERIFY) -> None:
        self._seconds, self._compare = seconds, compare
        self._process: subprocess.Popen[bytes] | None = None
        self._verdicts: dict[tuple[str, str], bool] = {}
        self.problems: list[str] = []

    def choose_comparison(self, kind: AnswerKind) -> Callable[[str, str], bool]:
        """Return a function that says whether an answer equals the correct answer, or another."""
        if kind == "math":
            return self.compare_math
        parse = parse_integer if kind == "integer" else parse_letter

        def equal(correct: str, answer: str) -> bool:
            value = parse(answer)
            return value is not None and value == parse(correct)

        return equal

    def compare_math(self, correct: str, answer: str) -> bool:
        """Return whether two expressions are equal; equal text needs no comparison."""
        if normalize_latex(correct) == normalize_latex(answer):
            return True
        pair = (correct, answer)
        if pair not in self._verdicts:
            self._verdicts[pair] = self._ask(correct, answer)
        return self._verdicts[pair]

    def start(self) -> subprocess.Popen[bytes]:
        """Start the process where it does not run, and wait until it is ready."""
        if self._process is not None:
            return self._process
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, self._compare, str(self._seconds), str(_MOST_BYTES)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": paths},
        )
        problem = self._read(self._process, _START_SECONDS).get("problem")
        if problem is not None:
            self.close()
            raise ImportError(
                f"Math-Verify does not load in {self._compare} ({problem}); pip install "
                "'math-verify[antlr4_13_2]'"
            )
        return self._process

    def close(self) -> None:
        """End the process, also in the middle of a comparison."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            # The process may not have read all that was written to it.
            with suppress(BrokenPipeError):
                pipe.close()
        self._process = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, correct: str, answer: str) -> bool:
        process = self.start()
        assert process.stdin is not None
        # The process may have ended since the last comparison.
        with suppress(BrokenPipeError):
            process.stdin.write(json.dumps([correct, answer]).encode() + b"\n")
            process.stdin.flush()
        verdict = self._read(process, self._seconds)
        if "problem" in verdict:
            self.problems.append(f"{answer[:60]!r} against {correct[:60]!r}: {verdict['problem']}")
        return bool(verdict.get("equal"))

    def _read(self, process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any]:
        """Read a line of JSON; end the process where there is none in time."""
        assert process.stdout is not None
        timer = threading.Timer(seconds, process.kill)
        timer.start()
        line = process.stdout.readline()
        in_time = timer.is_alive()
        timer.cancel()
        if line:
            content: dict[str, Any] = json.loads(line)
            return content
        self.close()
        return {"problem": "the process crashed" if in_time else f"no verdict in {seconds:g} s"}


def compare_by_math_verify(correct: str, answer: str) -> bool:
    """Return whether Math-Verify finds two LaTeX expressions equal.

    Its own time limits are off: they need the alarm of the process, which is set already.
    """
    from math_verify import parse, verify

    def parsed(text: str) -> Any:
        # Dollars, where nothing in the text marks the mathematics.
        marked = text if re.search(r"(?<!\\)\$|\\[(\[]", text) else f"${text}$"
        return parse(marked, parsing_timeout=None)

    return bool(verify(parsed(correct), parsed(answer), timeout_seconds=None))


def _answer_until_stdin_ends() -> None:
    """Compare pairs, as the process of a :class:`Grader`."""
    place, seconds, most_bytes = sys.argv[1:]
    # Whatever libraries print goes to stderr, not between the verdicts.
    verdicts = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    module, _, name = place.partition(":")
    try:
        compare = getattr(importlib.import_module(module), name)
        # Loads what a comparison needs now, so that no comparison's time limit covers it.
        compare("1", "1")
    except ImportError as error:
        verdicts.write(json.dumps({"problem": str(error)}) + "\n")
        return
    resource.setrlimit(resource.RLIMIT_AS, (int(most_bytes), int(most_bytes)))
    verdicts.write(json.dumps({}) + "\n")
    for line in sys.stdin:
        correct, answer = json.loads(line)
        signal.alarm(int(float(seconds)) + _ALARM_SECONDS)
        try:
            verdict: dict[str, bool | str] = {"equal": bool(compare(correct, answer))}
        # A model's text may make a comparison raise anything; the next one is compared as well.
        except Exception as error:
            verdict = {"equal": False, "problem": f"{type(error).__name__}: {error}"[:200]}
        signal.alarm(0)
        verdicts.write(json.dumps(verdict) + "\n")


if __name__ == "__main__":
    _answer_until_stdin_ends()
