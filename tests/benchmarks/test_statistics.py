"""The bootstrap interval of a mean, against all resamples and scipy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats

from benchmarks.statistics import bootstrap_interval


def test_interval_is_that_of_all_resamples() -> None:
    values = np.array([40.0, 50.0, 63.0, 41.0, 90.0])
    means = [np.mean(draw) for draw in itertools.product(values, repeat=5)]
    low, high = bootstrap_interval(values)
    # 10,000 draws: the 2.5 % and 97.5 % ranks are known to 0.16 % (one deviation).
    assert scipy.stats.percentileofscore(means, low, kind="mean") == pytest.approx(2.5, abs=0.7)
    assert scipy.stats.percentileofscore(means, high, kind="mean") == pytest.approx(97.5, abs=0.7)


def test_interval_agrees_with_scipy_and_is_repeatable() -> None:
    values = np.random.default_rng(1).normal(50, 10, size=(6, 4))
    low, high = bootstrap_interval(values)
    for column in range(4):
        reference = scipy.stats.bootstrap(
            (values[:, column],), np.mean, method="percentile", n_resamples=20_000
        ).confidence_interval
        assert low[column] == pytest.approx(reference.low, abs=0.5)
        assert high[column] == pytest.approx(reference.high, abs=0.5)
    again = bootstrap_interval(values)
    assert np.array_equal(low, again[0]) and np.array_equal(high, again[1])


def test_equal_seeds_have_an_interval_of_no_width() -> None:
    assert bootstrap_interval(np.full(5, 7.5)) == pytest.approx((7.5, 7.5))
