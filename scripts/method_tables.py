"""Tables of docs/methods.md, from the numbers of ``benchmarks.bandit`` and the runs of a report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.llm.options import BASE
from benchmarks.report.aggregates import signed
from benchmarks.report.document import NOTHING, Grid, interval_text
from benchmarks.report.language import (
    RecipeRuns,
    difference_grid,
    read_recipes,
    recipe_grid,
    share_grid,
    training_seconds,
)
from benchmarks.report.scores import Cell, algorithm_label, algorithm_rank, base
from benchmarks.statistics import difference
from scripts.control_tables import mean_text

_BANDIT = "methods-bandit"


def method_grid(name: str, results: Path) -> Grid:
    """The table of a file of records of methods."""
    if name == f"{_BANDIT}.json":
        files = [results / f"{_BANDIT}{end}.json" for end in ("", "-quarter")]
        return bandit_grid(*(json.loads(file.read_text())["algorithms"] for file in files))
    if name.startswith("arithmetic_bases"):
        return base_grid(read_recipes(results / name))
    (recipe,) = (r for r in read_recipes(results / name) if "/" not in r.name)
    return gsm8k_grid(recipe) if recipe.name == "gsm8k" else arithmetic_grid(recipe)


def bandit_grid(*numbers: Mapping[str, Mapping[str, Any]]) -> Grid:
    """Mean rewards of the last policies and their ESS, with P(right) of 1/2 and of 1/4."""
    rewards = [f"mean reward, P(right) = {share}" for share in ("1/2", "1/4")]
    grid = Grid(["method", rewards[0], "ESS", rewards[1], "ESS"], left=1)
    for algo in sorted(numbers[0], key=algorithm_rank):
        row = [algorithm_label(algo)]
        for each in numbers:
            row += [_over(each[algo]["mean_reward"]), f"{np.mean(each[algo]['ESS']):.2f}"]
        grid.rows.append(row)
    return grid


def arithmetic_grid(recipe: RecipeRuns) -> Grid:
    """Exact match, its difference to SFT, and the chances of the ways to solve a problem."""
    scores, differences, shares = (
        _by_method(grid)
        for grid in (recipe_grid(recipe), difference_grid(recipe), share_grid(recipe))
    )
    kinds = list(next(iter(shares.values())))
    columns = ["learning rate", "exact match", "less SFT", "greedy", "ESS", "cost", *kinds]
    grid = Grid(["method", *columns], left=1)
    for cell in recipe.scores:
        name = algorithm_label(cell.algo)
        own, against = scores[name], differences.get(name, {})
        greedy = [run.result["greedy"] for run in cell.runs]
        interval = cell.runs[0].result["greedy_interval"]
        row = [name, _rate(cell), f"{own['score']} ({own['95 % interval']})"]
        row += [against.get("less SFT", NOTHING), _over(greedy, interval), own["ESS"]]
        row += [against.get("cost", NOTHING), *(shares[name][kind] for kind in kinds)]
        grid.rows.append(row)
    return grid


def base_grid(recipes: Sequence[RecipeRuns]) -> Grid:
    """Exact match of training from several base models less that of SFT, and what explains it.

    A recipe holds the runs of one base model. Differences to SFT are paired by seed; those of the
    last row are between means over seeds, with the interval over base models. The last columns are
    how often answers of a way are right, means over seeds.
    """
    by_algo = [{base(cell.algo): cell for cell in recipe.scores} for recipe in recipes]
    weighted = [algo for algo in by_algo[0] if algo not in (BASE, "sft")]
    differences = [(algo, "score") for algo in weighted] + [("iw-sft", "greedy")]
    shares = [(BASE, "hasty"), ("sft", "hasty"), ("sft", "careful"), ("iw-sft", "careful")]
    columns = [
        f"{'greedy, ' if key == 'greedy' else ''}{algorithm_label(algo)} less SFT"
        for algo, key in differences
    ]
    columns += [f"{way} right, {algorithm_label(algo)}" for algo, way in shares]
    grid = Grid(["base model", "SFT", *columns], left=1)
    for recipe, cells in zip(recipes, by_algo, strict=True):
        pairs = [
            (_of_seeds(cells[algo], key), _of_seeds(cells["sft"], key)) for algo, key in differences
        ]
        rights = [_of_seeds(cells[algo], f"success_{way}").mean() for algo, way in shares]
        row = [recipe.name.partition("/")[0], _over(cells["sft"].values.tolist())]
        grid.rows.append([*row, *(_gain(*pair) for pair in pairs), *map("{:.2f}".format, rights)])

    def means(algo: str, key: str) -> NDArray:
        return np.array([_of_seeds(cells[algo], key).mean() for cells in by_algo])

    row = [f"mean of {len(recipes)}", _over(means("sft", "score").tolist())]
    row += [_gain(means(algo, key), means("sft", key)) for algo, key in differences]
    row += [f"{means(algo, f'success_{way}').mean():.2f}" for algo, way in shares]
    grid.rows.append(row)
    return grid


def _of_seeds(cell: Cell, key: str) -> NDArray:
    """An entry of the result of each seed."""
    return np.array([run.result[key] for run in cell.runs])


def _gain(ours: NDArray, others: NDArray) -> str:
    """A mean difference in pairs."""
    return signed(difference(ours[:, None], others[:, None], paired=True), 3)


def gsm8k_grid(recipe: RecipeRuns) -> Grid:
    """How far models tell right from wrong solutions, and the differences by question.

    AUC is less that of the base model, the margin (in nats a token) also less that of SFT.
    """
    columns = ["AUC", "less base", "margin", "less base", "less SFT", "log p, right", "ESS", "cost"]
    grid = Grid(["method", *columns], left=1)
    scores, cells = _by_method(recipe_grid(recipe)), {cell.algo: cell for cell in recipe.scores}
    for algo, cell in cells.items():
        own, result = scores[algorithm_label(algo)], cell.runs[0].result
        row = [algorithm_label(algo), f"{own['score']} ({own['95 % interval']})"]
        for key, other in (("score", BASE), ("margin", BASE), ("margin", "sft")):
            if other == BASE and key == "margin":
                row.append(f"{result['margin']:.3f}")
            row.append(NOTHING if other == algo else _less(cell, cells[other], key))
        cost = training_seconds(cell) / training_seconds(cells["sft"])
        row += [f"{result['right_log_prob']:.2f}", own["ESS"]]
        grid.rows.append([*row, f"{cost:.1f}" if result["steps"] else NOTHING])
    return grid


def _less(cell: Cell, other: Cell, key: str) -> str:
    """A difference of two models, paired by question."""
    return _gain(*(np.array(c.runs[0].result["of_prompts"][key]) for c in (cell, other)))


def _by_method(grid: Grid) -> dict[str, dict[str, str]]:
    """The rows of a table by their first cell, each by column."""
    return {row[0]: dict(zip(grid.columns[1:], row[1:], strict=True)) for row in grid.rows}


def _rate(cell: Cell) -> str:
    training = cell.runs[0].config["settings"].get("training")
    return NOTHING if training is None else f"{training['learning_rate']:g}"


def _over(values: Sequence[float], interval: tuple[float, float] | None = None) -> str:
    """The mean over seeds with its interval; a single seed has that of its test."""
    if len(values) > 1:
        return mean_text(values, 3)
    return f"{values[0]:.3f} ({interval_text(interval, 3)})"
