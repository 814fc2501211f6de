"""The checker: is the answer right, which strategy wrote it, and how much of the way is shown."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from benchmarks.llm.recipes.arithmetic.strategies import ANSWER, STRATEGIES
from benchmarks.llm.recipes.arithmetic.task import Problem, signed

_ANSWER = re.compile(rf".*{re.escape(ANSWER)}(\d+)")
_STEP = re.compile(r"[+-]\d=\d+")


@dataclass(frozen=True)
class Verdict:
    """What the checker says of one completion.

    Attributes:
        score: 1 where the last words are the answer and it is exactly the sum, else 0.
        strategy: by the first words; None where the text begins otherwise.
        parses: the text has the form of its strategy from the first to the last character, with
            the problem's own terms; its totals may be wrong.
        shown: share of the problem's running totals that stand in the text, in place and right.
    """

    score: int
    strategy: str | None
    parses: bool
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
    found = _ANSWER.fullmatch(completion)
    strategy = next(
        (name for name, each in STRATEGIES.items() if completion.startswith(each.marker)), None
    )
    right = (f"{signed(t)}={v}" for t, v in zip(problem.terms[1:], problem.values, strict=True))
    steps = _STEP.findall(completion.partition(ANSWER)[0])
    agreeing = sum(ours == theirs for ours, theirs in zip(right, steps, strict=False))
    return Verdict(
        score=int(found is not None and found[1] == str(problem.answer)),
        strategy=strategy,
        parses=strategy is not None and bool(_form(problem, strategy).fullmatch(completion)),
        shown=agreeing / len(problem.values),
    )


@cache
def _form(problem: Problem, strategy: str) -> re.Pattern[str]:
    first, *others = problem.terms
    # Guesses write nothing down, last digits are single.
    total = {"careful": r"\d{1,2}", "hasty": r"\d"}.get(strategy)
    tape = (
        ""
        if total is None
        else f"{first}" + "".join(f"{re.escape(signed(term))}={total}" for term in others)
    )
    return re.compile(f"{re.escape(STRATEGIES[strategy].marker)}{tape}{ANSWER}\\d{{1,2}}")
