"""Intervals of means, of shares and of aggregates over datasets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
# Fewer seeds have neither a deviation nor an interval.
MIN_SEEDS = 3
_ENDS = ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2)
_RESAMPLES = 10_000
_SHIFTS = 2_000

Scores = NDArray[np.float64]


class Estimate(NamedTuple):
    """A value with the ends of its 95 % interval; numbers, or arrays of one shape."""

    point: Any
    low: Any
    high: Any


def t_interval(
    values: ArrayLike, low: float = -np.inf, high: float = np.inf
) -> tuple[Scores, Scores]:
    """Student's 95 % interval of the mean over the first axis, for a few seeds.

    ``values`` ``[n, ...]`` of two or more seeds and the ends ``[...]`` lie in ``low ... high``. For
    normal values it covers the mean in 95 % of all cases; ``scripts/interval_coverage.py`` measures
    the coverage for others.
    """
    from scipy import stats

    array = np.asarray(values, np.float64)
    error = array.std(axis=0, ddof=1) / np.sqrt(len(array))
    half = stats.t.ppf(_ENDS[1], len(array) - 1) * error
    return np.clip(array.mean(0) - half, low, high), np.clip(array.mean(0) + half, low, high)


def bootstrap_interval(values: ArrayLike, seed: int = 0) -> tuple[Scores, Scores]:
    """95 % percentile-bootstrap interval of the mean over the first axis (Efron 1979).

    ``values`` ``[n, ...]`` has one row for each question, with its answers averaged; a few seeds
    are too few for it, see :func:`t_interval`. The ends ``[...]`` are equal where all rows are
    equal. The same values and seed give the same interval. Without a row it raises a
    ``ValueError``.
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


def shift_interval(
    function: Callable[..., Scores], *scores: Scores, generator: np.random.Generator
) -> Estimate:
    """Value of a function of scores, and its 95 % interval over seeds.

    The function takes one array ``[..., seeds, datasets]`` for each of ``scores``. The interval has
    the middle 95 % of its values over draws that shift each dataset's scores by Student's t times
    their standard error. For one dataset's mean it is :func:`t_interval`, up to the draws.
    """
    shifted = []
    for matrix in scores:
        seeds, datasets = matrix.shape
        error = matrix.std(axis=0, ddof=1) / np.sqrt(seeds)
        shift = generator.standard_t(seeds - 1, (_SHIFTS, 1, datasets)) * error
        shifted.append(matrix + shift)
    return Estimate(function(*scores), *np.quantile(function(*shifted), _ENDS, axis=0))


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
