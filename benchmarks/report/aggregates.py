"""Scores over datasets, and differences between algorithms.

Aggregates: Agarwal et al. 2021, https://arxiv.org/abs/2108.13264.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks import statistics
from benchmarks.report.document import NOTHING, Grid, interval_text
from benchmarks.report.scores import (
    UNDER_TRAINED,
    Cell,
    algorithm_label,
    algorithms,
    compare,
    dataset_label,
    datasets,
    is_variant,
    stack,
)
from benchmarks.results import SCORE
from benchmarks.statistics import MIN_SEEDS, Difference, Estimate, Scores

# Aggregates of the scores ``[seeds, datasets]`` of an algorithm.
METRICS: dict[str, Callable[[Scores], Estimate]] = {
    "IQM": statistics.interquartile_mean,
    "mean": statistics.mean,
    "optimality gap": functools.partial(statistics.optimality_gap, goal=100.0),
}
# The paper's algorithm, and the one that all others are compared with.
PAPER, BASIS = "iw-sft-q", "sft-q"
_PAIRED = "Paired: both have the same seeds, and start from the reference policy of each."
_OTHER_SCHEDULE = "Not the weights alone: the learning rate or the number of updates differs, too."


@dataclass(frozen=True)
class Aggregates:
    """Aggregates over the datasets that all compared algorithms have."""

    datasets: list[str]
    rows: dict[str, list[Cell]]  # the cells of the datasets, by algorithm
    estimates: dict[str, list[Estimate]]  # one for each of METRICS, by algorithm
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
    rows: dict[str, list[Cell]] = {}
    estimates: dict[str, list[Estimate]] = {}
    left_out: dict[str, str] = {}
    for algo, complete_tasks in complete.items():
        if block and complete_tasks >= set(block):
            rows[algo] = [scored[task, algo] for task in block]
            estimates[algo] = [metric(stack(rows[algo])) for metric in METRICS.values()]
            continue
        none = [task for task in block if (task, algo) not in scored]
        others = [t for t in block or tasks if (t, algo) in scored and t not in complete_tasks]
        short = [task for task in others if scored[task, algo].under_trained]
        few = [task for task in others if task not in short]
        reasons = ("no runs", none), (f"fewer than {MIN_SEEDS} seeds", few), (UNDER_TRAINED, short)
        left_out[algo] = "; ".join(f"{why} on {', '.join(on)}" for why, on in reasons if on)
    beside = [task for task in tasks if task not in block]
    return Aggregates(block, rows, estimates, left_out, beside)


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
        return PAPER in members, len(members) * len(block), len(block), sorted(block)

    return sorted(max(blocks, key=worth, default=()))


def aggregate_grid(aggregates: Aggregates) -> Grid:
    """Table of the aggregates with their intervals, in units of the D4RL score."""
    grid = Grid(["algorithm", "seeds", *METRICS], left=1)
    for algo, estimates in aggregates.estimates.items():
        cells = [text(estimate, 1) for estimate in estimates]
        seeds = len(stack(aggregates.rows[algo]))
        grid.rows.append([algorithm_label(algo), str(seeds), *cells])
    return grid


def difference_grid(group: Sequence[Cell], aggregates: Aggregates) -> Grid:
    """Table of the differences to SFT(Q) and to the highest mean, and what is open.

    For each dataset, then over all of the aggregates: differences of means with 95 % intervals, and
    the number of seeds of both algorithms that would settle an open one in 80 % of all cases, if it
    is as large as it seems. Under-trained cells and those of fewer than three seeds do not enter.
    """
    columns = [f"less {algorithm_label(BASIS)}", "verdict", "less the highest", "verdict"]
    grid = Grid(["dataset", "algorithm", *columns])
    fair = [cell for cell in group if len(cell.runs) >= MIN_SEEDS and not cell.under_trained]
    parts = {name: [[c] for c in fair if c.dataset == name] for name in datasets(fair)}
    if len(aggregates.datasets) > 1:
        parts[f"all {len(aggregates.datasets)} datasets"] = [*aggregates.rows.values()]
    for name, members in parts.items():
        if len(members) < 2:
            continue
        by_algo = {row[0].algo: row for row in members}
        highest = max(members, key=lambda row: float(stack(row).mean()))
        for algo, row in by_algo.items():
            cells = [dataset_label(name), algorithm_label(algo)]
            for other in (by_algo.get(BASIS), highest):
                cells += _against(grid, row, other)
            grid.rows.append(cells)
    return grid


def _against(grid: Grid, row: Sequence[Cell], other: Sequence[Cell] | None) -> list[str]:
    """A difference with its interval, and its verdict."""
    difference = None if other is None or other is row else compare(row, other)
    if difference is None:
        return [NOTHING, NOTHING]
    notes = [_PAIRED] * difference.paired
    if other is not None and other_schedules(row, other):
        notes.append(_OTHER_SCHEDULE)
    return [grid.marked(signed(difference), notes), verdict(difference)]


def other_schedules(ours: Sequence[Cell], others: Sequence[Cell]) -> list[str]:
    """Datasets on which two ways of fine-tuning differ in learning rate, warm-up or updates."""
    pairs = zip(ours, others, strict=True)
    return [a.dataset for a, b in pairs if a.schedule and b.schedule and a.schedule != b.schedule]


def signed(difference: Difference, digits: int = 1) -> str:
    """A difference with its sign and its interval."""
    sign = "+" * (difference.estimate.point >= 0)
    return sign + text(difference.estimate, digits)


def verdict(difference: Difference) -> str:
    """Whether the interval leaves 0 out; else how many seeds would settle it."""
    if difference.settled:
        return "higher" if difference.estimate.point > 0 else "lower"
    return "open" if difference.seeds is None else f"open: {difference.seeds:,} seeds"


def text(estimate: Estimate | None, digits: int) -> str:
    """An estimate with its interval."""
    if estimate is None:
        return NOTHING
    point = f"{estimate.point:.{digits}f}"
    if estimate.low is None or estimate.high is None:
        return f"{point} (no spread)"
    return f"{point} ({interval_text((estimate.low, estimate.high), digits)})"
