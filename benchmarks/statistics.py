"""What seeds say: the interval of their mean."""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray

# Fewer seeds carry neither a deviation nor an interval.
MIN_SEEDS = 3
_RESAMPLES = 10_000


def bootstrap_interval(values: NDArray[np.float64]) -> tuple[NDArray, NDArray]:
    """95 % percentile-bootstrap interval of the mean over the first axis.

    The resamples are the same at every call: the same values give the same interval.

    Args:
        values: ``[n, ...]``, one row a seed.

    Returns:
        Lower and upper bound, ``[...]``.
    """
    share = _shares(len(values))
    low, high = np.percentile(np.tensordot(share, values, axes=1), [2.5, 97.5], axis=0)
    return low, high


@functools.lru_cache(maxsize=8)
def _shares(n: int) -> NDArray[np.float64]:
    """How often each of n rows is in each resample, over n ``[resamples, n]``."""
    draws = np.random.default_rng(0).integers(n, size=(_RESAMPLES, n))
    return np.stack([(draws == row).mean(axis=1) for row in range(n)], axis=1)
