"""Intervals of means, of shares and of aggregates over datasets.

``scripts/interval_coverage.py`` measures how often each of them holds the true value.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
# Fewer seeds have neither a deviation nor an interval.
MIN_SEEDS = 3
_UPPER = (1 + CONFIDENCE) / 2

Scores = NDArray[np.float64]


class Estimate(NamedTuple):
    """A value with the ends of its 95 % interval, None where the scores give no interval."""

    point: float
    low: float | None = None
    high: float | None = None


def t_interval(
    values: ArrayLike, low: float = -np.inf, high: float = np.inf
) -> tuple[Scores, Scores]:
    """Student's 95 % interval of the mean over the first axis, for seeds or questions.

    ``values`` ``[n, ...]`` and the ends ``[...]`` lie in ``low ... high``, which are the ends for a
    single value. For normal values it covers the mean in 95 % of all cases.
    """
    from scipy import stats

    array = np.asarray(values, np.float64)
    if len(array) < 2:
        return np.full(array.shape[1:], low), np.full(array.shape[1:], high)
    half = stats.t.ppf(_UPPER, len(array) - 1) * array.std(axis=0, ddof=1) / np.sqrt(len(array))
    return np.clip(array.mean(0) - half, low, high), np.clip(array.mean(0) + half, low, high)


def wilson_interval(share: float, questions: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of questions (Wilson 1927), one answer for each.

    Raises a ``ValueError`` for a share outside 0 ... 1 or without questions.
    """
    from scipy import stats

    if not 0 <= share <= 1 or questions <= 0:
        raise ValueError(f"{share}: a share of {questions} questions lies in [0, 1]")
    z = stats.norm.ppf(_UPPER)
    shrink = 1 + z**2 / questions
    middle = (share + z**2 / (2 * questions)) / shrink
    half = z / shrink * np.sqrt(share * (1 - share) / questions + z**2 / (4 * questions**2))
    # Rounding would leave 0 and 1 out.
    return 0.0 if share == 0 else float(middle - half), 1.0 if share == 1 else float(middle + half)


def interval_over_questions(shares: ArrayLike, answers: int) -> tuple[float, float]:
    """95 % interval of the mean of ``shares`` ``[questions]``, each of so many answers.

    Wilson's interval for the number of questions that, with one answer each, would leave the mean
    as uncertain as the shares' spread does (Korn and Graubard 1998). That number is at least the
    questions and at most all answers.
    """
    array = np.asarray(shares, np.float64)
    effective, mean = float(len(array)), float(array.mean())
    variance = array.var(ddof=1) / len(array) if len(array) > 1 else 0.0
    if len(array) > 1 and 0 < mean < 1:
        most = len(array) * answers
        worth = mean * (1 - mean) / variance if variance > 0 else most
        effective = min(max(worth, len(array)), most)
    return wilson_interval(mean, effective)


def interquartile_mean(scores: Scores) -> Estimate:
    """Mean of the middle half of all scores ``[seeds, datasets]``.

    The interval is that of the mean of the winsorised scores, divided by the share that is left
    (Tukey and McLaughlin 1963).
    """
    from scipy import stats

    ordered = np.sort(scores, axis=None)
    cut = len(ordered) // 4
    middle = np.clip(scores, ordered[cut], ordered[-1 - cut])
    share = 1 - 2 * cut / len(ordered)
    return _welch(float(stats.trim_mean(ordered, 0.25)), middle / share)


def mean(scores: Scores) -> Estimate:
    """Mean of the datasets' mean scores ``[seeds, datasets]``."""
    return _welch(float(scores.mean()), scores)


def optimality_gap(scores: Scores, goal: float = 1.0) -> Estimate:
    """Mean distance of the scores ``[seeds, datasets]`` below a goal; higher ones have none."""
    distances = goal - np.minimum(scores, goal)
    return _welch(float(distances.mean()), distances)


def _welch(point: float, scores: Scores) -> Estimate:
    """A value whose error is that of the mean of scores ``[seeds, datasets]``.

    Each dataset has a variance of its own; the degrees of freedom are Satterthwaite's. Without any
    spread there is no interval.
    """
    from scipy import stats

    seeds, datasets = scores.shape
    if not np.ptp(scores, axis=0).any():
        return Estimate(point)
    variances = scores.var(axis=0, ddof=1) / seeds / datasets**2
    freedom = variances.sum() ** 2 / (variances**2).sum() * (seeds - 1)
    half = float(stats.t.ppf(_UPPER, freedom) * np.sqrt(variances.sum()))
    return Estimate(point, point - half, point + half)


def probability_of_improvement(x: Scores, y: Scores) -> Estimate:
    """Probability that a run of x scores higher than a run of y, mean over datasets.

    The scores are ``[seeds, datasets]``. A tie counts as half. The interval has all probabilities
    whose distance from the measured one is 1.96 of their standard errors (Newcombe 2006, method 5),
    as if they were equal on all datasets; where they are not, it is too wide.
    """
    gap = x[:, None] - y[None]
    point = float(((gap > 0) + (gap == 0) / 2).mean())
    return Estimate(point, *_newcombe(point, len(x), len(y), x.shape[1]))


@functools.cache
def _newcombe(point: float, runs: int, others: int, datasets: int) -> tuple[float, float]:
    from scipy import optimize, stats

    z, more = stats.norm.ppf(_UPPER), (runs + others) / 2 - 1

    def excess(p: float) -> float:
        shared = 1 + more * ((1 - p) / (2 - p) + p / (1 + p))
        return (p - point) ** 2 - z**2 * p * (1 - p) * shared / (runs * others * datasets)

    # At 0 and 1 the measured probability itself has no error.
    low = optimize.brentq(excess, 0.0, min(point, 1 - 1e-9)) if point > 0 else 0.0
    high = optimize.brentq(excess, max(point, 1e-9), 1.0) if point < 1 else 1.0
    return low, high


def share_above(scores: Scores, thresholds: Scores) -> Scores:
    """Share of the scores ``[seeds, datasets]`` above each of the thresholds ``[T]``."""
    return (scores[..., None] > thresholds).mean(axis=(0, 1))
