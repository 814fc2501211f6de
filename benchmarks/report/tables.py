"""Tables of control runs: scores and published numbers."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Group

from benchmarks.report import scores
from benchmarks.report.document import NOTHING, Grid, interval_text
from benchmarks.report.scores import Cell
from benchmarks.results import RecordedRun
from benchmarks.statistics import MIN_SEEDS

FEW_SEEDS = (
    f"Fewer than {MIN_SEEDS} seeds carry neither a deviation nor an interval: the mean alone."
)
_UNDER_TRAINED = f"Under-trained: {scores.UNDER_TRAINED}; never the best, and in no comparison."
_TIE = "The highest, but a tie: no interval of the difference to the next one leaves 0 out."
_NO_INTERVAL = f"The highest, perhaps by chance: fewer than {MIN_SEEDS} seeds have no interval."
_MOVING = "Not levelled off: score or Q still changes over the last third of the updates."
_RETURN = "Mean return: the dataset has no D4RL reference scores."
# Parts of a schedule, in words.
_SCHEDULE = {"lr": "learning rate", "warmup": "warm-up", "steps": "updates"}
# An effective sample size with which a few trajectories decide.
_LOW_ESS = 0.1
EQUAL_SEEDS = "All seeds have the same value: no interval follows from it."
SUCCESS_INTERVAL, CPU_SECONDS = "interval of success", "CPU seconds, with reference"


class PublishedTable(NamedTuple):
    """A table of the paper; by dataset and algorithm it has ``score``, ``std`` and ``caveats``."""

    label: str
    note: str
    numbers: dict[tuple[str, str], dict[str, Any]]


@functools.cache
def published_scores() -> tuple[str, list[PublishedTable]]:
    """The paper's reference and its tables, from ``benchmarks/published.json``."""
    data = json.loads((Path(__file__).parents[1] / "published.json").read_text())
    tables = {
        name: PublishedTable(table["label"], table["note"], {})
        for name, table in data["tables"].items()
    }
    for row in data["rows"]:
        row["caveats"] = [data["caveats"][caveat] for caveat in row["caveats"]]
        tables[row["table"]].numbers[row["dataset"], row["algo"]] = row
    return data["source"], list(tables.values())


def score_table(runs: Sequence[RecordedRun]) -> Group:
    """Table of the scores of the last policies, for the terminal."""
    group = scores.cells(runs)
    title = f"Last scores, {unit(group)}"
    return score_grid(group).rich(title, (SUCCESS_INTERVAL, CPU_SECONDS))


def unit(group: Sequence[Cell]) -> str:
    """What the scores of a table are, for its title; a note marks returns beside other scores."""
    alone = all(cell.score_key == scores.RETURN for cell in group)
    return "mean returns" if alone else "D4RL-normalised unless marked"


def score_grid(group: Sequence[Cell], missing: Sequence[RecordedRun] = ()) -> Grid:
    """Table of the scores of the last policies and the published numbers of the same datasets.

    Mean over seeds; standard deviation and 95 % interval only with three seeds or more.
    A published number has its own column, and is shown only where the dataset has exactly its
    name. Algorithms of which no seed is finished have a row without numbers.
    """
    cut_off = Counter((run.dataset, run.algo) for run in missing if not run.is_copy)
    by_name = {(cell.dataset, cell.algo): cell for cell in group}
    names = sorted(
        by_name.keys() | cut_off.keys(), key=lambda n: (n[0], scores.algorithm_rank(n[1]))
    )
    papers = [table for table in published_scores()[1] if table.numbers.keys() & set(names)]
    columns = ["dataset", "algorithm", "seeds", "episodes", "score", "std", "95 % interval"]
    columns += ["success", SUCCESS_INTERVAL, CPU_SECONDS]
    grid = Grid(columns + [table.label for table in papers], published=len(papers))
    for name in names:
        row = [scores.dataset_label(name[0]), scores.algorithm_label(name[1])]
        if name in by_name:
            cell = by_name[name]
            apart = _schedule_apart(cell, group)
            row += [*_measured(grid, cell, cut_off[name], apart), f"{cell.cpu_seconds:,.0f}"]
        else:
            row += [f"0 of {cut_off[name]}"] + [NOTHING] * (len(columns) - 3)
        for number in (table.numbers.get(name) for table in papers):
            if number is None:
                row.append(NOTHING)
            else:
                deviation = f" ± {number['std']:.1f}" if "std" in number else ""
                row.append(grid.marked(f"{number['score']:.1f}{deviation}", number["caveats"]))
        grid.rows.append(row)
    grid.notes += [f"{table.label}: {table.note}" for table in papers]
    return grid


def matrix_grid(group: Sequence[Cell]) -> Grid:
    """Table of the mean scores, algorithms by datasets, with the highest of each dataset in bold.

    Under-trained cells are marked and never in bold.
    """
    names, tasks = scores.algorithms(group), scores.datasets(group)
    grid = Grid(["algorithm", *map(scores.dataset_label, tasks)], left=1)
    by_name = {(cell.dataset, cell.algo): cell for cell in group}
    fair = [[c for c in group if c.dataset == task and not c.under_trained] for task in tasks]
    ranks = [sorted(cells, key=lambda cell: -cell.mean) for cells in fair if len(cells) > 1]
    highest = {(a.dataset, a.algo): _leads(a, b) for a, b, *_ in ranks}
    for name in names:
        row = [scores.algorithm_label(name)]
        for task in tasks:
            cell = by_name.get((task, name))
            notes = [_UNDER_TRAINED] if cell and cell.under_trained else []
            notes += [_MOVING] if cell and cell.moving else []
            if cell and cell.score_key == scores.RETURN:
                notes.append(_RETURN)
            if cell and cell.note:
                notes.append(cell.note)
            notes += _schedule_apart(cell, group) if cell else []
            if (task, name) in highest:
                grid.bold.add((len(grid.rows), len(row)))
                notes += highest[task, name]
            row.append(NOTHING if cell is None else grid.marked(f"{cell.mean:.1f}", notes))
        grid.rows.append(row)
    return grid


def _leads(highest: Cell, following: Cell) -> list[str]:
    """A note that the highest cell may not be the best; empty if its lead is settled."""
    if scores.compare([highest], [following]) is None:
        return [_NO_INTERVAL]
    return [] if scores.is_higher([highest], [following]) else [_TIE]


def _measured(grid: Grid, cell: Cell, cut_off: int, apart: list[str]) -> list[str]:
    """Seeds, episodes, score, deviation and interval; share of successful episodes and interval."""
    count = len(cell.runs)
    equal = count >= MIN_SEEDS and cell.interval is None
    notes = _shortened(cell)
    notes += [
        f"Not levelled off: {name} changes by {interval_text(ends)} over the last third."
        for name, ends in cell.moving.items()
    ]
    notes += _few_decide(cell)
    if cell.score_key == scores.RETURN:
        notes.append(_RETURN)
    notes += cell.differences()
    notes += [cell.note] if cell.note else []
    notes += apart
    row = [
        f"{count} of {count + cut_off}" if cut_off else str(count),
        "/".join(dict.fromkeys(str(run.result.get("episodes")) for run in cell.runs)),
        grid.marked(f"{cell.mean:.1f}", notes),
        grid.marked(NOTHING, [FEW_SEEDS]) if cell.std is None else f"{cell.std:.1f}",
        grid.marked(interval_text(cell.interval), [EQUAL_SEEDS] * equal),
    ]
    rates = cell.success_rates
    if not rates.size:
        return [*row, NOTHING, NOTHING]
    few = f"Success of {len(rates)} of the {count} seeds: the others did not record it."
    mean = grid.marked(f"{rates.mean():.2f}", [few] if len(rates) < count else [])
    interval = scores.interval_over_seeds(rates, 0.0, 1.0)
    same = len(rates) >= MIN_SEEDS and interval is None
    return [*row, mean, grid.marked(interval_text(interval, digits=2), [EQUAL_SEEDS] * same)]


def _schedule_apart(cell: Cell, group: Sequence[Cell]) -> list[str]:
    """A note where not all fine-tuning on a dataset has this cell's learning rate and updates."""
    others = [each.schedule for each in group if each.dataset == cell.dataset and each.schedule]
    differ = [
        f"{_SCHEDULE[name]} {value:,g}"
        for name, value in cell.schedule.items()
        if any(other.get(name) != value for other in others)
    ]
    if not differ:
        return []
    return [
        f"Fine-tuned with {', '.join(differ)}, unlike others here: not all of a difference to "
        "those is that of the weights (--temperature 0 runs without weights)."
    ]


def _few_decide(cell: Cell) -> list[str]:
    """A note on runs whose effective sample size ends low; empty without such runs."""
    last = [[row["ESS"] for row in run.metrics if "ESS" in row][-1:] for run in cell.runs]
    low = sorted(ess for each in last for ess in each if ess < _LOW_ESS)
    if not low:
        return []
    ends = " to ".join(dict.fromkeys(f"{ess:.2g}" for ess in (low[0], low[-1])))
    where = f"in {len(low)} of {len(cell.runs)} runs the ESS ends at {ends}"
    return [f"A few trajectories decide: {where}."]


def _shortened(cell: Cell) -> list[str]:
    """Notes on runs that made another number of updates than published ones."""
    pairs = {(run.result["steps"], scores.published_steps(run)) for run in cell.runs}
    short = " Under-trained: left out of aggregates." if cell.under_trained else ""
    return [
        f"{steps:,} of the {of:,} updates of the published settings.{short}"
        for steps, of in sorted(pairs)
        if steps != of
    ]
