"""Tables of scores, cost and weights, as text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.console import Group

from benchmarks.report import published, sweep
from benchmarks.report.aggregates import METRICS, Aggregates
from benchmarks.report.grid import NOTHING, Grid
from benchmarks.report.names import algorithm_label, algorithm_rank, dataset_label
from benchmarks.report.scores import Cell, Estimate, cells
from benchmarks.results import FinishedRun, UnfinishedRun
from benchmarks.statistics import MIN_SEEDS, bootstrap_interval

FEW_SEEDS = (
    f"Fewer than {MIN_SEEDS} seeds carry neither a deviation nor an interval: the mean alone."
)

SUCCESS_INTERVAL = "interval of success"


def score_grid(group: Sequence[Cell], missing: Sequence[UnfinishedRun] = ()) -> Grid:
    """Scores of the last policies, and the published numbers of the same datasets beside them.

    Mean over seeds; standard deviation and 95 % bootstrap interval only with three seeds or more.
    A published number stands in its own column, and only where the dataset has exactly its name.
    Algorithms of which no seed is finished have a row without numbers.
    """
    cut_off: dict[tuple[str, str], int] = {}
    for run in missing:
        cut_off[run.dataset, run.algo] = cut_off.get((run.dataset, run.algo), 0) + 1
    by_name = {(cell.dataset, cell.algo): cell for cell in group}
    names = sorted(by_name.keys() | cut_off.keys(), key=lambda n: (n[0], algorithm_rank(n[1])))
    papers = [table for table in published.tables() if table.numbers.keys() & set(names)]
    with_success = any(cell.success_rates.size for cell in group)
    grid = Grid(
        ["dataset", "algorithm", "seeds", "episodes", "score", "std", "95 % interval"]
        + ["success", SUCCESS_INTERVAL] * with_success
        + [table.label for table in papers],
        published=len(papers),
    )
    for name in names:
        row = [dataset_label(name[0]), algorithm_label(name[1])]
        row += _ours(grid, by_name.get(name), cut_off.get(name, 0), with_success)
        for table in papers:
            number = table.numbers.get(name)
            if number is None:
                row.append(NOTHING)
                continue
            text = f"{number.score:.1f}" + (f" ± {number.std:.1f}" if number.std else "")
            row.append(grid.marked(text, list(number.caveats)))
        grid.rows.append(row)
    grid.notes += [f"{table.label}: {table.note}" for table in papers]
    return grid


def _ours(grid: Grid, cell: Cell | None, cut_off: int, with_success: bool) -> list[str]:
    """The columns of what was run here."""
    if cell is None:
        return [f"0 of {cut_off}"] + [NOTHING] * (6 if with_success else 4)
    seeds = str(len(cell.runs)) + (f" of {len(cell.runs) + cut_off}" if cut_off else "")
    notes = shortened(cell)
    if cell.unit == "return":
        notes.append("Mean return: the dataset has no D4RL reference scores.")
    notes += [f"Seeds differ in {difference}." for difference in cell.differences()]
    interval = cell.interval
    row = [
        seeds,
        "/".join(str(episodes) for episodes in cell.all("episodes")),
        grid.marked(f"{cell.mean:.1f}", notes),
        grid.marked(NOTHING, [FEW_SEEDS]) if cell.std is None else f"{cell.std:.1f}",
        NOTHING if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f}",
    ]
    return row + (_success(grid, cell) if with_success else [])


def _success(grid: Grid, cell: Cell) -> list[str]:
    """Share of successful episodes and its interval."""
    rates = cell.success_rates
    if not rates.size:
        return [NOTHING, NOTHING]
    few = f"Success of {len(rates)} of the {len(cell.runs)} seeds: the others did not record it."
    mean = grid.marked(f"{rates.mean():.2f}", [few] if len(rates) < len(cell.runs) else [])
    if len(rates) < MIN_SEEDS:
        return [mean, NOTHING]
    low, high = bootstrap_interval(rates)
    return [mean, f"{low:.2f} to {high:.2f}"]


def shortened(cell: Cell) -> list[str]:
    """Notes on runs of another number of updates than published, such as ``IQL: 20k of 1M``."""
    pairs = {
        (run.result["steps"], run.result["published_steps"])
        for run in cell.runs
        if run.result.get("published_steps") not in (None, run.result["steps"])
    }
    return [
        f"{algorithm_label(cell.algo)}: {_count(steps)} of the published {_count(of)} updates."
        for steps, of in sorted(pairs)
    ]


def _count(n: int) -> str:
    for unit, letter in ((1_000_000, "M"), (1_000, "k")):
        if n >= unit and n * 10 % unit == 0:
            return f"{n / unit:g}{letter}"
    return f"{n:,}"


def score_table(runs: Sequence[FinishedRun]) -> Group:
    """Scores of the last policies for the terminal."""
    grid = score_grid(cells(runs))
    return grid.rich("Scores of the last policies (D4RL-normalised)", SUCCESS_INTERVAL)


def missing_grid(missing: Sequence[UnfinishedRun]) -> Grid:
    """Runs without a result, and how far they came."""
    grid = Grid(["dataset", "algorithm", "seed", "last logged update", "of"])
    for run in missing:
        of = NOTHING if run.steps is None else str(run.steps)
        names = [dataset_label(run.dataset), algorithm_label(run.algo)]
        grid.rows.append([*names, str(run.seed), str(run.step), of])
    return grid


# Key of result.json -> heading.
_SECONDS = {
    "cpu_seconds": "CPU seconds",
    "evaluation_cpu_seconds": "of them evaluation",
    "reference_cpu_seconds": "reference",
    "wall_seconds": "wall seconds",
}


def cost_grid(group: Sequence[Cell]) -> Grid:
    """Cost of one run beside its score, mean over seeds; what its reference cost stands apart.

    CPU seconds are of training and evaluation; evaluation alone where the results say it.
    """
    known = [key for key in _SECONDS if any(key in run.result for c in group for run in c.runs)]
    grid = Grid(
        ["dataset", "algorithm", "updates", "score", *(_SECONDS[key] for key in known)]
        + ["CPU seconds, with reference"]
    )
    for cell in group:
        steps = "/".join(str(steps) for steps in cell.all("steps"))
        row = [
            dataset_label(cell.dataset),
            algorithm_label(cell.algo),
            grid.marked(steps, shortened(cell)),
            f"{cell.mean:.1f}",
        ]
        for key in known:
            spent = [run.result[key] for run in cell.runs if key in run.result]
            row.append(f"{sum(spent) / len(spent):,.0f}" if spent else NOTHING)
        grid.rows.append([*row, f"{cell.cpu_seconds:,.0f}"])
    return grid


# Metric of a row of metrics.jsonl -> heading.
_WEIGHTS = {
    "ESS": "ESS",
    "weight_q05": "weight, 5 %",
    "weight_q50": "50 %",
    "weight_q95": "95 %",
    "pareto_k": "Pareto k-hat",
    "weighted_return": "mean return under the weights",
}


def weight_grid(group: Sequence[Cell]) -> Grid:
    """What the weights were when they were last looked at: means over the seeds that say so."""
    grid = Grid(["dataset", "algorithm", *_WEIGHTS.values()])
    for cell in group:
        if sweep.last_look(cell, "weight_q50"):
            names = [dataset_label(cell.dataset), algorithm_label(cell.algo)]
            grid.rows.append([*names, *(_last(cell, metric) for metric in _WEIGHTS)])
    return grid


def sweep_grid(rows: Sequence[tuple[sweep.Setting | None, Cell]]) -> Grid:
    """One row a setting of the weights: what they were at the end, and the score."""
    grid = Grid(
        ["dataset", "algorithm", "temperature k", "target ESS", "q follows", "seeds", "score"]
        + ["95 % interval", "ESS", "mean return under the weights"],
    )
    for held, cell in rows:
        interval = cell.interval
        few = [FEW_SEEDS] if interval is None else []
        grid.rows.append(
            [
                dataset_label(cell.dataset),
                algorithm_label(cell.algo),
                f"{held.temperature:g}" if held and held.temperature else NOTHING,
                f"{held.target_ess:g}" if held and held.target_ess else NOTHING,
                held.lag if held else "all weights 1",
                str(len(cell.runs)),
                f"{cell.mean:.1f}",
                grid.marked(NOTHING, few)
                if interval is None
                else f"{interval[0]:.1f} to {interval[1]:.1f}",
                _last(cell, "ESS"),
                _last(cell, "weighted_return"),
            ]
        )
    return grid


def _last(cell: Cell, metric: str) -> str:
    values = sweep.last_look(cell, metric)
    return f"{np.mean(values):.4g}" if values else NOTHING


def aggregate_grid(aggregates: Aggregates) -> Grid:
    """rliable's aggregate metrics with their intervals, in units of the D4RL score."""
    grid = Grid(["algorithm", "seeds", *(metric.label for metric in METRICS)], left=1)
    for algo, estimates in aggregates.estimates.items():
        grid.rows.append(
            [algorithm_label(algo), str(aggregates.seeds[algo])]
            + [f"{e.point:.1f} ({e.low:.1f} to {e.high:.1f})" for e in estimates]
        )
    return grid


def improvement_grid(aggregates: Aggregates) -> Grid:
    """Probability that a run of each candidate scores higher than a run of the row's algorithm."""
    candidates = list(aggregates.improvement)
    grid = Grid(
        ["against", *(f"P({algorithm_label(name)} scores higher)" for name in candidates)], left=1
    )
    for algo in aggregates.estimates:
        found = [aggregates.improvement[candidate].get(algo) for candidate in candidates]
        if any(found):
            grid.rows.append([algorithm_label(algo), *map(_probability, found)])
    return grid


def _probability(estimate: Estimate | None) -> str:
    if estimate is None:
        return NOTHING
    return f"{estimate.point:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"
