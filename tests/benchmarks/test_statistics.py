"""Intervals and aggregates, against their equations, scipy and rliable."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.stats
from numpy.typing import NDArray
from rliable import metrics as rliable_metrics

from benchmarks.statistics import (
    POWER,
    Estimate,
    difference,
    interquartile_mean,
    interval_over_questions,
    mean,
    optimality_gap,
    seeds_to_settle,
    t_interval,
    wilson_interval,
)


@pytest.mark.parametrize(("right", "questions"), [(0, 5), (1, 5), (17, 30), (465, 500), (1, 1)])
def test_wilson_is_that_of_scipy(right: int, questions: int) -> None:
    test = scipy.stats.binomtest(right, questions).proportion_ci(0.95, method="wilson")
    assert wilson_interval(right / questions, questions) == pytest.approx((test.low, test.high))
    # One answer to each question.
    shares = [1.0] * right + [0.0] * (questions - right)
    assert interval_over_questions(shares, 1) == pytest.approx((test.low, test.high))


@pytest.mark.parametrize(("share", "questions"), [(1.5, 2), (0, 0), (math.nan, 3)])
def test_impossible_shares(share: float, questions: int) -> None:
    with pytest.raises(ValueError, match="lies in"):
        wilson_interval(share, questions)


def test_many_answers_tell_more_than_one_until_questions_are_all_that_differs() -> None:
    def width(shares: list[float], answers: int) -> float:
        low, high = interval_over_questions(shares, answers)
        assert 0 <= low < np.mean(shares) < high <= 1
        return high - low

    # Questions of one answer each; half right in each of four; all alike, for which each of the
    # 40 answers counts.
    assert width([0.0, 1.0] * 5, 4) == pytest.approx(width([0.0, 1.0] * 5, 1))
    assert width([0.25, 0.75] * 5, 4) < width([0.0, 1.0] * 5, 4)
    assert interval_over_questions([0.5] * 10, 4) == pytest.approx(wilson_interval(0.5, 40))
    # Without any right answer the questions alone count.
    assert interval_over_questions([0.0] * 10, 4) == wilson_interval(0.0, 10)
    # Where the normal one is good enough, both agree.
    shares = np.random.default_rng(0).uniform(size=5000)
    assert interval_over_questions(shares, 10**6) == pytest.approx(t_interval(shares), abs=1e-4)


def test_aggregates_are_those_of_rliable() -> None:
    scores = np.random.default_rng(0).normal(0.7, 0.4, (5, 3))
    for ours, theirs in (
        (interquartile_mean, rliable_metrics.aggregate_iqm),
        (mean, rliable_metrics.aggregate_mean),
        (optimality_gap, rliable_metrics.aggregate_optimality_gap),
    ):
        assert ours(scores).point == pytest.approx(theirs(scores))


def test_the_interval_of_a_mean_is_that_of_scipy() -> None:
    values = np.random.default_rng(1).normal(50, 10, (4, 6))
    test = scipy.stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert np.array(t_interval(values)) == pytest.approx(np.array([test.low, test.high]))
    low, high = t_interval([0.0, 0.1, 0.02], 0.0, 1.0)
    assert low == 0.0 and 0.1 < high < 1.0
    assert t_interval([0.3], 0.0, 1.0) == (0.0, 1.0)
    # On one dataset the aggregates have the same interval.
    column = mean(values[:, :1])
    assert [column.low, column.high] == pytest.approx([test.low[0], test.high[0]])


def test_the_interval_over_two_datasets_is_welchs() -> None:
    """The mean of x and -y is half of Welch's difference of means."""
    x, y = np.random.default_rng(3).normal([3.0, 1.0], [1.0, 4.0], (5, 2)).T
    welch = scipy.stats.ttest_ind(x, y, equal_var=False).confidence_interval(0.95)
    _, low, high = mean(np.stack([x, -y], axis=1))
    assert [low, high] == pytest.approx([welch.low / 2, welch.high / 2])


def test_the_interval_of_an_interquartile_mean_is_yuens() -> None:
    """The trimmed t-test has the same standard error, and degrees of freedom of its own."""
    values = np.random.default_rng(4).standard_t(3, (12, 1))
    point, low, high = interquartile_mean(values)
    # scipy divides by the degrees of freedom of the 6 scores that are left.
    winsorised = scipy.stats.mstats.winsorize(values[:, 0], (0.25, 0.25))
    error = winsorised.std(ddof=1) / (0.5 * math.sqrt(12))
    assert low is not None and high is not None
    assert (high - low) / 2 == pytest.approx(scipy.stats.t.ppf(0.975, 11) * error)
    assert (low + high) / 2 == pytest.approx(point)
    # Scores above the goal have no distance.
    assert optimality_gap(np.array([[0.5], [1.5], [2.0]])).point == pytest.approx(0.5 / 3)


@pytest.mark.parametrize("metric", [interquartile_mean, mean, optimality_gap])
def test_scores_without_spread_have_no_interval(metric: Callable[..., Estimate]) -> None:
    scores = np.tile([0.3, 0.1 + 0.2, 0.7], (4, 1))
    assert metric(scores)[1:] == (None, None)
    assert None not in metric(scores + np.eye(4, 3) / 10)


@pytest.mark.parametrize("seeds", [3, 5, 10])
@pytest.mark.parametrize(
    ("shape", "truth", "least"),
    [
        ("normal", 0.0, 0.945),
        ("uniform", 0.5, 0.92),
        # Skewed to the right: too few intervals reach the mean, for every number of seeds.
        ("exponential", 1.0, 0.87),
    ],
)
def test_how_often_the_interval_holds_the_mean(
    shape: str, truth: float, least: float, seeds: int
) -> None:
    generator = np.random.default_rng(seeds)
    low, high = t_interval(getattr(generator, shape)(size=(seeds, 40_000)))
    share = ((low <= truth) & (truth <= high)).mean()
    # 40,000 draws: a deviation of 0.11 % at 95 %.
    assert least <= share < 0.955


@pytest.mark.parametrize("seeds", [3, 10])
def test_how_often_the_intervals_over_datasets_hold(seeds: int) -> None:
    """For normal scores on three datasets of different deviations, about 95 %."""
    generator, sets = np.random.default_rng(0), 400
    means, deviations = np.array([0.2, 0.5, 0.9]), np.array([0.05, 0.2, 0.1])

    def draw(size: int = sets) -> NDArray[np.float64]:
        return generator.normal(means, deviations, (size, seeds, 3))

    many = draw(20_000)
    trimmed = scipy.stats.trim_mean(many.reshape(len(many), -1), 0.25, axis=1).mean()
    gap = 1 - np.minimum(many, 1).mean()

    for truth, metric in (
        (trimmed, interquartile_mean),
        (means.mean(), mean),
        (gap, optimality_gap),
    ):
        estimates = [metric(each) for each in draw()]
        share = np.mean([low <= truth <= high for _, low, high in estimates])
        # A deviation of 1.1 % at 95 %.
        assert 0.92 < share < 0.985


@pytest.mark.parametrize("questions", [30, 200])
@pytest.mark.parametrize(("a", "b"), [(1, 1), (0.3, 0.3)])
def test_how_often_the_interval_over_questions_holds(a: float, b: float, questions: int) -> None:
    generator = np.random.default_rng(questions)
    for answers in (1, 4, 64):
        chances = generator.beta(a, b, (1000, questions))
        shares = generator.binomial(answers, chances) / answers
        ends = [interval_over_questions(each, answers) for each in shares]
        # A deviation of 0.7 % at 95 %.
        assert 0.92 < np.mean([low <= a / (a + b) <= high for low, high in ends]) < 0.975


def test_a_difference_has_the_interval_of_its_t_test() -> None:
    x, y = np.random.default_rng(2).normal([[3.0], [1.0]], [[1.0], [4.0]], (2, 6))
    welch = scipy.stats.ttest_ind(x, y[:4], equal_var=False).confidence_interval(0.95)
    found = difference(x[:, None], y[:4, None], paired=False)
    assert found.estimate == pytest.approx((x.mean() - y[:4].mean(), *welch))
    pairs = scipy.stats.ttest_rel(x, y).confidence_interval(0.95)
    found = difference(x[:, None], y[:, None], paired=True)
    assert found.estimate[1:] == pytest.approx(tuple(pairs))
    # Over several datasets it is the mean of their differences.
    both = difference(np.stack([x, y], 1), np.stack([y, y], 1), paired=True)
    assert both.estimate.point == pytest.approx(found.estimate.point / 2)
    assert both.estimate[1:] == pytest.approx(tuple(np.array(pairs) / 2), rel=0.3)
    shifted = difference(x[:, None], x[:, None] + 1, paired=True)
    assert shifted.estimate[1:] == (None, None) and shifted.seeds is None and not shifted.settled


@pytest.mark.parametrize(
    ("gap", "deviations"), [(1.0, [1.0]), (1.0, [1.0, 1.0]), (2.0, [1.0, 3.0]), (9.0, [1.0, 1.0])]
)
def test_the_number_of_seeds_settles_four_of_five(gap: float, deviations: list[float]) -> None:
    """By simulation: of paired seeds (one deviation), and of two groups."""
    seeds = seeds_to_settle(gap, np.square(deviations))
    assert seeds is not None
    generator = np.random.default_rng(0)

    def share(count: int) -> float:
        draws = [generator.normal(0, d, (count, 10_000)) for d in deviations]
        if len(draws) == 1:
            test = scipy.stats.ttest_1samp(draws[0] + gap, 0.0)
        else:
            test = scipy.stats.ttest_ind(draws[0] + gap, draws[1], equal_var=False)
        return float((test.pvalue < 0.05).mean())

    # A deviation of 0.4 %; Welch's degrees of freedom are estimated in each set.
    assert share(seeds) > POWER - 0.03
    assert seeds == 3 or share(seeds - 1) < POWER + 0.01


def test_differences_that_no_number_of_seeds_settles() -> None:
    assert seeds_to_settle(0.0, np.ones(2)) is seeds_to_settle(1.0, np.zeros(2)) is None
    assert seeds_to_settle(1e-9, np.ones(1)) is None
    # Equal spread over five datasets, of which each counts a fifth.
    assert seeds_to_settle(1.0, np.full(5, 0.2)) <= seeds_to_settle(1.0, np.ones(1))
