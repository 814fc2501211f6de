"""Scores over questions, and how sure they are."""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike

CONFIDENCE = 0.95
_RESAMPLES = 10_000


def wilson(right: int, questions: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Wilson's interval of a share (1927); for one answer a question.

    Raises:
        ValueError: no question, or more right answers than questions.
    """
    if not 0 <= right <= questions or questions == 0:
        raise ValueError(f"{right} right answers of {questions}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    share = right / questions
    middle = share + z**2 / (2 * questions)
    half = z * math.sqrt(share * (1 - share) / questions + z**2 / (4 * questions**2))
    scale = 1 + z**2 / questions
    # At 0 and at all right the ends are exact, but for rounding.
    low = 0.0 if right == 0 else (middle - half) / scale
    high = 1.0 if right == questions else (middle + half) / scale
    return low, high


def bootstrap(
    values: ArrayLike, *, seed: int = 0, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean, questions drawn with replacement (Efron 1979).

    Args:
        values: of the questions; the answers to one question are averaged before, as they are not
            independent of each other.
        seed: of the draws.
        confidence: mass of the interval.

    Returns:
        Both ends. Where all questions have the same value they are that value: the data then say
        nothing of the spread.

    Raises:
        ValueError: no question.
    """
    array = np.asarray(values, np.float64)
    if array.size == 0:
        raise ValueError("no question to draw from")
    source = np.random.default_rng(seed)
    # How often each question is drawn; all that a mean needs.
    counts = source.multinomial(array.size, np.full(array.size, 1 / array.size), size=_RESAMPLES)
    means = counts @ array / array.size
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
