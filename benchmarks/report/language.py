"""Language runs of a recipe over their seeds: tables, figure, and the files of their scores."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from rich.console import Group
from rich.text import Text

from benchmarks.report import figures
from benchmarks.report.document import NOTHING, Grid, interval_text
from benchmarks.report.scores import Cell, base, cells
from benchmarks.results import LANGUAGE, RecordedRun, read_runs, unfinished_runs
from benchmarks.runs import write_json
from benchmarks.statistics import MIN_SEEDS
from iwsft.files import written_whole

SHARES = "Chance of each kind of answer."
# Prefix of the entries of a result that are chances of kinds of answers.
_SHARE = "share_"
_COLOURS = {
    **figures.COLOURS,
    "base": "#8c8c8c",
    "iw-sft-hard": "#e0701c",
    "iw-sft-ema": "#b8341b",
    "iw-sft-q": "#d46aa5",
}
_OTHER = "#2a9d6f"


@dataclass(frozen=True)
class RecipeRuns:
    """The runs of one recipe; its name is ``variant/recipe``, or the recipe alone."""

    name: str
    runs: list[RecordedRun]
    unfinished: list[RecordedRun]

    @cached_property
    def scores(self) -> list[Cell]:
        """The finished runs by algorithm."""
        return cells(self.runs, "score")

    @property
    def note(self) -> str:
        """What the columns of the table of scores mean."""
        return (
            f"Score: {_first(self.scores[0], 'score_name')}, mean over seeds. Intervals (95 %) are "
            f"over seeds (Student's t) where they are {MIN_SEEDS} or more, of the test's items for "
            "one seed. ESS: effective share of the draws of an update, its mean and least."
        )


def read_recipes(folder: Path) -> list[RecipeRuns]:
    """Read all recipes with runs at or below ``folder``, by path."""
    recipes: dict[str, RecipeRuns] = {}
    runs = [*read_runs(folder, LANGUAGE), *unfinished_runs(folder, LANGUAGE)]
    for run in sorted(runs, key=lambda run: run.folder):
        name = f"{run.variant}/{run.dataset}".lstrip("/")
        recipe = recipes.setdefault(name, RecipeRuns(name, [], []))
        (recipe.runs if run.result else recipe.unfinished).append(run)
    return list(recipes.values())


def _first(cell: Cell, key: str) -> Any:
    """An entry of the first seed's result, which the other seeds share."""
    return cell.runs[0].result[key]


def _weights(cell: Cell) -> tuple[float | None, float | None, float | None]:
    """Mean and least ESS, and the largest weight, over all updates; None without training."""
    trained = [run.result for run in cell.runs if "ESS" in run.result]
    if not trained:
        return None, None, None
    ess = float(np.mean([row["ESS"] for row in trained]))
    least = min(row["ESS_min"] for row in trained)
    return ess, least, max(row["weight_max"] for row in trained)


def _shares(cell: Cell) -> dict[str, float]:
    """Chances of kinds of answers, where the test has them; means over seeds."""
    return {
        name.removeprefix(_SHARE): float(np.mean([run.result[name] for run in cell.runs]))
        for name in cell.runs[0].result
        if name.startswith(_SHARE)
    }


def recipe_grid(recipe: RecipeRuns) -> Grid:
    """Table of the scores with their intervals, the weights, and the cost."""
    grid = Grid(
        ["algorithm", "seeds", "score", "95 % interval", "updates", "ESS", "least ESS"]
        + ["largest weight", "CPU seconds, with reference"],
        left=1,
    )
    for cell in recipe.scores:
        score, interval = f"{cell.mean:.3f}", interval_text(cell.interval, digits=3)
        grid.rows.append(
            [base(cell.algo), str(len(cell.runs)), score, interval, str(_first(cell, "steps"))]
            + [*map(_number, _weights(cell)), f"{cell.cpu_seconds:,.0f}"]
        )
    return grid


def share_grid(recipe: RecipeRuns) -> Grid:
    """Table of the chances of the kinds of answers; without rows where no test has them."""
    shares = {base(cell.algo): _shares(cell) for cell in recipe.scores}
    kinds = list(dict.fromkeys(kind for row in shares.values() for kind in row))
    rows = [[algo, *(_number(row.get(kind)) for kind in kinds)] for algo, row in shares.items()]
    return Grid(["algorithm", *kinds], rows if kinds else [], left=1)


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def recipe_table(recipe: RecipeRuns) -> Group:
    """The tables of a recipe for the terminal."""
    scores, shares = recipe_grid(recipe).rich(recipe.name), share_grid(recipe)
    more = (Text(""), shares.rich(SHARES)) if shares.rows else ()
    return Group(scores, *more, Text(recipe.note, style="dim"))


def write_scores(folder: Path, recipe: RecipeRuns) -> list[Path]:
    """Write ``results.json`` and ``results.png`` of a recipe's runs into ``folder``."""
    rows = []
    for cell in recipe.scores:
        row: dict[str, Any] = {
            "algo": base(cell.algo),
            "seeds": cell.seeds,
            "scores": cell.values.tolist(),
            "score": cell.mean,
            "interval": cell.interval,
        }
        row |= {key: _first(cell, key) for key in ("score_name", "steps")}
        row |= zip(("ess", "ess_min", "weight_max"), _weights(cell), strict=True)
        rows.append(row | {"cpu_seconds": cell.cpu_seconds, "shares": _shares(cell)})
    numbers, picture = folder / "results.json", folder / "results.png"
    write_json(numbers, {"rows": rows})
    with written_whole(picture) as partial:
        draw_recipe(recipe).savefig(partial, format="png", dpi=130)
    return [numbers, picture]


def draw_recipe(recipe: RecipeRuns) -> Figure:
    """Draw the scores of all algorithms, and the weights over the updates, mean over seeds."""
    rows = recipe.scores
    figure, axes = figures.make_axes(1, 3, (13.0, 0.9 + max(3.0, 0.42 * len(rows))))
    scores, ess, largest = axes.flat
    for y, cell in enumerate(rows):
        colour = _COLOURS.get(base(cell.algo), _OTHER)
        figures.plot_score(scores, y, cell, colour)
        if not _first(cell, "steps"):
            scores.axvline(cell.mean, color="0.6", lw=0.8, ls=":")
        for ax, metric in ((ess, "ESS"), (largest, "weight_max")):
            steps, values = figures.series(cell.runs, metric)
            if len(steps):
                label = figures.literal(base(cell.algo))
                ax.plot(steps, values.mean(axis=0), color=colour, lw=1.5, label=label)
    figures.list_names(scores, [base(cell.algo) for cell in rows])
    scores.set_xlabel(figures.literal(_first(rows[0], "score_name")))
    ess.set(xlabel="update", ylim=(0, 1.03), ylabel="effective share of an update's draws")
    largest.set(xlabel="update", yscale="log", ylabel="largest weight")
    handles, _ = ess.get_legend_handles_labels()
    if handles:
        figures.add_legend(figure, handles, most=len(handles))
    return figure
