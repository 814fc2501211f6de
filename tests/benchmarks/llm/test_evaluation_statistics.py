"""Intervals against scipy, pass@k and votes against enumeration."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from benchmarks.llm.evaluation.scores import majority, pass_at
from benchmarks.llm.evaluation.statistics import bootstrap, wilson


@pytest.mark.parametrize(
    ("right", "questions"), [(0, 5), (1, 5), (17, 30), (30, 30), (465, 500), (1, 1)]
)
def test_wilson_is_scipys(right: int, questions: int) -> None:
    expected = stats.binomtest(right, questions).proportion_ci(0.95, method="wilson")
    assert wilson(right, questions) == pytest.approx(tuple(expected), abs=1e-12)


def test_bootstrap_is_near_scipys() -> None:
    values = np.random.default_rng(1).choice([0, 0.25, 0.5, 1.0], size=60)
    expected = stats.bootstrap(
        (values,), np.mean, n_resamples=10_000, method="percentile", rng=np.random.default_rng(2)
    ).confidence_interval
    # Both draw 10,000 times: their ends differ by what so many draws leave open.
    assert bootstrap(values, seed=0) == pytest.approx(tuple(expected), abs=0.01)
    assert bootstrap(values, seed=0) == bootstrap(values, seed=0) != bootstrap(values, seed=1)


def test_bootstrap_of_two_questions() -> None:
    """Means of two draws of {0, 1}: 0, 1/2, 1 with 1/4, 1/2, 1/4."""
    assert bootstrap([0.0, 1.0]) == (0.0, 1.0)
    assert bootstrap([0.0, 1.0], confidence=0.4) == (0.5, 0.5)
    assert bootstrap([0.25, 0.25, 0.25]) == (0.25, 0.25)


@pytest.mark.parametrize(("answers", "right"), [(5, 0), (5, 2), (6, 5), (4, 4)])
def test_pass_at_is_the_share_of_subsets(answers: int, right: int) -> None:
    marks = [True] * right + [False] * (answers - right)
    for k in range(1, answers + 1):
        subsets = [any(each) for each in itertools.combinations(marks, k)]
        assert pass_at(k, answers, right) == pytest.approx(np.mean(subsets))
    assert pass_at(1, answers, right) == pytest.approx(right / answers)


@pytest.mark.parametrize(
    ("answers", "chosen"),
    [
        (["1", "2", "2"], "2"),
        (["3", "1", "2", "1", "2"], "1"),
        (["2", "1"], "2"),
        ([None, "1", None, "1", "2"], "1"),
        ([None, None, "2"], "2"),
        ([None], None),
        # 0.5 and 1/2 mean the same: three votes, and the first wording stands for them.
        (["7", "1/2", "7", "0.5", "1/2"], "1/2"),
    ],
)
def test_majority(answers: list[str | None], chosen: str | None) -> None:
    def same(first: str, second: str) -> bool:
        return {first, second} == {"1/2", "0.5"} or first == second

    assert majority(answers, same) == chosen


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: wilson(3, 2),
        lambda: wilson(0, 0),
        lambda: bootstrap([]),
    ],
)
def test_impossible_counts(wrong: object) -> None:
    with pytest.raises(ValueError):
        wrong()  # type: ignore[operator]
