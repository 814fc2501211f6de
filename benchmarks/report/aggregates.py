"""Scores over datasets: aggregates, probability of improvement, performance profiles.

Agarwal et al. 2021, https://arxiv.org/abs/2108.13264. Scores enter as score / 100 (1 is D4RL's
expert) and leave as scores again. Intervals are from a stratified bootstrap over seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from benchmarks import statistics
from benchmarks.report.figures import TITLE, add_legend, choose_colours, list_names, style_axes
from benchmarks.report.grid import NOTHING, Grid
from benchmarks.report.names import algorithm_label, algorithm_rank, is_variant
from benchmarks.report.scores import Cell, algorithms, datasets
from benchmarks.statistics import (
    MIN_SEEDS,
    Estimate,
    probability_of_improvement,
    share_above,
    stratified_bootstrap,
)

# The algorithms whose probability of improvement over the others is shown, where they take part.
_CANDIDATES = ("iw-sft-q", "sft-q")
_THRESHOLDS = 101
_Matrices = dict[str, NDArray[np.float64]]


# Aggregates of the scores ``[seeds, datasets]`` of an algorithm.
METRICS = {
    "IQM": statistics.interquartile_mean,
    "mean": statistics.mean,
    "median": statistics.median,
    "optimality gap": statistics.optimality_gap,
}


@dataclass(frozen=True)
class Aggregates:
    """Aggregates over the datasets that all compared algorithms have.

    Attributes:
        datasets: The datasets.
        seeds: Number of seeds of a dataset, by algorithm.
        estimates: One estimate for each of ``METRICS``, by algorithm.
        improvement: By candidate and other algorithm, the probability that a run of the candidate
            scores higher than a run of the other, mean over datasets.
        thresholds: Scores ``[T]`` of the performance profiles.
        profiles: Share of runs that score above each threshold ``[T]``, by algorithm.
        left_out: Why an algorithm is not compared.
        datasets_left_out: The other datasets with scores, on which not all of the algorithms have
            three seeds.
    """

    datasets: list[str]
    seeds: dict[str, int]
    estimates: dict[str, list[Estimate]]
    improvement: dict[str, dict[str, Estimate]]
    thresholds: NDArray[np.float64]
    profiles: dict[str, Estimate]
    left_out: dict[str, str]
    datasets_left_out: list[str]


def aggregate(group: Sequence[Cell]) -> Aggregates:
    """Aggregate over the largest set of datasets on which algorithms have three seeds or more.

    Datasets and algorithms are those of the largest full block of the table (see :func:`_block`).
    Each dataset counts with the same number of seeds of an algorithm: where they differ, with the
    first ones.
    """
    scored = {(cell.dataset, cell.algo): cell for cell in group if cell.unit == "score"}
    tasks = datasets(scored.values())
    complete = {
        algo: {
            task
            for task in tasks
            if (task, algo) in scored and len(scored[task, algo].runs) >= MIN_SEEDS
        }
        for algo in algorithms(scored.values())
    }
    block = _block(complete)
    matrices: _Matrices = {}
    left_out: dict[str, str] = {}
    for algo, complete_tasks in complete.items():
        if block and complete_tasks >= set(block):
            values = [scored[task, algo].values for task in block]
            n = min(map(len, values))
            matrices[algo] = np.stack([scores[:n] for scores in values], axis=1) / 100.0
            continue
        reasons = {
            "no runs": [task for task in block if (task, algo) not in scored],
            f"fewer than {MIN_SEEDS} seeds": [
                task
                for task in block or tasks
                if (task, algo) in scored and task not in complete_tasks
            ],
        }
        left_out[algo] = "; ".join(
            f"{reason} on {', '.join(names)}" for reason, names in reasons.items() if names
        )
    estimates = _estimates(matrices)
    thresholds = _thresholds(matrices)
    return Aggregates(
        datasets=block,
        seeds={algo: len(matrix) for algo, matrix in matrices.items()},
        estimates=estimates,
        improvement={
            candidate: _improvement(matrices, candidate) for candidate in _candidates(estimates)
        },
        thresholds=100.0 * thresholds,
        profiles=_profiles(matrices, thresholds),
        left_out=left_out,
        datasets_left_out=[task for task in tasks if task not in block],
    )


def _block(complete: Mapping[str, set[str]]) -> list[str]:
    """Datasets of the block with the most cells in which every algorithm has every dataset.

    Blocks with the paper's algorithm take precedence. Variants do not decide, unless there is
    nothing else: a sweep on one dataset would outvote the algorithms on many.
    """
    able = {algo: tasks for algo, tasks in complete.items() if tasks}
    voters = {algo: tasks for algo, tasks in able.items() if not is_variant(algo)} or able
    blocks: set[frozenset[str]] = set()
    for tasks in voters.values():
        blocks |= {frozenset(tasks), *(block & tasks for block in blocks)}

    def worth(block: frozenset[str]) -> tuple[bool, int, int, list[str]]:
        members = [algo for algo, tasks in voters.items() if tasks >= block]
        # Names decide between equal blocks, as the order of a set is not fixed.
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


def _estimates(matrices: _Matrices) -> dict[str, list[Estimate]]:
    def metrics(scores: NDArray[np.float64]) -> NDArray[np.float64]:
        return 100.0 * np.stack([metric(scores) for metric in METRICS.values()], axis=-1)

    generator = np.random.RandomState(0)
    estimates = {}
    for algo, matrix in matrices.items():
        estimate = stratified_bootstrap(metrics, matrix, generator=generator)
        estimates[algo] = [Estimate(*values) for values in zip(*estimate, strict=True)]
    return estimates


def _improvement(matrices: _Matrices, candidate: str) -> dict[str, Estimate]:
    generator = np.random.RandomState(0)
    return {
        algo: stratified_bootstrap(
            probability_of_improvement, matrices[candidate], matrices[algo], generator=generator
        )
        for algo in sorted(matrices, key=algorithm_rank)
        if algo != candidate
    }


def _thresholds(matrices: _Matrices) -> NDArray[np.float64]:
    scores = np.concatenate([[0.0], *(matrix.ravel() for matrix in matrices.values())])
    highest = max((matrix.max() for matrix in matrices.values()), default=0.0)
    return np.linspace(scores.min(), highest, _THRESHOLDS)


def _profiles(matrices: _Matrices, thresholds: NDArray[np.float64]) -> dict[str, Estimate]:
    generator = np.random.RandomState(0)
    return {
        algo: stratified_bootstrap(
            lambda scores: share_above(scores, thresholds), matrix, generator=generator
        )
        for algo, matrix in matrices.items()
    }


def aggregate_grid(aggregates: Aggregates) -> Grid:
    """Table of the aggregates with their intervals, in units of the D4RL score."""
    grid = Grid(["algorithm", "seeds", *METRICS], left=1)
    for algo, estimates in aggregates.estimates.items():
        grid.rows.append(
            [algorithm_label(algo), str(aggregates.seeds[algo])]
            + [f"{e.point:.1f} ({e.low:.1f} to {e.high:.1f})" for e in estimates]
        )
    return grid


def improvement_grid(aggregates: Aggregates) -> Grid:
    """Table of the probabilities that a candidate's run scores higher than the row's algorithm."""
    columns = [f"P({algorithm_label(name)} scores higher)" for name in aggregates.improvement]
    grid = Grid(["against", *columns], left=1)
    for algo in aggregates.estimates:
        estimates = [others.get(algo) for others in aggregates.improvement.values()]
        if any(estimates):
            cells = [
                f"{e.point:.2f} ({e.low:.2f} to {e.high:.2f})" if e else NOTHING for e in estimates
            ]
            grid.rows.append([algorithm_label(algo), *cells])
    return grid


def draw_aggregates(aggregates: Aggregates, group: Sequence[Cell]) -> Figure | None:
    """Draw the aggregates with 95 % intervals, one panel for each."""
    if not aggregates.estimates:
        return None
    names = list(aggregates.estimates)
    figure = Figure(figsize=(11.0, 1.1 + 0.32 * len(names)), layout="constrained")
    axes = figure.subplots(1, len(METRICS), sharey=True)
    for i, (ax, label) in enumerate(zip(axes, METRICS, strict=True)):
        _intervals(
            ax, {name: aggregates.estimates[name][i] for name in names}, choose_colours(group)
        )
        better = "lower" if label == "optimality gap" else "higher"
        ax.set_title(f"{label}\n({better} is better)", fontsize=TITLE)
        ax.set_xlabel("D4RL-normalised score")
    return figure


def draw_improvement(aggregates: Aggregates, group: Sequence[Cell]) -> Figure | None:
    """Draw the probabilities of improvement, one panel for each candidate."""
    improvement = aggregates.improvement
    if not improvement:
        return None
    rows = max(len(estimates) for estimates in improvement.values())
    size = (5.6 * len(improvement), 1.1 + 0.32 * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(improvement), squeeze=False)[0]
    for ax, (candidate, estimates) in zip(axes, improvement.items(), strict=True):
        _intervals(ax, estimates, choose_colours(group))
        ax.axvline(0.5, color="0.3", lw=0.8, ls=":")
        ax.set_xlim(-0.02, 1.02)
        ax.set_xlabel(f"P({algorithm_label(candidate)} scores higher than the algorithm)")
    return figure


def draw_profiles(aggregates: Aggregates, group: Sequence[Cell]) -> Figure | None:
    """Draw the share of runs above each score, variants in a panel of their own."""
    if not aggregates.profiles:
        return None
    names, colour = list(aggregates.profiles), choose_colours(group)
    parts = [[name for name in names if is_variant(name) == variant] for variant in (False, True)]
    parts = [part for part in parts if part]
    figure = Figure(figsize=(5.6 * len(parts), 3.8), layout="constrained")
    for ax, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        style_axes(ax)
        for name in part:
            share, low, high = aggregates.profiles[name]
            x, shade = aggregates.thresholds, colour[name]
            ax.fill_between(x, low, high, step="post", color=shade, alpha=0.15, lw=0)
            ax.step(x, share, where="post", color=shade, lw=1.6)
        ax.set_ylim(-0.02, 1.02)
        ax.set_xlabel("D4RL-normalised score")
        ax.set_ylabel("share of runs that score higher")
    add_legend(figure, {name: colour[name] for name in names})
    return figure


def _intervals(ax: Axes, estimates: dict[str, Estimate], colour: Mapping[str, str]) -> None:
    style_axes(ax)
    for y, (name, estimate) in enumerate(estimates.items()):
        width = estimate.high - estimate.low
        ax.barh(y, width, left=estimate.low, height=0.55, lw=0, color=colour[name], alpha=0.5)
        ax.plot([estimate.point] * 2, [y - 0.275, y + 0.275], color="black", lw=1.6)
    ax.use_sticky_edges = False
    ax.margins(x=0.06)
    list_names(ax, list(map(algorithm_label, estimates)))
