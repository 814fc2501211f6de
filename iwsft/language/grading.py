"""Whether an answer is right.

Math-Verify, and functions of the user, run in a process of their own, so that a call can be ended.
Comparisons that hang or crash count as wrong and are counted.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import pkgutil
import re
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, Self

from iwsft.extras import install
from iwsft.language.verification import (
    differ_unread,
    extract_answer,
    normalize_latex,
    parse_integer,
    parse_letter,
    parse_text,
    separate_lines,
    write_bases,
)

if TYPE_CHECKING:
    # It loads torch, which the process of a function would wait for.
    from iwsft.language.generations import Generation

AnswerKind = Literal["math", "integer", "letter", "text"]
_READ: Mapping[str, Callable[[str], Any]] = {
    "integer": parse_integer,
    "letter": parse_letter,
    "text": parse_text,
}

_MATH_VERIFY = "iwsft.language.grading:compare_by_math_verify"


@dataclass(frozen=True)
class Question:
    """A question with its right answer: LaTeX, a whole number, a letter or a text."""

    id: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Grades:
    """The answers to a question in the order of their samples; None where a text gives none.

    ``unclear`` are those that are no one whole number or letter, and count as none.
    ``majority_right`` tells whether the most frequent answer is right.
    """

    id: str
    correct: str
    answers: tuple[str | None, ...]
    right: tuple[bool, ...]
    majority_right: bool
    unclear: int = 0


class TimedFunction:
    """A function that runs in a process of its own, with a time limit for each call.

    ``place`` is ``MODULE:FUNCTION``; it takes plain values and returns a number, or true or false.
    Leaving the context ends the process. ``trial`` are arguments of a first call, which loads what
    the function needs.
    """

    def __init__(self, place: str, *, seconds: float = 10.0, trial: Sequence[Any] = ()) -> None:
        self._place, self._seconds, self._trial = place, seconds, trial
        self._pool: ProcessPoolExecutor | None = None

    def start(self) -> ProcessPoolExecutor:
        """Start the process where it does not run, until it is ready; or an ImportError."""
        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
            try:
                self._pool.submit(_prepare, self._place, self._trial).result()
            except (ImportError, BrokenProcessPool) as error:
                self.close()
                raise ImportError(f"{self._place} does not load ({error})") from error
        return self._pool

    def __call__(self, *arguments: Any) -> tuple[float | None, str | None]:
        """Call the function; returns its number, or None and the problem in a line."""
        pool, start = self.start(), time.monotonic()
        try:
            task = pool.submit(_call_in_time, self._place, arguments, self._seconds)
            return task.result()
        except BrokenProcessPool:
            self.close()
            late = time.monotonic() - start >= self._seconds
            return None, f"no verdict in {self._seconds:g} s" if late else "the process crashed"

    def close(self) -> None:
        """End the process, at the latest when its call has used up its time."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Grader(TimedFunction):
    """Compares answers; LaTeX by Math-Verify in a process with a time limit.

    ``problems`` has a line for each pair of answers whose comparison hung or failed.
    """

    def __init__(self, *, seconds: float = 10.0) -> None:
        super().__init__(_MATH_VERIFY, seconds=seconds, trial=("1", "1"))
        self._verdicts: dict[tuple[str, str], bool] = {}
        self.problems: dict[tuple[str, str], str] = {}

    def equal(self, kind: AnswerKind, correct: str, answer: str) -> bool:
        """Return whether an answer equals the correct answer, or another."""
        if kind == "math":
            return self._equal_math(correct, answer)
        value = _READ[kind](answer)
        return value is not None and value == _READ[kind](correct)

    def _equal_math(self, correct: str, answer: str) -> bool:
        """Return whether two expressions are equal; equal text needs no comparison."""
        correct, answer = write_bases(correct), write_bases(answer)
        if normalize_latex(correct) == normalize_latex(answer):
            return True
        if differ_unread(correct, answer):
            return False
        pair = (correct, answer)
        if pair not in self._verdicts:
            equal, problem = self(*pair)
            self._verdicts[pair] = bool(equal)
            if problem is not None:
                self.problems[pair] = f"{answer[:60]!r} against {correct[:60]!r}: {problem}"
        return self._verdicts[pair]

    def start(self) -> ProcessPoolExecutor:
        """Start the process, as every timed function does; an error names what to install."""
        try:
            return super().start()
        except ImportError as error:
            raise ImportError(f"{error}; {install('math_verify')}") from error


def read_answer(kind: AnswerKind, text: str | None) -> str | None:
    """Return the whole number, letter or words of an extracted answer; None where it has none."""
    # Models repeat the choice with its letter, and its text may be private.
    value = text if text is None else _READ.get(kind, str)(text)
    return value if value is None else str(value)


def grade(
    kind: AnswerKind,
    questions: Sequence[Question],
    generations: Sequence[Generation],
    grader: Grader,
) -> list[Grades]:
    """Grade generations; those of a question are in the order of their samples."""
    texts: dict[str, list[str | None]] = {each.id: [] for each in questions}
    for generation in generations:
        text = extract_answer(generation["text"], letter=kind == "letter", verbatim=kind == "text")
        texts[generation["id"]].append(text)
    same = partial(grader.equal, kind)
    grades = []
    for question in questions:
        given = [read_answer(kind, text) for text in texts[question.id]]
        right = [answer is not None and same(question.answer, answer) for answer in given]
        chosen = find_majority(given, same)
        grades.append(
            Grades(
                question.id,
                question.answer,
                tuple(given),
                tuple(right),
                chosen is not None and right[given.index(chosen)],
                given.count(None) - texts[question.id].count(None),
            )
        )
    return grades


def find_majority(answers: Sequence[str | None], same: Callable[[str, str], bool]) -> str | None:
    """Return the most frequent answer in its first wording; of equal counts, the first."""
    votes: Counter[str] = Counter()
    wordings: dict[str, str] = {}
    for answer in (answer for answer in answers if answer is not None):
        if answer not in wordings:
            equals = (first for first in votes if same(first, answer))
            wordings[answer] = next(equals, answer)
        votes[wordings[answer]] += 1
    # Of equal counts the first one counted comes first.
    return votes.most_common(1)[0][0] if votes else None


def compare_by_math_verify(correct: str, answer: str) -> bool:
    """Whether Math-Verify finds two LaTeX expressions equal; its own alarm is off, ours is set."""
    from math_verify import parse, verify

    def parsed(text: str) -> Any:
        text = separate_lines(text)
        # Dollars, where nothing in the text marks the mathematics.
        marked = text if re.search(r"(?<!\\)\$|\\[(\[]", text) else f"${text}$"
        return parse(marked, parsing_timeout=None)

    if "mod" not in correct:
        answer = re.sub(r"\\[pb]?mod\b\s*(?:\{\d+\}|\d+)", "", answer)
    return bool(verify(parsed(correct), parsed(answer), timeout_seconds=None))


def _prepare(place: str, trial: Sequence[Any]) -> None:
    """Set the process of a :class:`TimedFunction` up, and load what the function needs."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Whatever libraries print.
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    function = _function(place)
    if trial:
        function(*trial)
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))


def _function(place: str) -> Callable[..., Any]:
    try:
        function: Callable[..., Any] = pkgutil.resolve_name(place)
    except (AttributeError, ValueError) as error:
        raise ImportError(str(error)) from error
    if not callable(function):
        raise ImportError(f"it is of type {type(function).__name__}, no function")
    return function


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call_in_time(
    place: str, arguments: Sequence[Any], seconds: float
) -> tuple[float | None, str | None]:
    """Return a number and its problem; without one in time the alarm ends the process."""
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        result = _function(place)(*arguments)
        number = math.nan if isinstance(result, str) else float(result)
        if math.isfinite(number):
            return number, None
        return None, f"{result!r:.60} is not a finite number"
    # A model's text may make a call raise anything; the next one is made as well.
    except (Exception, SystemExit) as error:
        return None, f"{type(error).__name__}: {error}"[:200]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
