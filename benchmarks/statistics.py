"""Intervals of means, of shares and of aggregates over datasets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
# Fewer seeds have neither a deviation nor an interval.
MIN_SEEDS = 3
_ENDS = (100 * (1 - CONFIDENCE) / 2, 100 * (1 + CONFIDENCE) / 2)
_RESAMPLES = 10_000
_STRATIFIED_RESAMPLES = 2_000

Scores = NDArray[np.float64]


class Estimate(NamedTuple):
    """A value with the ends of its 95 % interval; numbers, or arrays of one shape."""

    point: Any
    low: Any
    high: Any


def bootstrap_interval(values: ArrayLike, seed: int = 0) -> tuple[Scores, Scores]:
    """95 % percentile-bootstrap interval of the mean over the first axis (Efron 1979).

    ``values`` ``[n, ...]`` has one row for each independent measurement: a seed, or a question with
    its answers averaged. The ends ``[...]`` are equal where all rows are equal. The same values and
    seed give the same interval. Without a row it raises a ``ValueError``.
    """
    from scipy import stats

    array = np.asarray(values, np.float64)
    if len(array) < 2:
        if not len(array):
            raise ValueError("an interval needs at least one value")
        return array[0], array[0]
    result = stats.bootstrap(
        (array,),
        np.mean,
        axis=0,
        vectorized=True,
        method="percentile",
        n_resamples=_RESAMPLES,
        confidence_level=CONFIDENCE,
        rng=np.random.default_rng(seed),
    )
    return result.confidence_interval.low, result.confidence_interval.high


def wilson_interval(right: int, questions: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927), for one answer per question."""
    from scipy import stats

    interval = stats.binomtest(right, questions).proportion_ci(CONFIDENCE, method="wilson")
    return float(interval.low), float(interval.high)


def stratified_bootstrap(
    function: Callable[..., Scores], *scores: Scores, generator: np.random.RandomState
) -> Estimate:
    """Value of a function of scores, and its 95 % interval from a bootstrap over seeds.

    The function takes one array ``[..., seeds, datasets]`` for each of ``scores``. Each dataset's
    seeds are drawn independently (Agarwal et al. 2021, https://arxiv.org/abs/2108.13264). The draws
    are those of rliable for a global generator in the same state.
    """
    draws = [
        [generator.choice(len(matrix), matrix.shape) for matrix in scores]
        for _ in range(_STRATIFIED_RESAMPLES)
    ]
    resampled = [
        np.take_along_axis(matrix[None], np.stack(rows), axis=1)
        for matrix, rows in zip(scores, zip(*draws, strict=True), strict=True)
    ]
    low, high = np.percentile(function(*resampled), _ENDS, axis=0)
    return Estimate(function(*scores), low, high)


def interquartile_mean(scores: Scores) -> Scores:
    """Mean of the middle half of all scores ``[..., seeds, datasets]``."""
    from scipy import stats

    return stats.trim_mean(scores.reshape(*scores.shape[:-2], -1), 0.25, axis=-1)


def mean(scores: Scores) -> Scores:
    """Mean of the datasets' mean scores ``[..., seeds, datasets]``."""
    return scores.mean(axis=-2).mean(axis=-1)


def median(scores: Scores) -> Scores:
    """Median of the datasets' mean scores ``[..., seeds, datasets]``."""
    return np.median(scores.mean(axis=-2), axis=-1)


def optimality_gap(scores: Scores) -> Scores:
    """Mean distance of the scores ``[..., seeds, datasets]`` from 1; scores above 1 count as 1."""
    return 1.0 - np.minimum(scores, 1.0).mean(axis=(-2, -1))


def probability_of_improvement(x: Scores, y: Scores) -> Scores:
    """Probability that a run of x scores higher than a run of y, mean over datasets.

    The scores are ``[..., seeds, datasets]``. A tie counts as half.
    """
    gap = x[..., :, None, :] - y[..., None, :, :]
    return (gap > 0).mean(axis=(-3, -2, -1)) + 0.5 * (gap == 0).mean(axis=(-3, -2, -1))


def share_above(scores: Scores, thresholds: Scores) -> Scores:
    """Share of the scores ``[..., seeds, datasets]`` above each of the thresholds ``[T]``."""
    return (scores[..., None] > thresholds).mean(axis=(-3, -2))
