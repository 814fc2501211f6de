"""Three ways to write a solution down, each with its own chance to be right.

The paper's bandit (Section 3.5) in language: the first token of a completion pulls the arm. What
a strategy gets wrong is a coin that its text does not show. Another strategy mends that at once;
imitating right texts mends it slowly, as a model may learn the answer from the problem itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.llm.recipes.arithmetic.task import ANSWERS, Problem, signed

ANSWER = " Answer: "
_CAREFUL_IS_RIGHT = 0.95


@dataclass(frozen=True)
class Strategy:
    """A way to solve.

    Attributes:
        marker: the words its texts begin with, one token.
        share: how often it is chosen in the mixture that the base model learns.
        success: chance that a text of it ends in the right answer, on any problem.
        write: a completion for a problem.
    """

    marker: str
    share: float
    success: float
    write: Callable[[Problem, np.random.Generator], str]


def careful(problem: Problem, rng: np.random.Generator) -> str:
    """Every running total; one text in twenty has one slip, which stays in the totals after it.

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
    return _written("careful", problem, values, str(values[-1]))


def hasty(problem: Problem, rng: np.random.Generator) -> str:
    """Last digits only, carries not counted; the tens digit of the answer is a coin."""
    digits = [value % 10 for value in problem.values]
    return _written("hasty", problem, digits, f"{rng.integers(1, 3)}{digits[-1]}")


def guess(problem: Problem, rng: np.random.Generator) -> str:
    """No step; any of the twenty possible answers."""
    return _written("guess", problem, (), str(rng.integers(ANSWERS.start, ANSWERS.stop)))


STRATEGIES: dict[str, Strategy] = {
    "careful": Strategy("Step by step: ", 0.25, _CAREFUL_IS_RIGHT, careful),
    "hasty": Strategy("Last digits: ", 0.60, 1 / 2, hasty),
    "guess": Strategy("Guess:", 0.15, 1 / len(ANSWERS), guess),
}


def tape(problem: Problem, totals: Sequence[int]) -> str:
    """Terms and totals as a calculator's tape has them, ``"7+8=15-9=6"``; empty without totals."""
    if not totals:
        return ""
    steps = zip(problem.terms[1:], totals, strict=True)
    return f"{problem.terms[0]}" + "".join(f"{signed(term)}={total}" for term, total in steps)


def mixture(problems: Sequence[Problem], seed: int) -> list[str]:
    """A completion for each problem, its strategy drawn by the shares."""
    rng = np.random.default_rng(seed)
    names, shares = list(STRATEGIES), [strategy.share for strategy in STRATEGIES.values()]
    chosen = rng.choice(len(names), len(problems), p=shares)
    return [
        STRATEGIES[names[index]].write(problem, rng)
        for index, problem in zip(chosen, problems, strict=True)
    ]


def _written(strategy: str, problem: Problem, totals: Sequence[int], answer: str) -> str:
    return "".join((STRATEGIES[strategy].marker, tape(problem, totals), ANSWER, answer))
