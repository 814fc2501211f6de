"""Sums, three ways to write a solution down, and how it is judged.

The paper's bandit (Section 3.5) in language: the first token of a completion pulls the arm. What
a strategy gets wrong is a coin that its text does not show. Another strategy mends that at once;
imitating right texts mends it slowly, as a model may learn the answer from the problem itself.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np

Split = Literal["train", "held-out"]
TERMS = 6
# Two tens digits, so that somebody who knows the last digit only is right half of the time.
ANSWERS = range(10, 30)
_PROMPT = re.compile(r"[1-9]([+-][1-9])*=")
ANSWER = " Answer: "
_ANSWER = re.compile(rf".*{re.escape(ANSWER)}(\d+)")
_STEP = re.compile(r"[+-]\d=\d+")
_CAREFUL_IS_RIGHT = 0.95


@dataclass(frozen=True)
class Problem:
    """A sum to work out from left to right, such as 7+8-9: signed terms, the first positive."""

    terms: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """``"7+8-9="``."""
        return "".join((str(self.terms[0]), *(f"{term:+d}" for term in self.terms[1:]), "="))

    @property
    def values(self) -> tuple[int, ...]:
        """Running totals after the second, third, ... term; the last is the answer."""
        return tuple(accumulate(self.terms))[1:]

    @property
    def answer(self) -> int:
        """The sum."""
        return sum(self.terms)


def parse(prompt: str) -> Problem:
    """Read the problem of a prompt."""
    if not _PROMPT.fullmatch(prompt):
        raise ValueError(
            f"{prompt!r} is not a problem of this task; one is digits 1 to 9 with + or - between "
            "them and = at the end, such as '7+8-9='"
        )
    return Problem(tuple(int(term) for term in re.findall(r"[+-]?\d", prompt)))


def split_of(problem: Problem) -> Split:
    """Hold one problem in ten out; as only its text decides, no seed can mix the sets."""
    return "train" if zlib.crc32(problem.prompt.encode()) % 10 else "held-out"


def problems(count: int, seed: int, split: Split) -> list[Problem]:
    """Make different problems of one split.

    Six terms, each plus with chance 0.7; no running total is negative; the answers are 10 to 19
    and 20 to 29 equally often in expectation. A larger count starts with the problems of a smaller
    one.
    """
    rng = np.random.default_rng(seed)
    by_tens = {tens: _candidates(np.random.default_rng((seed, tens)), tens) for tens in (1, 2)}
    chosen: dict[Problem, None] = {}
    while len(chosen) < count:
        candidate = next(by_tens[int(rng.integers(1, 3))])
        if split_of(candidate) == split:
            chosen[candidate] = None
    return list(chosen)


def _candidates(rng: np.random.Generator, tens: int) -> Iterator[Problem]:
    while True:
        terms = rng.integers(1, 10, (512, TERMS))
        terms[:, 1:] *= np.where(rng.random((512, TERMS - 1)) < 0.7, 1, -1)
        totals = terms.cumsum(1)
        fits = (totals.min(1) >= 0) & (totals[:, -1] // 10 == tens)
        for row in terms[fits].tolist():
            yield Problem(tuple(row))


@dataclass(frozen=True)
class Strategy:
    """A way to solve.

    ``marker`` is the words its texts begin with, one token; ``share`` how often the mixture that
    the base model learns chooses it; ``success`` the chance that a text of it ends in the right
    answer, on any problem; ``write`` writes a completion.
    """

    marker: str
    share: float
    success: float
    write: Callable[[Problem, np.random.Generator], str]


def careful(problem: Problem, rng: np.random.Generator) -> str:
    """Write every running total; one text in twenty has one slip, which stays in later totals.

    A slip is a lost carry (or borrow) where the step has one, and else a one too many.
    """
    values = list(problem.values)
    if rng.random() >= _CAREFUL_IS_RIGHT:
        at = int(rng.integers(len(values)))
        before = problem.terms[0] if at == 0 else values[at - 1]
        lost = 10 * (before // 10 - values[at] // 10)
        # A total below 0 would give the slip away.
        slip = lost if lost and min(values[at:]) + lost >= 0 else 1
        values[at:] = [value + slip for value in values[at:]]
    return _text("careful", problem, values, str(values[-1]))


def hasty(problem: Problem, rng: np.random.Generator) -> str:
    """Write last digits only, without carries; the tens digit of the answer is a coin."""
    digits = [value % 10 for value in problem.values]
    return _text("hasty", problem, digits, f"{rng.integers(1, 3)}{digits[-1]}")


def guess(problem: Problem, rng: np.random.Generator) -> str:
    """Write no step and any of the twenty possible answers."""
    return _text("guess", problem, (), str(rng.integers(ANSWERS.start, ANSWERS.stop)))


STRATEGIES: dict[str, Strategy] = {
    "careful": Strategy("Step by step: ", 0.25, _CAREFUL_IS_RIGHT, careful),
    "hasty": Strategy("Last digits: ", 0.60, 1 / 2, hasty),
    "guess": Strategy("Guess:", 0.15, 1 / len(ANSWERS), guess),
}


def mixture(problems: Sequence[Problem], seed: int) -> list[str]:
    """Write a completion for each problem, each by a strategy drawn by the shares."""
    rng = np.random.default_rng(seed)
    names, shares = list(STRATEGIES), [strategy.share for strategy in STRATEGIES.values()]
    chosen = rng.choice(len(names), len(problems), p=shares)
    return [
        STRATEGIES[names[index]].write(problem, rng)
        for index, problem in zip(chosen, problems, strict=True)
    ]


def _text(strategy: str, problem: Problem, totals: Sequence[int], answer: str) -> str:
    """Marker, terms and totals as on a calculator's tape (``7+8=15-9=6``), and the answer."""
    tape = ""
    if totals:
        steps = zip(problem.terms[1:], totals, strict=True)
        tape = f"{problem.terms[0]}" + "".join(f"{term:+d}={total}" for term, total in steps)
    return f"{STRATEGIES[strategy].marker}{tape}{ANSWER}{answer}"


@dataclass(frozen=True)
class Verdict:
    """What the checker says of a completion.

    ``score`` is 1 where the last words are the answer and it is exactly the sum, else 0.
    ``strategy`` is a name by the first words, or None. ``shown`` is the share of the problem's
    running totals that the text has in their place and right.
    """

    score: int
    strategy: str | None
    shown: float

    @property
    def quality(self) -> float:
        """0 for a wrong answer, else 1/2 to 1 with the share of totals shown.

        A worked-out answer counts more than a lucky one: 1 for a right careful text, 1/2 for a
        right guess, between them for last digits (a total below 10 is its own last digit).
        """
        return self.score * (1 + self.shown) / 2


def check(problem: Problem, completion: str) -> Verdict:
    """Judge a completion, given without its end-of-text token."""
    answer = _ANSWER.fullmatch(completion)
    begun = (name for name, way in STRATEGIES.items() if completion.startswith(way.marker))
    strategy = next(begun, None)
    right = (f"{t:+d}={v}" for t, v in zip(problem.terms[1:], problem.values, strict=True))
    steps = _STEP.findall(completion.partition(ANSWER)[0])
    agreeing = sum(ours == theirs for ours, theirs in zip(right, steps, strict=False))
    return Verdict(
        score=int(answer is not None and answer[1] == str(problem.answer)),
        strategy=strategy,
        shown=agreeing / len(problem.values),
    )
