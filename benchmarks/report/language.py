"""Language runs of a recipe over their seeds: tables, figure, and the files of their scores."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.text import Text

from benchmarks.report.figures import COLOURS, list_names, plot_score, series, style_axes
from benchmarks.report.grid import NOTHING, Grid
from benchmarks.report.names import algorithm_rank
from benchmarks.report.scores import cpu_seconds, interval_over_seeds
from benchmarks.report.tables import interval_text
from benchmarks.results import LANGUAGE, FinishedRun, UnfinishedRun, read_runs, unfinished_runs
from benchmarks.runs import write_json
from benchmarks.statistics import MIN_SEEDS
from iwsft.files import written_whole

SHARES = "Chance of each kind of answer."
# Prefix of the entries of a result that are chances of kinds of answers.
_SHARE = "share_"
_COLOURS = {
    **COLOURS,
    "base": "#8c8c8c",
    "iw-sft-hard": "#e0701c",
    "iw-sft-ema": "#b8341b",
    "iw-sft-q": "#d46aa5",
}
_OTHER = "#2a9d6f"


@dataclass(frozen=True)
class LanguageScore:
    """Score of an algorithm over its seeds.

    Attributes:
        algo: Name of the algorithm.
        seeds: The seeds, in order.
        scores: Score of each seed.
        score: Their mean.
        interval: 95 % interval: over seeds (bootstrap) where there are three or more; of the
            test's items for one seed; None for two.
        score_name: What the score measures.
        steps: Number of updates; 0 for the model before training.
        ess: Effective share of an update's answers, mean over updates; None without training.
        ess_min: Its least value of all updates.
        weight_max: The largest weight.
        cpu_seconds: CPU seconds of a run with its reference.
        shares: Chances of kinds of answers, where the test has them.
    """

    algo: str
    seeds: list[int]
    scores: list[float]
    score: float
    interval: tuple[float, float] | None
    score_name: str
    steps: int
    ess: float | None
    ess_min: float | None
    weight_max: float | None
    cpu_seconds: float
    shares: dict[str, float]


@dataclass(frozen=True)
class Recipe:
    """The runs of one recipe.

    Attributes:
        name: ``variant/recipe`` (see :attr:`FinishedRun.variant`), or the recipe alone.
        runs: The finished runs.
        unfinished: The others.
    """

    name: str
    runs: list[FinishedRun]
    unfinished: list[UnfinishedRun]

    @cached_property
    def groups(self) -> dict[str, list[FinishedRun]]:
        """The finished runs by algorithm, in the order of the algorithms and seeds."""
        groups: dict[str, list[FinishedRun]] = {}
        for run in sorted(self.runs, key=lambda run: run.seed):
            groups.setdefault(run.result["algo"], []).append(run)
        return {algo: groups[algo] for algo in sorted(groups, key=algorithm_rank)}

    @cached_property
    def scores(self) -> list[LanguageScore]:
        """Scores of the algorithms, in their order."""
        return [_score(algo, runs) for algo, runs in self.groups.items()]

    @property
    def note(self) -> str:
        """What the columns of the table of scores mean."""
        return (
            f"Score: {self.scores[0].score_name}, mean over seeds. Intervals (95 %) are over seeds "
            f"(bootstrap) where they are {MIN_SEEDS} or more, of the test's items for one seed. "
            "ESS: effective share of the draws of an update, its mean and least."
        )


def read_recipes(folder: Path) -> list[Recipe]:
    """Read all recipes with runs at or below ``folder``, by path.

    Raises:
        ResultsError: A file is not what a run writes.
    """
    recipes: dict[str, Recipe] = {}
    runs: list[FinishedRun | UnfinishedRun] = [*read_runs(folder, LANGUAGE)]
    runs += unfinished_runs(folder, LANGUAGE)
    for run in sorted(runs, key=lambda run: run.folder):
        name = f"{run.variant}/{run.dataset}".lstrip("/")
        recipe = recipes.setdefault(name, Recipe(name, [], []))
        if isinstance(run, FinishedRun):
            recipe.runs.append(run)
        else:
            recipe.unfinished.append(run)
    return list(recipes.values())


def _score(algo: str, runs: Sequence[FinishedRun]) -> LanguageScore:
    results = [run.result for run in runs]
    first = results[0]
    scores = [float(result["score"]) for result in results]
    trained = [result for result in results if "ESS" in result]
    low, high = first["interval"]
    return LanguageScore(
        algo=algo,
        seeds=[run.seed for run in runs],
        scores=scores,
        score=float(np.mean(scores)),
        interval=(low, high) if len(scores) == 1 else interval_over_seeds(np.array(scores)),
        score_name=first["score_name"],
        steps=first["steps"],
        ess=float(np.mean([result["ESS"] for result in trained])) if trained else None,
        ess_min=min(result["ESS_min"] for result in trained) if trained else None,
        weight_max=max(result["weight_max"] for result in trained) if trained else None,
        cpu_seconds=cpu_seconds(runs),
        shares={
            name.removeprefix(_SHARE): float(np.mean([result[name] for result in results]))
            for name in first
            if name.startswith(_SHARE)
        },
    )


def score_grid(recipe: Recipe) -> Grid:
    """Table of the scores with their intervals, the weights, and the cost."""
    grid = Grid(
        ["algorithm", "seeds", "score", "95 % interval", "updates", "ESS", "least ESS"]
        + ["largest weight", "CPU seconds, with reference"],
        left=1,
    )
    for row in recipe.scores:
        grid.rows.append(
            [
                row.algo,
                str(len(row.seeds)),
                f"{row.score:.3f}",
                interval_text(row.interval, digits=3),
                str(row.steps),
                *map(_number, (row.ess, row.ess_min, row.weight_max)),
                f"{row.cpu_seconds:,.0f}",
            ]
        )
    return grid


def share_grid(recipe: Recipe) -> Grid:
    """Table of the chances of the kinds of answers; without rows where no test has them."""
    kinds = list(dict.fromkeys(kind for row in recipe.scores for kind in row.shares))
    grid = Grid(["algorithm", *kinds], left=1)
    if kinds:
        grid.rows = [
            [r.algo, *(_number(r.shares.get(kind)) for kind in kinds)] for r in recipe.scores
        ]
    return grid


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"


def recipe_table(recipe: Recipe) -> Group:
    """The tables of a recipe for the terminal."""
    parts: list[RenderableType] = [score_grid(recipe).rich(recipe.name)]
    shares = share_grid(recipe)
    if shares.rows:
        parts += [Text(""), shares.rich(SHARES)]
    return Group(*parts, Text(recipe.note, style="dim"))


def write_scores(folder: Path, recipe: Recipe) -> list[Path]:
    """Write ``results.json`` and ``results.png`` of a recipe's runs into ``folder``."""
    numbers, picture = folder / "results.json", folder / "results.png"
    write_json(numbers, {"rows": [asdict(row) for row in recipe.scores]})
    image = io.BytesIO()
    draw_recipe(recipe).savefig(image, format="png", dpi=130)
    with written_whole(picture) as partial:
        partial.write_bytes(image.getvalue())
    return [numbers, picture]


def draw_recipe(recipe: Recipe) -> Figure:
    """Draw the scores of all algorithms, and the weights over the updates."""
    rows = recipe.scores
    figure = Figure(figsize=(13.0, 0.9 + max(3.0, 0.42 * len(rows))), layout="constrained")
    scores, ess, largest = figure.subplots(1, 3)
    for ax in (scores, ess, largest):
        style_axes(ax)
    for y, row in enumerate(rows):
        plot_score(scores, y, row.scores, row.interval, _COLOURS.get(row.algo, _OTHER))
        if not row.steps:
            scores.axvline(row.score, color="0.6", lw=0.8, ls=":")
    list_names(scores, [row.algo for row in rows])
    scores.set_xlabel(rows[0].score_name)
    _curves(ess, recipe, "ESS")
    ess.set_ylim(0, 1.03)
    ess.set_ylabel("effective share of an update's draws")
    _curves(largest, recipe, "weight_max")
    largest.set_yscale("log")
    largest.set_ylabel("largest weight")
    handles, labels = ess.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return figure


def _curves(ax: Axes, recipe: Recipe, name: str) -> None:
    """Plot a metric over the updates that all seeds logged, mean over seeds."""
    for algo, runs in recipe.groups.items():
        steps, values = series(runs, name)
        if len(steps):
            colour = _COLOURS.get(algo, _OTHER)
            ax.plot(steps, values.mean(axis=0), color=colour, lw=1.5, label=algo)
    ax.set_xlabel("update")
