"""Scores over datasets: rliable's aggregates, probability of improvement, performance profiles.

Agarwal et al. 2021, https://arxiv.org/abs/2108.13264. Scores enter as score / 100 (1 is D4RL's
expert) and leave as scores again. Intervals are from a stratified bootstrap over seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.report.names import algorithm_rank, is_variant
from benchmarks.report.scores import Cell, Estimate, algorithms, datasets
from benchmarks.statistics import MIN_SEEDS

_RESAMPLES = 2_000
# Whose probability of improvement over the others is asked, where they take part.
_CANDIDATES = ("iw-sft-q", "sft-q")
_THRESHOLDS = 101


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
class Profile:
    """Share of runs that score above each threshold, with its 95 % interval; all ``[T]``."""

    thresholds: NDArray[np.float64]
    share: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]


@dataclass(frozen=True)
class Aggregates:
    """Aggregates over the datasets that all compared algorithms have.

    Attributes:
        datasets: what was aggregated over.
        seeds: seeds a dataset that entered, by algorithm.
        estimates: one per metric of ``METRICS``, by algorithm.
        improvement: by candidate and other algorithm, the probability that a run of the candidate
            beats a run of the other on a dataset drawn at random.
        profiles: by algorithm.
        left_out: why an algorithm did not enter.
        datasets_left_out: datasets with scores that did not enter, as not all of the algorithms
            have three seeds there.
    """

    datasets: list[str]
    seeds: dict[str, int]
    estimates: dict[str, list[Estimate]]
    improvement: dict[str, dict[str, Estimate]]
    profiles: dict[str, Profile]
    left_out: dict[str, str]
    datasets_left_out: list[str]


def aggregate(group: Sequence[Cell]) -> Aggregates:
    """Aggregate over the largest set of datasets on which algorithms have three seeds or more.

    Datasets and algorithms are those of the largest full block of the table (see :func:`_block`).
    rliable needs as many seeds of an algorithm on each dataset: where they differ, the first ones
    of each enter.
    """
    scored = {(cell.dataset, cell.algo): cell for cell in group if cell.unit == "score"}
    have = {
        algo: {
            task
            for task in datasets(scored.values())
            if (task, algo) in scored and len(scored[task, algo].runs) >= MIN_SEEDS
        }
        for algo in algorithms(scored.values())
    }
    tasks = _block(have)
    matrices: dict[str, NDArray[np.float64]] = {}
    left_out: dict[str, str] = {}
    for algo in have:
        if tasks and have[algo] >= set(tasks):
            mine = [scored[task, algo] for task in tasks]
            n = min(len(cell.runs) for cell in mine)
            matrices[algo] = np.stack([cell.values[:n] for cell in mine], axis=1) / 100.0
        else:
            missing = [task for task in tasks if (task, algo) not in scored]
            few = [
                task
                for task in tasks or datasets(scored.values())
                if (task, algo) in scored and task not in have[algo]
            ]
            left_out[algo] = "; ".join(
                [f"no runs on {', '.join(missing)}"] * bool(missing)
                + [f"fewer than {MIN_SEEDS} seeds on {', '.join(few)}"] * bool(few)
            )
    estimates = _metrics(matrices)
    return Aggregates(
        datasets=tasks,
        seeds={algo: len(matrix) for algo, matrix in matrices.items()},
        estimates=estimates,
        improvement={
            candidate: _improvement(matrices, candidate) for candidate in _candidates(estimates)
        },
        profiles=_profiles(matrices),
        left_out=left_out,
        datasets_left_out=[task for task in datasets(scored.values()) if task not in tasks],
    )


def _block(have: Mapping[str, set[str]]) -> list[str]:
    """Datasets of the block with the most cells in which every algorithm has every dataset.

    Blocks with the paper's algorithm go first. Variants do not decide, unless there is nothing
    else: a sweep on one dataset would outvote the algorithms on many.
    """
    able = {algo: tasks for algo, tasks in have.items() if tasks}
    voters = {algo: tasks for algo, tasks in able.items() if not is_variant(algo)} or able
    blocks: set[frozenset[str]] = set()
    for tasks in voters.values():
        blocks |= {frozenset(tasks), *(block & tasks for block in blocks)}

    def worth(block: frozenset[str]) -> tuple[bool, int, int, list[str]]:
        members = [algo for algo, tasks in voters.items() if tasks >= block]
        # Equal blocks are told apart by their names: the order of a set is no order.
        return _CANDIDATES[0] in members, len(members) * len(block), len(block), sorted(block)

    if not blocks:
        return []
    best = max(blocks, key=worth)
    return sorted(best)


def _candidates(estimates: Mapping[str, list[Estimate]]) -> list[str]:
    """The paper's algorithms, or the one with the highest IQM where they do not take part."""
    if len(estimates) < 2:
        return []
    return [name for name in _CANDIDATES if name in estimates] or [
        max(estimates, key=lambda algo: estimates[algo][0].point)
    ]


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


def _improvement(matrices: dict[str, NDArray[np.float64]], candidate: str) -> dict[str, Estimate]:
    pairs = {
        algo: [matrices[candidate], matrix]
        for algo, matrix in sorted(matrices.items(), key=lambda item: algorithm_rank(item[0]))
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


def _profiles(matrices: dict[str, NDArray[np.float64]]) -> dict[str, Profile]:
    from rliable import library

    if not matrices:
        return {}
    lowest = min(0.0, *(matrix.min() for matrix in matrices.values()))
    highest = max(matrix.max() for matrix in matrices.values())
    thresholds = np.linspace(lowest, highest, _THRESHOLDS)
    with _numpy_seed(0):
        # rliable's own profile function is a Python loop over the thresholds.
        points, intervals = library.create_performance_profile(
            matrices, thresholds, custom_profile_func=share_above, reps=_RESAMPLES
        )
    return {algo: Profile(100.0 * thresholds, points[algo], *intervals[algo]) for algo in matrices}


def share_above(scores: NDArray[np.float64], thresholds: NDArray[np.float64]) -> NDArray:
    """Share of the runs ``[seeds, datasets]`` that score above each threshold ``[T]``."""
    return (scores[..., None] > thresholds).mean(axis=(0, 1))


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
