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
from benchmarks.statistics import difference, t_interval

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
    """Exact match after training from each base model, and the mean over the base models.

    A recipe holds the runs of one base model. Differences to SFT are paired by seed; those of the
    last row are between means over seeds, with the interval over base models. The other columns
    are how often an answer of the hasty way is right.
    """
    by_algo = [{base(cell.algo): cell for cell in recipe.scores} for recipe in recipes]
    algos = list(by_algo[0])
    plain = [algo for algo in algos if algo in (BASE, "sft")]
    weighted = [algo for algo in algos if algo not in plain]
    columns = [f"{algorithm_label(algo)} less SFT" for algo in weighted]
    columns += [f"hasty answers right, {algorithm_label(algo)}" for algo in plain]
    grid = Grid(["base model", *map(algorithm_label, plain), *columns], left=1)
    for recipe, cells in zip(recipes, by_algo, strict=True):
        row = [_over(cells[algo].values.tolist(), cells[algo].interval) for algo in plain]
        row += [_gain(cells[algo].values, cells["sft"].values) for algo in weighted]
        row += [f"{_hasty(cells[algo]):.2f}" for algo in plain]
        grid.rows.append([recipe.name.partition("/")[0], *row])
    means = {algo: np.array([cells[algo].mean for cells in by_algo]) for algo in algos}
    row = [_over(means[algo].tolist()) for algo in plain]
    row += [_gain(means[algo], means["sft"]) for algo in weighted]
    row += [f"{np.mean([_hasty(cells[algo]) for cells in by_algo]):.2f}" for algo in plain]
    grid.rows.append([f"mean of {len(recipes)}", *row])
    return grid


def _hasty(cell: Cell) -> float:
    return float(np.mean([run.result["success_hasty"] for run in cell.runs]))


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
        low, high = t_interval(values)
        interval = float(low), float(high)
    return f"{np.mean(values):.3f} ({interval_text(interval, 3)})"
