"""Tables of scores and cost, for the terminal (rich) and for the page (markdown)."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks.report import published
from benchmarks.report.aggregates import METRICS, Aggregates
from benchmarks.report.runs import Run
from benchmarks.report.scores import Cell, cells

NOTHING = "-"
_TERMINAL = 80  # characters a line that every terminal has


@dataclass
class Grid:
    """A table as text: one list of cells a row.

    Attributes:
        columns: headings.
        rows: as many cells as there are columns.
        notes: footnotes; note i is marked ``[i + 1]`` in the cells.
        left: the first columns that hold words, not numbers.
    """

    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left: int = 2

    def mark(self, note: str) -> str:
        """The mark of a footnote, which is added where it is new."""
        if note not in self.notes:
            self.notes.append(note)
        return f"[{self.notes.index(note) + 1}]"

    def markdown(self) -> str:
        """The table and its footnotes as GitHub markdown."""
        rule = ["---" if i < self.left else "---:" for i in range(len(self.columns))]
        lines = [f"| {' | '.join(row)} |" for row in (self.columns, rule, *self.rows)]
        lines += ["", *(f"[{i + 1}] {note}  " for i, note in enumerate(self.notes))]
        return "\n".join(lines).rstrip()

    def rich(self, title: str) -> Group:
        """The table for the terminal, with the first column as a heading over its rows."""
        widths = [max(map(cell_len, column)) for column in self._columns()]
        parts: list[RenderableType] = [Text(title, style="bold"), self._rows([], widths)]
        for heading, rows in itertools.groupby(self.rows, key=lambda row: row[0]):
            parts += [Text(heading, style="bold cyan"), self._rows(list(rows), widths)]
        parts += [Text(f"[{i + 1}] {note}", style="dim") for i, note in enumerate(self.notes)]
        return Group(*parts)

    def _columns(self) -> list[list[str]]:
        """What stands in each column but the first, lines of the heading apart."""
        rows = [row[1:] for row in self.rows]
        return [
            [*name.split(", "), *(row[i] for row in rows)]
            for i, name in enumerate(self.columns[1:])
        ]

    def _rows(self, rows: list[list[str]], widths: list[int]) -> Table:
        """The rows below one heading, or the line of column names where there are none."""
        gap = 2 if sum(widths) + 2 * len(widths) <= _TERMINAL else 1
        table = Table(box=None, show_header=not rows, padding=(0, gap, 0, 0))
        for i, (name, width) in enumerate(zip(self.columns[1:], widths, strict=True), start=1):
            table.add_column(
                name.replace(", ", ",\n"),
                justify="left" if i < self.left else "right",
                vertical="bottom",
                width=width,
                no_wrap=True,
            )
        for row in rows:
            table.add_row(*map(Text, row[1:]))
        return table


def score_grid(group: Sequence[Cell]) -> Grid:
    """Scores of the last policies, and the published numbers of the same datasets beside them.

    Mean over seeds; standard deviation and 95 % bootstrap interval only with three seeds or more.
    A published number stands in its own column, and only where the dataset has exactly its name.
    """
    names = {(cell.dataset, cell.algo) for cell in group}
    papers = [table for table in published.tables() if names & table.numbers.keys()]
    grid = Grid(
        ["dataset", "algorithm", "seeds", "episodes", "score", "std", "95 % interval"]
        + [table.label for table in papers]
    )
    for cell in group:
        score = f"{cell.mean:.1f}"
        if cell.unit == "return":
            score += " " + grid.mark("Mean return: the dataset has no D4RL reference scores.")
        interval = cell.interval
        row = [
            cell.dataset,
            cell.algo,
            str(len(cell.runs)),
            "/".join(str(episodes) for episodes in cell.all("episodes")),
            score,
            NOTHING if cell.std is None else f"{cell.std:.1f}",
            NOTHING if interval is None else f"{interval[0]:.1f} to {interval[1]:.1f}",
        ]
        for table in papers:
            number = table.numbers.get((cell.dataset, cell.algo))
            if number is None:
                row.append(NOTHING)
                continue
            text = f"{number.score:.1f}" + (f" ± {number.std:.1f}" if number.std else "")
            marks = "".join(grid.mark(caveat) for caveat in number.caveats)
            row.append(f"{text} {marks}".rstrip())
        grid.rows.append(row)
    grid.notes += [f"{table.label}: {table.note}" for table in papers]
    return grid


def score_table(runs: Sequence[Run]) -> Group:
    """Scores of the last policies for the terminal."""
    return score_grid(cells(runs)).rich("Scores of the last policies (D4RL-normalised)")


def cost_grid(group: Sequence[Cell]) -> Grid:
    """Cost of one run beside its score, mean over seeds; what its reference cost stands apart."""
    seconds = {
        "cpu_seconds": "CPU seconds",
        "wall_seconds": "wall seconds",
        "reference_cpu_seconds": "CPU seconds of its reference",
    }
    grid = Grid(["dataset", "algorithm", "steps", "score", *seconds.values()])
    for cell in group:
        row = [
            cell.dataset,
            cell.algo,
            "/".join(str(steps) for steps in cell.all("steps")),
            f"{cell.mean:.1f}",
        ]
        for key in seconds:
            spent = [run.result[key] for run in cell.runs if key in run.result]
            row.append(f"{sum(spent) / len(spent):,.0f}" if spent else NOTHING)
        grid.rows.append(row)
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
        looked = [[row for row in run.metrics if "weight_q50" in row] for run in cell.runs]
        last = [rows[-1] for rows in looked if rows]
        if not last:
            continue
        values = [[row[name] for row in last if name in row] for name in _WEIGHTS]
        means = [f"{sum(v) / len(v):.4g}" if v else NOTHING for v in values]
        grid.rows.append([cell.dataset, cell.algo, *means])
    return grid


def aggregate_grid(aggregates: Aggregates) -> Grid:
    """rliable's aggregate metrics with their intervals, in units of the D4RL score."""
    grid = Grid(["algorithm", "seeds", *(metric.label for metric in METRICS)], left=1)
    for algo, estimates in aggregates.estimates.items():
        grid.rows.append(
            [algo, str(aggregates.seeds[algo])]
            + [f"{e.point:.1f} ({e.low:.1f} to {e.high:.1f})" for e in estimates]
        )
    return grid
