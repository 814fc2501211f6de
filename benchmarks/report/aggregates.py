"""Scores over datasets: aggregates, probability of improvement, performance profiles.

Agarwal et al. 2021, https://arxiv.org/abs/2108.13264.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from benchmarks import statistics
from benchmarks.report import figures
from benchmarks.report.document import INK, NOTHING, Grid, interval_text
from benchmarks.report.figures import Panels
from benchmarks.report.scores import (
    UNDER_TRAINED,
    Cell,
    algorithm_label,
    algorithms,
    datasets,
    is_variant,
)
from benchmarks.results import SCORE
from benchmarks.statistics import MIN_SEEDS, Estimate, Scores

# Aggregates of the scores ``[seeds, datasets]`` of an algorithm.
METRICS: dict[str, Callable[[Scores], Estimate]] = {
    "IQM": statistics.interquartile_mean,
    "mean": statistics.mean,
    "optimality gap": functools.partial(statistics.optimality_gap, goal=100.0),
}
# The algorithms whose probability of improvement over the others is shown, where they take part.
_CANDIDATES = ("iw-sft-q", "sft-q")
_THRESHOLDS = 101


@dataclass(frozen=True)
class Aggregates:
    """Aggregates over the datasets that all compared algorithms have."""

    datasets: list[str]
    seeds: dict[str, int]  # number of seeds of a dataset, by algorithm
    estimates: dict[str, list[Estimate]]  # one for each of METRICS, by algorithm
    # Probability that a run of a candidate scores higher than one of another algorithm.
    improvement: dict[str, dict[str, Estimate]]
    thresholds: NDArray[np.float64]
    profiles: dict[str, Scores]  # share of runs that score above each of the thresholds
    left_out: dict[str, str]  # why an algorithm is not compared
    datasets_left_out: list[str]  # with scores, but not of all algorithms with three seeds


def aggregate(group: Sequence[Cell]) -> Aggregates:
    """Aggregate over the largest full block of datasets and algorithms with three seeds or more.

    Under-trained cells do not enter. Each dataset counts with the same number of seeds of an
    algorithm: where they differ, with the first ones.
    """
    scored = {(cell.dataset, cell.algo): cell for cell in group if cell.score_key == SCORE}
    tasks = datasets(scored.values())
    complete: dict[str, set[str]] = {algo: set() for algo in algorithms(scored.values())}
    for (task, algo), cell in scored.items():
        if len(cell.runs) >= MIN_SEEDS and not cell.under_trained:
            complete[algo].add(task)
    block = _block(complete)
    matrices: dict[str, Scores] = {}
    left_out: dict[str, str] = {}
    for algo, complete_tasks in complete.items():
        if block and complete_tasks >= set(block):
            values = [scored[task, algo].values for task in block]
            n = min(map(len, values))
            matrices[algo] = np.stack([scores[:n] for scores in values], axis=1)
            continue
        none = [task for task in block if (task, algo) not in scored]
        others = [t for t in block or tasks if (t, algo) in scored and t not in complete_tasks]
        short = [task for task in others if scored[task, algo].under_trained]
        few = [task for task in others if task not in short]
        reasons = ("no runs", none), (f"fewer than {MIN_SEEDS} seeds", few), (UNDER_TRAINED, short)
        left_out[algo] = "; ".join(f"{why} on {', '.join(on)}" for why, on in reasons if on)
    beside = [task for task in tasks if task not in block]
    return _compare(block, matrices, left_out=left_out, datasets_left_out=beside)


def _compare(block: list[str], matrices: Mapping[str, Scores], **left_out: Any) -> Aggregates:
    """Compute all estimates from the scores ``[seeds, datasets]`` of each algorithm."""
    estimates = {
        algo: [metric(matrix) for metric in METRICS.values()] for algo, matrix in matrices.items()
    }
    # The paper's algorithms, or the one with the highest IQM where they do not take part.
    candidates = [name for name in _CANDIDATES if name in matrices]
    if matrices and not candidates:
        candidates = [max(estimates, key=lambda algo: estimates[algo][0].point)]
    ends = [end for matrix in matrices.values() for end in (matrix.min(), matrix.max())]
    thresholds = np.linspace(min([0.0, *ends]), max(ends, default=0.0), _THRESHOLDS)
    better = statistics.probability_of_improvement
    return Aggregates(
        datasets=block,
        seeds={algo: len(matrix) for algo, matrix in matrices.items()},
        estimates=estimates,
        improvement={
            name: {
                algo: better(matrices[name], matrices[algo]) for algo in matrices if algo != name
            }
            for name in candidates
            if len(matrices) > 1
        },
        thresholds=thresholds,
        profiles={
            algo: statistics.share_above(matrix, thresholds) for algo, matrix in matrices.items()
        },
        **left_out,
    )


def _block(complete: Mapping[str, set[str]]) -> list[str]:
    """Datasets of the block with the most cells in which every algorithm has every dataset."""
    # Variants decide only where there is nothing else: a sweep on one dataset would outvote the
    # algorithms on many.
    able = {algo: tasks for algo, tasks in complete.items() if tasks}
    voters = {algo: tasks for algo, tasks in able.items() if not is_variant(algo)} or able
    blocks: set[frozenset[str]] = set()
    for tasks in voters.values():
        blocks |= {frozenset(tasks), *(block & tasks for block in blocks)}

    def worth(block: frozenset[str]) -> tuple[bool, int, int, list[str]]:
        members = [algo for algo, tasks in voters.items() if tasks >= block]
        # The paper's algorithm takes precedence. Names decide between equal blocks.
        return _CANDIDATES[0] in members, len(members) * len(block), len(block), sorted(block)

    return sorted(max(blocks, key=worth, default=()))


def aggregate_grid(aggregates: Aggregates) -> Grid:
    """Table of the aggregates with their intervals, in units of the D4RL score."""
    grid = Grid(["algorithm", "seeds", *METRICS], left=1)
    for algo, estimates in aggregates.estimates.items():
        cells = [text(estimate, 1) for estimate in estimates]
        grid.rows.append([algorithm_label(algo), str(aggregates.seeds[algo]), *cells])
    return grid


def improvement_grid(aggregates: Aggregates) -> Grid:
    """Table of the probabilities that a candidate's run scores higher than the row's algorithm."""
    columns = [f"P({algorithm_label(name)} scores higher)" for name in aggregates.improvement]
    grid = Grid(["against", *columns], left=1)
    for algo in aggregates.estimates:
        estimates = [others.get(algo) for others in aggregates.improvement.values()]
        if any(estimates):
            grid.rows.append([algorithm_label(algo), *(text(e, 2) for e in estimates)])
    return grid


def text(estimate: Estimate | None, digits: int) -> str:
    """An estimate with its interval."""
    if estimate is None:
        return NOTHING
    point = f"{estimate.point:.{digits}f}"
    if estimate.low is None or estimate.high is None:
        return f"{point} (no spread)"
    return f"{point} ({interval_text((estimate.low, estimate.high), digits)})"


def draw_aggregates(aggregates: Aggregates, group: Sequence[Cell]) -> Panels:
    """Draw the aggregates with 95 % intervals, one panel for each."""
    estimates, panels = aggregates.estimates, {}
    for i, label in enumerate(METRICS) if estimates else ():
        better = "lower" if label == "optimality gap" else "higher"
        ax = figures.make_panel(f"{label} ({better} is better)", 0.8 + 0.22 * len(estimates))
        _intervals(ax, {name: metrics[i] for name, metrics in estimates.items()}, group)
        ax.set_xlabel(figures.UNIT[SCORE])
        panels[label] = ax
    return figures.finish(panels)


def draw_improvement(aggregates: Aggregates, group: Sequence[Cell]) -> Panels:
    """Draw the probabilities of improvement, one panel for each candidate."""
    panels = {}
    for candidate, estimates in aggregates.improvement.items():
        label = f"P({algorithm_label(candidate)} scores higher than the algorithm)"
        ax = figures.make_panel(label, 0.7 + 0.22 * len(estimates))
        _intervals(ax, estimates, group)
        ax.axvline(0.5, color=INK, alpha=0.7, lw=0.8, ls=":")
        ax.set_xlim(-0.02, 1.02)
        panels[candidate] = ax
    return figures.finish(panels)


def draw_profiles(aggregates: Aggregates, group: Sequence[Cell]) -> Panels:
    """Draw the share of runs above each score, variants in a panel of their own."""
    panels = {}
    for part in ("algorithms", "variants"):
        colour = {
            name: shade
            for name, shade in figures.choose_colours(group).items()
            if name in aggregates.profiles and is_variant(name) == (part == "variants")
        }
        ax = figures.make_panel(f"Runs of {part}", 2.6, colour)
        for name, shade in colour.items():
            x, share = aggregates.thresholds, aggregates.profiles[name]
            ax.step(x, share, where="post", color=shade, lw=1.4)
        ax.set_ylim(-0.02, 1.02)
        ax.set(xlabel=figures.UNIT[SCORE], ylabel="share of runs that score higher")
        panels[part] = ax
    return figures.finish(panels)


def _intervals(ax: Axes, estimates: Mapping[str, Estimate], group: Sequence[Cell]) -> None:
    colour = figures.choose_colours(group)
    for y, (name, (point, low, high)) in enumerate(estimates.items()):
        if low is not None and high is not None:
            ax.barh(y, high - low, left=low, height=0.55, lw=0, color=colour[name], alpha=0.5)
        ax.plot([point] * 2, [y - 0.275, y + 0.275], color=INK, lw=1.6)
    ax.use_sticky_edges = False
    ax.margins(x=0.06)
    figures.list_names(ax, map(algorithm_label, estimates))
