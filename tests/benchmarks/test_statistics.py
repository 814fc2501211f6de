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

from benchmarks.statistics import (
    bootstrap_interval,
    interquartile_mean,
    mean,
    median,
    optimality_gap,
    probability_of_improvement,
    share_above,
    shift_interval,
    t_interval,
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


def test_aggregates_are_those_of_rliable() -> None:
    source = np.random.default_rng(0)
    x, y = source.normal(0.7, 0.4, (5, 3)), source.normal(0.5, 0.4, (4, 3))
    for ours, theirs, scores in (
        (interquartile_mean, rliable_metrics.aggregate_iqm, [x]),
        (mean, rliable_metrics.aggregate_mean, [x]),
        (median, rliable_metrics.aggregate_median, [x]),
        (optimality_gap, rliable_metrics.aggregate_optimality_gap, [x]),
        (probability_of_improvement, rliable_metrics.probability_of_improvement, [x, y]),
    ):
        assert ours(*scores) == pytest.approx(theirs(*scores))
    thresholds = np.linspace(0.0, 1.5, 7)
    points, _ = library.create_performance_profile({"algo": x}, thresholds, reps=2)
    assert share_above(x, thresholds) == pytest.approx(points["algo"])


def test_the_interval_of_a_mean_is_that_of_scipy() -> None:
    values = np.random.default_rng(1).normal(50, 10, (4, 6))
    test = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert np.array(t_interval(values)) == pytest.approx(np.array([test.low, test.high]))
    low, high = t_interval([0.0, 0.1, 0.02], 0.0, 1.0)
    assert low == 0.0 and 0.1 < high < 1.0
    assert t_interval(np.full((3, 2), 7.5)) == pytest.approx((7.5, 7.5))


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize(
    ("shape", "mean", "least"),
    [
        ("normal", 0.0, 0.945),
        ("uniform", 0.5, 0.92),
        # Skewed to the right: too few intervals reach the mean, for every number of seeds.
        ("exponential", 1.0, 0.87),
    ],
)
def test_how_often_the_interval_holds_the_mean(
    shape: str, mean: float, least: float, seeds: int
) -> None:
    generator = np.random.default_rng(seeds)
    low, high = t_interval(getattr(generator, shape)(size=(seeds, 40_000)))
    share = ((low <= mean) & (mean <= high)).mean()
    # 40,000 draws: a deviation of 0.11 % at 95 %.
    assert least <= share < 0.955


def test_how_often_the_intervals_of_aggregates_hold() -> None:
    """For normal scores on three datasets of different deviations, 95 % or more."""
    generator, sets = np.random.default_rng(0), 300
    means, deviations = np.array([0.2, 0.5, 0.9]), np.array([0.05, 0.2, 0.1])
    for ours in (interquartile_mean, mean, median, optimality_gap):
        truth = ours(generator.normal(means, deviations, (50_000, 3, 3))).mean()
        count = 0
        for scores in generator.normal(means, deviations, (sets, 3, 3)):
            _, low, high = shift_interval(ours, scores, generator=generator)
            count += low <= truth <= high
        # A deviation of 1.3 % at 95 %.
        assert count / sets > 0.93


def test_the_aggregates_interval_of_one_mean_is_students() -> None:
    scores = np.random.default_rng(2).normal(0.5, 0.1, (5, 1))
    estimate = shift_interval(mean, scores, generator=np.random.default_rng(0))
    low, high = t_interval(scores)
    # 2,000 draws: the ends are known to about 5 % of the width.
    assert estimate.low == pytest.approx(low.item(), abs=0.1 * (high - low).item())
    assert estimate.high == pytest.approx(high.item(), abs=0.1 * (high - low).item())


def test_ties_count_as_half_of_an_improvement() -> None:
    source = np.random.default_rng(0)
    for _ in range(20):
        x = source.integers(0, 5, size=(4, 3)).astype(float)
        y = source.integers(0, 5, size=(6, 3)).astype(float)
        expected = rliable_metrics.probability_of_improvement(x, y)
        assert probability_of_improvement(x, y) == pytest.approx(expected)
