"""Language runs of a recipe over their seeds: tables and figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group
from rich.text import Text

from benchmarks.report import figures
from benchmarks.report.aggregates import signed, verdict
from benchmarks.report.changes import change_line
from benchmarks.report.document import INK, NOTHING, Grid, interval_text, number_text
from benchmarks.report.figures import Panels
from benchmarks.report.scores import (
    Cell,
    algorithm_colour,
    algorithm_label,
    base,
    cells,
    compare,
    is_higher,
    runs_of,
    short,
)
from benchmarks.report.tables import published_scores
from benchmarks.results import LANGUAGE, RecordedRun, read_all
from benchmarks.statistics import MIN_SEEDS
from iwsft import checkpoint

SHARES = (
    "Chance of each kind of answer: a careful one is mostly right, a hasty one half of the time, "
    "and a guess rarely."
)
_LESS_SFT = (
    "Learning rates, scores less that of SFT with 95 % intervals, and CPU seconds of training and "
    "reference, in those of SFT."
)
# Prefix of the entries of a result that are chances of kinds of answers.
_SHARE = "share_"
# Settings of an evaluation that each model has of its own, and one that has its own column.
_OF_MODEL, _SHOWN = ("model", "prompts", "stop"), ("n",)


@dataclass(frozen=True)
class RecipeRuns:
    """The finished runs of one recipe by algorithm, and the others.

    Its name is ``variant/recipe``, or the recipe alone.
    """

    name: str
    scores: list[Cell]
    unfinished: list[RecordedRun]

    @property
    def note(self) -> str:
        """What the columns of the table of scores mean."""
        notes = " ".join(dict.fromkeys(cell.note for cell in self.scores if cell.note))
        return (
            f"Score: {_first(self.scores[0], 'score_name')}, mean over seeds. Intervals (95 %) are "
            f"over seeds (Student's t) where they are {MIN_SEEDS} or more, of the test's items for "
            "one seed. ESS: effective share of the draws of an update, its mean and least. "
        ) + notes


def read_recipes(folder: Path) -> list[RecipeRuns]:
    """Read all recipes with runs at or below ``folder``, by path.

    Runs of a recipe that were not tested alike are of two recipes.
    """
    finished, others = read_all(folder, LANGUAGE)
    scores = cells(finished, "score")
    names = {cell.dataset for cell in scores} | {run.dataset for run in others}
    recipes = {name: RecipeRuns(name, [], []) for name in sorted(names)}
    for cell in scores:
        recipes[cell.dataset].scores.append(cell)
    for run in others:
        recipes[run.dataset].unfinished.append(run)
    return [*recipes.values()]


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
        mean = grid.marked(f"{cell.mean:.3f}", [*cell.differences()])
        row = [algorithm_label(cell.algo), str(len(cell.runs)), mean]
        row += [interval_text(cell.interval, digits=3), str(_first(cell, "steps"))]
        row += map(number_text, _weights(cell))
        grid.rows.append([*row, f"{cell.cpu_seconds:,.0f}"])
    return grid


def difference_grid(recipe: RecipeRuns) -> Grid:
    """Table of differences to SFT and of the cost; without rows where SFT has too few seeds."""
    grid = Grid(["algorithm", "learning rate", "less SFT", "verdict", "cost"], left=1)
    by_name = {cell.algo: cell for cell in recipe.scores}
    for name, cell in by_name.items():
        sft = by_name.get("sft", cell)
        difference = compare([cell], [sft])
        if cell is sft or difference is None:
            continue
        training = cell.runs[0].config.get("settings", {}).get("training", {})
        rate = number_text(training.get("learning_rate"), "g")
        cost = number_text(training_seconds(cell) / training_seconds(sft))
        row = [algorithm_label(name), rate, signed(difference, 3), verdict(difference), cost]
        grid.rows.append(row)
    return grid


def training_seconds(cell: Cell) -> float:
    """CPU seconds of training and reference, mean over seeds."""
    tests = [run.result.get("evaluation_cpu_seconds", 0.0) for run in cell.runs]
    return cell.cpu_seconds - float(np.mean(tests))


def summary(recipe: RecipeRuns) -> str:
    """The highest algorithms of a recipe, and whether the first is the best."""
    best = sorted(recipe.scores, key=lambda cell: -cell.mean)[:2]
    plain = [cell for cell in recipe.scores if not _first(cell, "steps") and cell not in best]
    words = {}
    for cell in [*best, *plain]:
        interval = "" if cell.interval is None else f" ({interval_text(cell.interval, digits=3)})"
        words[cell.algo] = f"{algorithm_label(cell.algo)} {cell.mean:.3f}{interval}"
    runs = sum(len(cell.runs) for cell in recipe.scores)
    apart = len(best) > 1 and is_higher(best[:1], best[1:])
    order = "Best" if apart else "Highest, but the difference of the first to the next may be 0"
    score, ranks = _first(recipe.scores[0], "score_name"), [words.pop(cell.algo) for cell in best]
    rest = "".join(f"; untrained: {each}" for each in words.values())
    return f"{runs} runs. {order}, by {score} (95 % interval): {', then '.join(ranks)}{rest}."


def changes(recipe: RecipeRuns) -> list[str]:
    """How training changed the log-likelihood of a test that has it by prompt, a line for a run."""
    results = [run.result for run in runs_of(recipe.scores)]
    untrained = next((result for result in results if not result["steps"]), None)
    lines = [change_line(result, untrained) for result in results if result["steps"]]
    return [line for line in lines if line is not None]


def share_grid(recipe: RecipeRuns) -> Grid:
    """Table of the chances of the kinds of answers; without rows where no test has them."""
    shares = {algorithm_label(cell.algo): _shares(cell) for cell in recipe.scores}
    kinds = list(dict.fromkeys(kind for row in shares.values() for kind in row))
    rows = [[algo, *(number_text(row.get(kind)) for kind in kinds)] for algo, row in shares.items()]
    return Grid(["algorithm", *kinds], rows if kinds else [], left=1)


def grids(recipe: RecipeRuns) -> dict[str, Grid]:
    """The tables of a recipe that have rows, by title."""
    every = {f"Scores of {recipe.name}.": recipe_grid(recipe)}
    every |= {_LESS_SFT: difference_grid(recipe), SHARES: share_grid(recipe)}
    return {title: grid for title, grid in every.items() if grid.rows}


def recipe_table(recipe: RecipeRuns) -> Group:
    """The tables of a recipe for the terminal."""
    parts = [part for title, grid in grids(recipe).items() for part in (grid.rich(title), Text(""))]
    return Group(*parts, Text(recipe.note, style="dim"))


def draw_recipe(recipe: RecipeRuns) -> Panels:
    """Draw the scores of all algorithms, and the weights over the updates, mean over seeds."""
    rows = recipe.scores
    scores = figures.make_panel("", 0.8 + 0.3 * len(rows))
    trained = [cell for cell in rows if _first(cell, "steps")]
    colour = {cell.algo: algorithm_colour(base(cell.algo)) for cell in rows}
    shown = {cell.algo: colour[cell.algo] for cell in trained}
    for y, cell in enumerate(rows):
        figures.plot_score(scores, y, cell, colour[cell.algo])
        if cell not in trained:
            scores.axvline(cell.mean, color=INK, alpha=0.5, lw=0.8, ls=":")
    figures.list_names(scores, [algorithm_label(cell.algo) for cell in rows])
    scores.set_xlabel(figures.literal(_first(rows[0], "score_name")))
    panels = {"score": scores}
    labels = {"ESS": "effective sample size (share of the draws)", "weight_max": "largest weight"}
    for metric, label in labels.items():
        ax = panels[metric] = figures.make_panel("", 2.5, shown)
        for cell in trained:
            steps, values = figures.series(cell.runs, metric)
            if len(steps):
                ax.plot(steps, values.mean(axis=0), color=colour[cell.algo], lw=1.4)
        ax.set(xlabel="update", ylabel=label)
    panels["ESS"].set_ylim(0, 1.03)
    figures.scale_log(panels["weight_max"], "y")
    return figures.finish(panels)


def evaluation_grid(evaluations: Sequence[dict[str, Any]]) -> Grid:
    """Table of the shares of right answers of models on tasks, in percent.

    ``tokens`` are those of an answer, mean; ``cut off`` is the share of answers without an end. A
    model's name is followed by the settings in which the rows of a task differ.
    """
    names = ("model", "task", "questions", "answers", "avg", "95 % interval", "maj", "pass")
    grid = Grid([*names, "tokens", "cut off"])
    whole = [result for result in evaluations if "damage" not in result]
    models = _short_names([result["model"] for result in whole])
    for result in whole:
        n, interval = result["n"], interval_text(tuple(result["avg_interval"]))
        name = models[result["model"]] + _apart(result, whole)
        row = [name, result["title"], str(result["questions"]), str(n)]
        row += [f"{result['avg']:.1f}", interval]
        row += (
            [NOTHING] * 2
            if n == 1
            else [
                f"{each:.1f}"
                for each in (result["maj"], result["pass_at"].get(str(n), result["avg"]))
            ]
        )
        cut_off = result.get("unfinished")
        share = None if cut_off is None else cut_off / (result["questions"] * n)
        row += [number_text(result.get("tokens_mean"), ".0f"), number_text(share, ".0%")]
        grid.rows.append(row)
    return grid


def _apart(result: dict[str, Any], others: Sequence[dict[str, Any]]) -> str:
    """The settings of an evaluation that others of its task do not share, in brackets."""
    own = result.get("settings", {})
    differ = []
    for name in own:
        rivals = [
            other.get("settings", {}).get(name, own[name])
            for other in others
            if other["task"] == result["task"]
            and (name not in _OF_MODEL or other["model"] == result["model"])
        ]
        if name not in _SHOWN and any(rival != own[name] for rival in rivals):
            differ.append(f"{name} {short(own[name])}")
    return f" ({', '.join(differ)})" if differ else ""


def _short_names(models: Sequence[str]) -> dict[str, str]:
    """The end of each model's path, long enough that no two models have the same.

    That of a run's model has recipe, algorithm and seed.
    """
    parts = {model: Path(model).parts for model in models}
    for model, (*above, last) in parts.items():
        if above and last == checkpoint.FOLDER:
            parts[model] = (*above[:-3], "/".join(above[-3:]))
    for size in range(1, max(map(len, parts.values()), default=0) + 1):
        names = {model: "/".join(own[-size:]) for model, own in parts.items()}
        if len({*names.values()}) == len(parts):
            return names
    return {model: model for model in models}


def published_grid(evaluations: Sequence[dict[str, Any]]) -> tuple[Grid, str]:
    """Table of the paper's numbers on the tasks of the evaluations, and its note."""
    (table,) = (t for t in published_scores()[1] if t.label == "paper, Table 1")
    known = {task for task, _ in table.numbers}
    tasks = {e["task"]: e["title"] for e in evaluations if e.get("task") in known}
    grid = Grid(["model", *tasks.values()], left=1, published=len(tasks))
    for model in dict.fromkeys(name for _, name in table.numbers) if tasks else ():
        numbers = [table.numbers.get((task, model)) for task in tasks]
        notes = [note for number in numbers if number for note in number["caveats"]]
        cells = [NOTHING if number is None else f"{number['score']:.1f}" for number in numbers]
        grid.rows.append([grid.marked(model, list(dict.fromkeys(notes))), *cells])
    return grid, f"{table.label}: {table.note} {published_scores()[0]}."
