"""Scores over datasets: rliable's aggregate metrics with stratified bootstrap intervals.

Agarwal et al. 2021, https://arxiv.org/abs/2108.13264. Scores enter as score / 100 (1 is D4RL's
expert) and leave as scores again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.report.scores import MIN_SEEDS, Cell, algorithms, datasets

_RESAMPLES = 2_000
# Whose probability of improvement over the others is asked, where it takes part.
_CANDIDATE = "iw-sft-q"


@dataclass(frozen=True)
class Metric:
    """An aggregate of rliable: its function's name, and how the report calls it."""

    function: str
    label: str
    higher_is_better: bool = True


METRICS = (
    Metric("aggregate_iqm", "IQM"),
    Metric("aggregate_mean", "mean"),
    Metric("aggregate_median", "median"),
    Metric("aggregate_optimality_gap", "optimality gap", higher_is_better=False),
)


@dataclass(frozen=True)
class Estimate:
    """A point estimate with its 95 % interval."""

    point: float
    low: float
    high: float


@dataclass(frozen=True)
class Aggregates:
    """Aggregates over datasets.

    Attributes:
        datasets: what was aggregated over.
        seeds: seeds a dataset that entered, by algorithm.
        estimates: one per metric of ``METRICS``, by algorithm.
        candidate: the algorithm of ``improvement``.
        improvement: probability that a run of the candidate beats a run of the other algorithm on
            a dataset drawn at random, by the other algorithm.
        left_out: why an algorithm did not enter.
    """

    datasets: list[str]
    seeds: dict[str, int]
    estimates: dict[str, list[Estimate]]
    candidate: str | None
    improvement: dict[str, Estimate]
    left_out: dict[str, str]


def aggregate(group: Sequence[Cell]) -> Aggregates:
    """Aggregate the algorithms that have three seeds or more on every dataset with a score.

    rliable needs as many seeds of an algorithm on each dataset: where they differ, the first ones
    of each enter.
    """
    scored = [cell for cell in group if cell.unit == "score"]
    tasks = datasets(scored)
    by_name = {(cell.dataset, cell.algo): cell for cell in scored}
    matrices: dict[str, NDArray[np.float64]] = {}
    left_out: dict[str, str] = {}
    for algo in algorithms(group):
        mine = {task: by_name.get((task, algo)) for task in tasks}
        missing = [task for task, cell in mine.items() if cell is None]
        present = [cell for cell in mine.values() if cell is not None]
        few = [cell.dataset for cell in present if len(cell.runs) < MIN_SEEDS]
        if missing:
            left_out[algo] = f"no runs on {', '.join(missing)}"
        elif few:
            left_out[algo] = f"fewer than {MIN_SEEDS} seeds on {', '.join(few)}"
        elif present:
            n = min(len(cell.runs) for cell in present)
            matrices[algo] = np.stack([cell.values[:n] for cell in present], axis=1) / 100.0
    estimates = _metrics(matrices)
    candidate = _candidate(estimates)
    return Aggregates(
        datasets=tasks,
        seeds={algo: len(matrix) for algo, matrix in matrices.items()},
        estimates=estimates,
        candidate=candidate,
        improvement=_improvement(matrices, candidate),
        left_out=left_out,
    )


def _candidate(estimates: dict[str, list[Estimate]]) -> str | None:
    """The paper's algorithm, or the highest IQM where it does not take part."""
    if len(estimates) < 2:
        return None
    if _CANDIDATE in estimates:
        return _CANDIDATE
    return max(estimates, key=lambda algo: estimates[algo][0].point)


def _metrics(matrices: dict[str, NDArray[np.float64]]) -> dict[str, list[Estimate]]:
    from rliable import metrics

    functions = [getattr(metrics, metric.function) for metric in METRICS]
    points, intervals = _intervals(
        matrices, lambda scores: np.array([function(scores) for function in functions])
    )
    return {
        algo: [
            Estimate(*(100.0 * float(value) for value in estimate))
            for estimate in zip(points[algo], *intervals[algo], strict=True)
        ]
        for algo in matrices
    }


def _improvement(
    matrices: dict[str, NDArray[np.float64]], candidate: str | None
) -> dict[str, Estimate]:
    if candidate is None:
        return {}
    pairs = {
        algo: [matrices[candidate], matrix]
        for algo, matrix in matrices.items()
        if algo != candidate
    }
    points, intervals = _intervals(pairs, probability_of_improvement)
    return {
        algo: Estimate(float(points[algo][0]), *(float(bound[0]) for bound in intervals[algo]))
        for algo in pairs
    }


def probability_of_improvement(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray:
    """P(a run of x scores higher than a run of y), ties count half, mean over datasets.

    rliable's own function gives the same number, and spends its time on p-values nobody reads.

    Args:
        x: scores ``[seeds, datasets]``.
        y: scores ``[other seeds, datasets]``.

    Returns:
        The probability ``[1]``.
    """
    gap = x[:, None] - y[None]
    return np.array([(gap > 0).mean() + 0.5 * (gap == 0).mean()])


def _intervals(
    scores: dict[str, NDArray[np.float64]] | dict[str, list[NDArray[np.float64]]],
    function: Callable[..., NDArray[np.float64]],
) -> tuple[dict[str, NDArray[np.float64]], dict[str, NDArray[np.float64]]]:
    from rliable import library

    with _numpy_seed(0):
        return library.get_interval_estimates(scores, function, reps=_RESAMPLES)


@contextmanager
def _numpy_seed(seed: int) -> Iterator[None]:
    # rliable resamples with numpy's global generator, whatever random_state it is given.
    state = np.random.get_state()
    np.random.seed(seed)
    try:
        yield
    finally:
        np.random.set_state(state)
