"""Sums of one-digit numbers, and their split into training and held-out problems."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

import numpy as np

Split = Literal["train", "held-out"]

TERMS = 6
# Two tens digits, so that somebody who knows the last digit only is right half of the time.
ANSWERS = range(10, 30)
_PROMPT = re.compile(r"[1-9]([+-][1-9])*=")


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
