"""Whether an answer is right.

Math-Verify runs in a process of its own, so that a comparison can be ended. Comparisons that hang
or crash count as wrong and are counted.
"""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import re
import resource
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal, Self

from iwsft.extras import install
from iwsft.language.verification import normalize_latex, parse_integer, parse_letter

AnswerKind = Literal["math", "integer", "letter"]

_MATH_VERIFY = "benchmarks.llm.evaluation.grading:compare_by_math_verify"


class Grader:
    """Compares answers; LaTeX by Math-Verify in a process with a time limit.

    Leaving the grader's context ends the process. ``compare`` is ``MODULE:FUNCTION`` that takes the
    correct answer and a given one. ``problems`` has a line for each comparison that hung or failed.
    """

    def __init__(self, *, seconds: float = 10.0, compare: str = _MATH_VERIFY) -> None:
        self._seconds, self._compare = seconds, compare
        self._pool: ProcessPoolExecutor | None = None
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
        plain = normalize_latex(correct), normalize_latex(answer)
        # Math-Verify leaves indices out; numbers in bases are equal only as text.
        if plain[0] == plain[1] or all(re.fullmatch(r"\w+_\w+", each) for each in plain):
            return plain[0] == plain[1]
        pair = (correct, answer)
        if pair not in self._verdicts:
            self._verdicts[pair] = self._ask(correct, answer)
        return self._verdicts[pair]

    def start(self) -> ProcessPoolExecutor:
        """Start the process where it does not run, and wait until it is ready."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            try:
                self._pool.submit(_prepare, self._compare).result()
            except (ImportError, BrokenProcessPool) as error:
                self.close()
                way_out = install("math_verify")
                raise ImportError(f"Math-Verify does not load ({error}); {way_out}") from error
        return self._pool

    def close(self) -> None:
        """End the process, at the latest when its comparison has used up its time."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, correct: str, answer: str) -> bool:
        pool, start = self.start(), time.monotonic()
        try:
            task = pool.submit(_compare_in_time, self._compare, correct, answer, self._seconds)
            equal, problem = task.result()
        except BrokenProcessPool:
            self.close()
            late = time.monotonic() - start >= self._seconds
            equal = False
            problem = f"no verdict in {self._seconds:g} s" if late else "the process crashed"
        if problem is not None:
            self.problems.append(f"{answer[:60]!r} against {correct[:60]!r}: {problem}")
        return equal


def compare_by_math_verify(correct: str, answer: str) -> bool:
    """Return whether Math-Verify finds two LaTeX expressions equal.

    Its own time limits are off: they need the alarm of the process, which is set already.
    """
    from math_verify import parse, verify

    def parsed(text: str) -> Any:
        # Dollars, where nothing in the text marks the mathematics.
        marked = text if re.search(r"(?<!\\)\$|\\[(\[]", text) else f"${text}$"
        return parse(marked, parsing_timeout=None)

    if "mod" not in correct:
        answer = re.sub(r"\\[pb]?mod\b\s*(?:\{\d+\}|\d+)", "", answer)
    return bool(verify(parsed(correct), parsed(answer), timeout_seconds=None))


def _prepare(place: str) -> None:
    """Set the process of a :class:`Grader` up, and load what a comparison needs."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Whatever libraries print.
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    pkgutil.resolve_name(place)("1", "1")
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _compare_in_time(
    place: str, correct: str, answer: str, seconds: float
) -> tuple[bool, str | None]:
    """Return a verdict and its problem; without one in time the alarm ends the process."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        return bool(pkgutil.resolve_name(place)(correct, answer)), None
    # A model's text may make a comparison raise anything; the next one is compared as well.
    except (Exception, SystemExit) as error:
        return False, f"{type(error).__name__}: {error}"[:200]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
