"""The table that the job ends in."""

from __future__ import annotations

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from benchmarks.llm.results import Row
from benchmarks.statistics import MIN_SEEDS

_NOTHING = "-"


def table(recipe: str, rows: list[Row]) -> Group:
    """Scores with their intervals, and what stands behind them; fits 80 columns."""
    parts: list[Table | Text] = [Text(recipe), _scores(rows)]
    shares = list(dict.fromkeys(name for row in rows for name in row.shares))
    if shares:
        parts.append(_shares(rows, shares))
    notes = [
        f"score: {rows[0].score_name}, mean over seeds; 95 %: over seeds (bootstrap) where they "
        f"are {MIN_SEEDS} or more, of the test's items for one.",
        "ESS: effective share of the draws of an update, its mean and least; max w: the largest "
        "weight; CPU s: of a run, its reference and its test included.",
    ]
    return Group(*parts, *map(Text, notes))


def _scores(rows: list[Row]) -> Table:
    found = _empty("seeds", "score", "95 %", "updates", "ESS", "least", "max w", "CPU s")
    for row in rows:
        found.add_row(
            row.algo,
            str(len(row.seeds)),
            f"{row.score:.3f}",
            _NOTHING if row.interval is None else "{:.3f}-{:.3f}".format(*row.interval),
            str(row.steps),
            _number(row.ess),
            _number(row.ess_min),
            _number(row.weight_max),
            f"{row.cpu_seconds:.0f}",
        )
    return found


def _shares(rows: list[Row], names: list[str]) -> Table:
    found = _empty(*names)
    found.title, found.title_justify = "chance of each kind of answer", "left"
    for row in rows:
        found.add_row(row.algo, *(_number(row.shares.get(name)) for name in names))
    return found


def _empty(*columns: str) -> Table:
    found = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("algorithm", *columns):
        found.add_column(name, justify="left" if name == "algorithm" else "right", no_wrap=True)
    return found


def _number(value: float | None) -> str:
    return _NOTHING if value is None else f"{value:.2f}"
