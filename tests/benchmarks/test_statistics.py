"""Intervals and aggregates, against enumeration, scipy and rliable."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
from rliable import library
from rliable import metrics as rliable_metrics

from benchmarks import statistics
from benchmarks.statistics import (
    bootstrap_interval,
    interquartile_mean,
    mean,
    median,
    optimality_gap,
    probability_of_improvement,
    share_above,
    stratified_bootstrap,
    wilson_interval,
)


def test_the_bootstrap_interval_is_that_of_all_resamples() -> None:
    values = np.array([40.0, 50.0, 63.0, 41.0, 90.0])
    means = [np.mean(draw) for draw in itertools.product(values, repeat=5)]
    low, high = bootstrap_interval(values)
    # 10,000 draws: the 2.5 % and 97.5 % ranks are known to 0.16 % (one deviation).
    assert scipy.stats.percentileofscore(means, low, kind="mean") == pytest.approx(2.5, abs=0.7)
    assert scipy.stats.percentileofscore(means, high, kind="mean") == pytest.approx(97.5, abs=0.7)


def test_the_bootstrap_interval_by_hand() -> None:
    """Resampled by numpy, column by column, from the generator of the seed."""
    values = np.random.default_rng(1).normal(50, 10, size=(6, 4))
    for seed in (0, 3):
        rows = np.random.default_rng(seed).integers(6, size=(10_000, 6))
        expected = np.percentile(values[rows].mean(axis=1), [2.5, 97.5], axis=0)
        assert np.array(bootstrap_interval(values, seed)) == pytest.approx(expected, abs=1e-9)
    assert not np.array_equal(bootstrap_interval(values, 0), bootstrap_interval(values, 1))


def test_equal_rows_have_an_interval_of_no_width() -> None:
    assert bootstrap_interval(np.full(5, 7.5)) == pytest.approx((7.5, 7.5))
    assert bootstrap_interval([7.5]) == (7.5, 7.5)


@pytest.mark.parametrize(("right", "questions"), [(0, 5), (1, 5), (17, 30), (465, 500), (1, 1)])
def test_wilson_by_its_equation(right: int, questions: int) -> None:
    """The shares p whose distance from the measured one is z standard errors of p."""
    z, share = scipy.stats.norm.ppf(0.975), right / questions
    for end in wilson_interval(right, questions):
        error = z * math.sqrt(end * (1 - end) / questions)
        assert abs(share - end) == pytest.approx(error, abs=1e-9)
    low, high = wilson_interval(right, questions)
    assert 0 <= low <= share <= high <= 1


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: wilson_interval(3, 2),
        lambda: wilson_interval(0, 0),
        lambda: bootstrap_interval([]),
    ],
)
def test_impossible_counts(wrong: Callable[[], object]) -> None:
    with pytest.raises(ValueError):
        wrong()


def test_aggregates_and_their_intervals_are_those_of_rliable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(statistics, "_STRATIFIED_RESAMPLES", 200)
    source = np.random.default_rng(0)
    x, y = source.normal(0.7, 0.4, (5, 3)), source.normal(0.5, 0.4, (4, 3))
    thresholds = np.linspace(0.0, 1.5, 7)
    pairs = (
        (interquartile_mean, rliable_metrics.aggregate_iqm, [x]),
        (mean, rliable_metrics.aggregate_mean, [x]),
        (median, rliable_metrics.aggregate_median, [x]),
        (optimality_gap, rliable_metrics.aggregate_optimality_gap, [x]),
        (probability_of_improvement, rliable_metrics.probability_of_improvement, [x, y]),
    )
    for ours, theirs, scores in pairs:
        np.random.seed(0)
        given = scores[0] if len(scores) == 1 else scores
        points, intervals = library.get_interval_estimates(
            {"algo": given}, lambda *args, theirs=theirs: np.array([theirs(*args)]), reps=200
        )
        expected = [points["algo"].item(), *intervals["algo"].ravel()]
        generator = np.random.RandomState(0)
        assert stratified_bootstrap(ours, *scores, generator=generator) == pytest.approx(expected)
    np.random.seed(0)
    points, intervals = library.create_performance_profile({"algo": x}, thresholds, reps=200)
    share, low, high = stratified_bootstrap(
        lambda scores: share_above(scores, thresholds), x, generator=np.random.RandomState(0)
    )
    assert share == pytest.approx(points["algo"])
    assert np.stack([low, high]) == pytest.approx(intervals["algo"])


def test_ties_count_as_half_of_an_improvement() -> None:
    source = np.random.default_rng(0)
    for _ in range(20):
        x = source.integers(0, 5, size=(4, 3)).astype(float)
        y = source.integers(0, 5, size=(6, 3)).astype(float)
        expected = rliable_metrics.probability_of_improvement(x, y)
        assert probability_of_improvement(x, y) == pytest.approx(expected)
