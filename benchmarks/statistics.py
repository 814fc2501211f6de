"""Intervals of means, of differences, of shares and of aggregates over datasets.

``scripts/interval_coverage.py`` measures how often each of them holds the true value.
"""

from __future__ import annotations

from bisect import bisect_left
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

CONFIDENCE = 0.95
# Share of the cases in which a number of seeds settles a difference.
POWER = 0.8
_MOST_SEEDS = 10_000
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


def _welch(point: float, *groups: Scores) -> Estimate:
    """A value whose error is that of a sum of the means of groups of scores ``[seeds, datasets]``.

    Each dataset of each group has a variance of its own; the degrees of freedom are
    Satterthwaite's. Without any spread there is no interval.
    """
    from scipy import stats

    if not any(np.ptp(group, axis=0).any() for group in groups):
        return Estimate(point)
    errors = np.concatenate([_variances(group) / len(group) for group in groups])
    rest = np.concatenate([np.full(group.shape[1], len(group) - 1) for group in groups])
    freedom = errors.sum() ** 2 / (errors**2 / rest).sum()
    half = float(stats.t.ppf(_UPPER, freedom) * np.sqrt(errors.sum()))
    return Estimate(point, point - half, point + half)


def _variances(scores: Scores) -> Scores:
    """Variance that a seed of each dataset gives to the mean of scores ``[seeds, datasets]``."""
    return scores.var(axis=0, ddof=1) / scores.shape[1] ** 2


class Difference(NamedTuple):
    """How much higher the mean of one algorithm is than that of another."""

    estimate: Estimate
    variances: tuple[Scores, ...]  # that a seed gives to it, see :func:`seeds_to_settle`
    paired: bool

    @property
    def seeds(self) -> int | None:
        """Seeds of each algorithm that settle it; None for no number."""
        return seeds_to_settle(self.estimate.point, *self.variances)

    @property
    def settled(self) -> bool:
        """Whether the interval does not hold 0."""
        _, low, high = self.estimate
        return low is not None and high is not None and not low <= 0 <= high


def difference(x: Scores, y: Scores, *, paired: bool) -> Difference:
    """Difference of the means of x ``[n, datasets]`` and y ``[m, datasets]``.

    The interval is Welch's. In paired scores, n = m and chance has affected row i of x and of y
    alike; then the interval is that of the mean of x - y.
    """
    groups = [x - y] if paired else [x, y]
    estimate = _welch(float(x.mean() - y.mean()), *groups)
    return Difference(estimate, tuple(map(_variances, groups)), paired)


def seeds_to_settle(gap: float, *variances: Scores) -> int | None:
    """Fewest seeds with which the 95 % interval leaves 0 out in 80 % of all cases.

    Args:
        gap: The true difference.
        variances: Variances that a seed gives to the estimated difference, of each dataset of each
            group of scores. The difference of n seeds has their sum, divided by n.

    Returns:
        The number, from the power of the t-test (noncentral t). None where more than 10,000 seeds
        are needed, or where there is no difference or no variance.
    """
    from scipy import stats

    each = np.concatenate(variances)
    if gap == 0 or not each.any():
        return None

    def power(seeds: int) -> float:
        freedom = each.sum() ** 2 / (each**2).sum() * (seeds - 1)
        limit = stats.t.ppf(_UPPER, freedom)
        # The noncentral t overflows far beyond this, where the power is 1.
        shift = min(abs(gap) / np.sqrt(each.sum() / seeds), 4 * limit + 30)
        ends = stats.nct.sf(limit, freedom, shift), stats.nct.cdf(-limit, freedom, shift)
        return float(sum(ends))

    counts = range(MIN_SEEDS, _MOST_SEEDS + 1)
    place = bisect_left(counts, POWER, key=power)
    return counts[place] if place < len(counts) else None
