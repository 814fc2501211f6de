"""Sums of one-digit numbers, and their split into training and held-out problems."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

import numpy as np

Split = Literal["train", "held-out"]

TERMS = 6
# Two tens digits, so that whoever knows the last digit only is right half of the time.
ANSWERS = range(10, 30)
# One problem in ten is held out.
_HELD_OUT = 10
_CHANCE_OF_PLUS = 0.7
_DRAWN = 512
_PROMPT = re.compile(r"[1-9]([+-][1-9])*=")


@dataclass(frozen=True)
class Problem:
    """A sum to work out from left to right, such as 7+8-9.

    Attributes:
        terms: signed terms; the first is positive.
    """

    terms: tuple[int, ...]

    @property
    def prompt(self) -> str:
        """``"7+8-9="``."""
        return "".join((str(self.terms[0]), *map(signed, self.terms[1:]), "="))

    @property
    def values(self) -> tuple[int, ...]:
        """Running totals after the second, third, ... term; the last is the answer."""
        return tuple(accumulate(self.terms))[1:]

    @property
    def answer(self) -> int:
        """The sum."""
        return sum(self.terms)


def signed(term: int) -> str:
    """``"+7"`` or ``"-7"``."""
    return f"{term:+d}"


def parse(prompt: str) -> Problem:
    """The problem of a prompt.

    Raises:
        ValueError: a text that is no prompt of this task.
    """
    if not _PROMPT.fullmatch(prompt):
        raise ValueError(
            f"{prompt!r} is no problem of this task; one is digits 1 to 9 with + or - between "
            "them and = at the end, such as '7+8-9='"
        )
    return Problem(tuple(int(term) for term in re.findall(r"[+-]?\d", prompt)))


def split_of(problem: Problem) -> Split:
    """The set a problem belongs to: a function of its text, so no seed can mix them."""
    return "train" if zlib.crc32(problem.prompt.encode()) % _HELD_OUT else "held-out"


def problems(count: int, seed: int, split: Split) -> list[Problem]:
    """Different problems of one split.

    Six terms, each plus with chance 0.7; no running total is negative; the answers are 10 to 19
    and 20 to 29 equally often in expectation.

    Args:
        count: how many.
        seed: same seed, same problems; the first of many are those of a smaller count.
        split: ``"train"`` or ``"held-out"``; no problem is in both, whatever the seeds.

    Raises:
        ValueError: a count below 1, or an unknown split.
    """
    if count < 1:
        raise ValueError(f"{count} problems were asked for; at least 1 is needed")
    if split not in get_args(Split):
        raise ValueError(f"split {split!r} is unknown; it is one of {', '.join(get_args(Split))}")
    rng = np.random.default_rng(seed)
    by_tens = {tens: _candidates(np.random.default_rng((seed, tens)), tens) for tens in (1, 2)}
    found: dict[Problem, None] = {}
    while len(found) < count:
        candidate = next(by_tens[int(rng.integers(1, 3))])
        if split_of(candidate) == split:
            found[candidate] = None
    return list(found)


def _candidates(rng: np.random.Generator, tens: int) -> Iterator[Problem]:
    while True:
        terms = rng.integers(1, 10, (_DRAWN, TERMS))
        terms[:, 1:] *= np.where(rng.random((_DRAWN, TERMS - 1)) < _CHANCE_OF_PLUS, 1, -1)
        totals = terms.cumsum(1)
        fits = (totals.min(1) >= 0) & (totals[:, -1] // 10 == tens)
        for row in terms[fits].tolist():
            yield Problem(tuple(row))
