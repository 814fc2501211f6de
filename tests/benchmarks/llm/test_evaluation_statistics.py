"""pass@k and votes, against enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from benchmarks.llm.evaluation.run import estimate_pass_at
from iwsft.language.grading import find_majority


@pytest.mark.parametrize(("answers", "right"), [(5, 0), (5, 2), (6, 5), (4, 4)])
def test_pass_at_is_the_share_of_subsets(answers: int, right: int) -> None:
    marks = [True] * right + [False] * (answers - right)
    for k in range(1, answers + 1):
        subsets = [any(each) for each in itertools.combinations(marks, k)]
        assert estimate_pass_at(k, answers, right) == pytest.approx(np.mean(subsets))
    assert estimate_pass_at(1, answers, right) == pytest.approx(right / answers)


@pytest.mark.parametrize(
    ("answers", "chosen"),
    [
        (["1", "2", "2"], "2"),
        (["3", "1", "2", "1", "2"], "1"),
        (["2", "1"], "2"),
        ([None, "1", None, "1", "2"], "1"),
        ([None, None, "2"], "2"),
        ([None], None),
        # 0.5 and 1/2 mean the same: three votes, and the first wording represents them.
        (["7", "1/2", "7", "0.5", "1/2"], "1/2"),
    ],
)
def test_majority(answers: list[str | None], chosen: str | None) -> None:
    def same(first: str, second: str) -> bool:
        return {first, second} == {"1/2", "0.5"} or first == second

    assert find_majority(answers, same) == chosen
