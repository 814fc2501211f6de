"""The files of a report: one HTML page, markdown with its figures, all runs as JSON."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from benchmarks import results
from benchmarks.report import aggregates as over_datasets
from benchmarks.report import figures, language, scores, tables
from benchmarks.report.document import (
    COMMANDS,
    Document,
    escaped,
    hardware_lines,
    shareable,
    to_html,
)
from benchmarks.report.language import RecipeRuns, read_recipes
from benchmarks.report.scores import Cell, base, runs_of
from benchmarks.report.videos import add_videos
from benchmarks.statistics import MIN_SEEDS
from iwsft.files import written_whole

PAGE, MARKDOWN, RECORDS = "index.html", "report.md", "runs.json"
# Entries of a result that only the run's own folder keeps.
_EPISODES = ("episode_scores", "episode_returns", "episode_lengths", "episode_successes")


def write_report(folder: Path, out: Path) -> Path:
    """Read the runs below ``folder`` and write the pages and the figures into ``out``.

    Returns the HTML page. Figures of an earlier report in ``out`` that the new one does not have
    are removed. Without a finished run it raises ``ResultsError``.
    """
    runs = results.read_runs(folder, results.CONTROL)
    unfinished = results.unfinished_runs(folder, results.CONTROL)
    recipes = read_recipes(folder)
    if not runs and not any(recipe.runs for recipe in recipes):
        others = [*unfinished, *(run for recipe in recipes for run in recipe.unfinished)]
        damages = "".join(f"; {run.damage}" for run in others if run.damage)
        what = "a folder d4rl/DATASET/ALGO/seed-K or llm/RECIPE/ALGO/seed-K with a result.json"
        problem = f"no finished run below {folder} ({len(others)} unfinished{damages})"
        raise results.ResultsError(f"{problem}: a run is {what}")
    document = Document(shareable(f"python -m benchmarks.report {shlex.quote(str(folder))}"))
    group = scores.cells(runs)
    every_run = [*runs, *(run for recipe in recipes for run in recipe.runs)]
    if group:
        _scores(document, group, unfinished)
    if unfinished:
        document.section("Missing runs", runs_of(group))
        document.text(
            f"{len(unfinished)} unfinished runs enter nothing on this page: they were cut off, "
            "failed, or are not done yet. The same command with `--resume` continues them. Those "
            "with a footnote are damaged."
        )
        document.table(tables.missing_grid(unfinished), "Runs without a result.")
    if group:
        for section in (_aggregates, _curves, _sweep, _cost):
            section(document, group)
    for recipe in recipes:
        _recipe(document, recipe)
    document.section(COMMANDS, runs_of(group))
    document.table(tables.run_grid(group), "The finished control runs.")
    document.provenance([*runs_of(group), *every_run[len(runs) :]])
    kinds = ["control"] * bool(runs) + ["language"] * bool(recipes)
    markdown = document.markdown(f"{' and '.join(kinds).capitalize()} runs")
    written = {
        **document.images,
        MARKDOWN: markdown.encode(),
        RECORDS: ("[\n" + ",\n".join(map(_record, every_run)) + "\n]\n").encode(),
        PAGE: to_html(markdown, document.images).encode(),
    }
    earlier = (out / MARKDOWN).read_text() if (out / MARKDOWN).is_file() else ""
    for name, content in written.items():
        with written_whole(out / name) as partial:
            partial.write_bytes(content)
    for name in re.findall(r"^!\[.*\]\(([\w-]+\.png)\)$", earlier, re.MULTILINE):
        if name not in written:
            (out / name).unlink(missing_ok=True)
    add_videos(out / PAGE, runs)
    return out / PAGE


def _record(run: results.RecordedRun) -> str:
    """The result without its episodes, settings, versions and command, as one line of JSON."""
    record = {
        **({"variant": run.variant} if run.variant else {}),
        **{name: value for name, value in run.result.items() if name not in _EPISODES},
        "env_kwargs": run.config.get("env_kwargs"),
        "settings": run.config.get("settings"),
        "versions": run.versions,
        "hardware": run.config.get("hardware"),
        "command": shareable(run.config["command"]) if "command" in run.config else None,
    }
    return json.dumps(record)


def _scores(
    document: Document, group: Sequence[Cell], missing: Sequence[results.RecordedRun]
) -> None:
    document.section("Scores", runs_of(group))
    grid = tables.score_grid(group, missing)
    document.text(
        "Score of the last policy, never of the best one on the way; the mean over episodes is "
        "taken in each seed, then over seeds. Standard deviation and interval (95 %, Student's t) "
        f"are over seeds, and only given for {MIN_SEEDS} seeds or more. The interval covers the "
        "mean in 95 % of all cases for normal scores, in fewer for two groups or skewed ones."
    )
    caption = "Scores, D4RL-normalised unless a footnote says otherwise."
    if tables.SUCCESS_INTERVAL in grid.columns:
        caption += " Success is the share of the episodes in which the environment reports it."
    document.table(grid, caption)
    if grid.published:
        sources, _ = tables.published_scores()
        theirs = "They were not run here, and enter no mean, aggregate or figure."
        document.text(f"Columns named by a paper are its numbers: {sources}. {theirs}")
    else:
        document.text("The paper has no numbers for these datasets and algorithms.")
    different = scores.uneven(group)
    if different:
        document.text("Read with care: seeds of one row that were not run alike.")
        document.bullets(map(escaped, different))
    caption = "Score of each seed (dots), mean (bars) and 95 % interval (lines)."
    document.figure("scores.png", figures.draw_scores(group), caption)


def _aggregates(document: Document, group: Sequence[Cell]) -> None:
    aggregates = over_datasets.aggregate(group)
    tasks, algorithms = aggregates.datasets, aggregates.estimates
    compared = [cell for cell in group if cell.dataset in tasks and cell.algo in algorithms]
    document.section("Over datasets", runs_of(compared))
    reasons = aggregates.left_out.items()
    left_out = [f"{scores.algorithm_label(algo)}: {reason}" for algo, reason in reasons]
    if algorithms:
        document.text(
            f"Over {escaped(', '.join(map(scores.dataset_label, tasks)))}: the datasets that all "
            f"algorithms of this section have with {MIN_SEEDS} seeds or more. The aggregates are "
            "those of rliable (<https://arxiv.org/abs/2108.13264>). Their intervals hold in 95 % "
            "of all cases or more for normal scores: each dataset's mean is uncertain by "
            "Student's t. The optimality gap is the mean distance below a score of 100. "
            "Where an algorithm has more seeds on one dataset than on another, its first ones "
            "enter."
        )
        document.table(over_datasets.aggregate_grid(aggregates), "Aggregate scores.")
        document.figure(
            "aggregates.png",
            over_datasets.draw_aggregates(aggregates, group),
            "Aggregate scores: point estimates (lines) and 95 % intervals (bars).",
        )
        document.table(
            over_datasets.improvement_grid(aggregates),
            "Probability of improvement: that a run of the column's algorithm scores higher than "
            "a run of the row's on the same dataset, mean over datasets.",
        )
        document.figure(
            "improvement.png",
            over_datasets.draw_improvement(aggregates, group),
            "Probability of improvement, with 95 % intervals.",
        )
        document.figure(
            "profiles.png",
            over_datasets.draw_profiles(aggregates, group),
            "Performance profiles: share of the runs, over all datasets, that score higher than "
            "the value on the x axis; bands are Wilson's 95 % intervals. Higher is better.",
        )
        few = f"not all of these algorithms have {MIN_SEEDS} seeds there"
        tasks_left_out = map(scores.dataset_label, aggregates.datasets_left_out)
        left_out += [f"{task}: {few}" for task in tasks_left_out]
    if left_out:
        document.text("Left out of the aggregates:")
        document.bullets(map(escaped, left_out))


def _curves(document: Document, group: Sequence[Cell]) -> None:
    # Variants have figures of their own, together with the algorithms that they are variants of.
    variants = [cell for cell in group if scores.is_variant(cell.algo)]
    bases, tasks = {scores.base(cell.algo) for cell in variants}, scores.datasets(variants)
    related = [c for c in group if scores.base(c.algo) in bases and c.dataset in tasks]
    parts = {"": [cell for cell in group if cell not in variants], "_variants": related}
    for end, part in parts.items():
        if part:
            words = "Variants. " if end else ""
            document.section("Learning curves", runs_of(part))
            document.figure(
                f"learning_curves{end}.png",
                figures.draw_learning_curves(part),
                f"{words}Mean over seeds; the band is the 95 % interval ({MIN_SEEDS} "
                "seeds or more). Points on the way are evaluated on fewer episodes; the dot is the "
                "last policy's score of the table.",
            )
            document.section("Training and weights", runs_of(part))
            document.figure(
                f"training{end}.png",
                figures.draw_training_curves(part),
                f"{words}Log-likelihood of the batches, value of the critics, and effective sample "
                "size of the importance weights where they left 1.",
            )
    weighted = [cell for cell in group if tables.last_weights(cell, "weight_q50")]
    document.section("Training and weights", runs_of(weighted))
    caption = "Quantiles of the importance weights, mean over seeds."
    document.figure("weights.png", figures.draw_weight_quantiles(weighted), caption)
    caption = "The weights when they were last looked at, mean over seeds."
    document.table(tables.weight_grid(weighted), caption)


def _sweep(document: Document, group: Sequence[Cell]) -> None:
    rows = tables.swept(group)
    document.section("Settings of the weights", runs_of(cell for _, cell in rows))
    document.table(
        tables.sweep_grid(rows),
        "Every setting of the weights that was run, with the score and with the weights at the "
        "end, mean over seeds. A setting chosen by its score here has been chosen on the runs "
        "that it is compared on.",
    )
    document.figure(
        "sweep.png",
        figures.draw_sweep(rows),
        "Score against the effective sample size at the end: temperatures in orange, target ESS "
        "in blue, 95 % intervals, and the same algorithm with all weights 1 (at the learning rate "
        "published for it) as the dashed line.",
    )


def _cost(document: Document, group: Sequence[Cell]) -> None:
    document.section("Cost", runs_of(group))
    document.text(
        "Of one run, mean over seeds: CPU seconds of training, learning curve and final "
        "evaluation. The reference policy is trained once for all algorithms that start from it, "
        "and is counted separately."
    )
    if len(hardware_lines(runs_of(group))) > 1:
        document.text("The runs are of different hardware: their seconds differ by it.")
    document.table(tables.cost_grid(group), "Cost and score.")
    document.figure(
        "cost.png",
        figures.draw_cost(group),
        "Score against CPU seconds of a run, its reference policy included; lines are 95 % "
        "intervals of the score.",
    )


def _recipe(document: Document, recipe: RecipeRuns) -> None:
    document.section(f"Language: {recipe.name}", recipe.runs)
    if recipe.runs:
        document.text(recipe.note)
        document.table(language.recipe_grid(recipe), f"Scores of {recipe.name}.")
        document.table(language.share_grid(recipe), language.SHARES)
        document.figure(
            # The variant is a folder of the user, and the page refers to the file.
            f"language_{re.sub('[^A-Za-z0-9_-]+', '_', recipe.name)}.png",
            language.draw_recipe(recipe),
            "Score of each seed (dots), mean (bars) and interval (lines); effective sample size "
            "and largest weight over the updates, mean over seeds.",
        )
    if recipe.unfinished:
        document.text("Unfinished runs enter nothing here; `--resume` continues them:")
        names = [f"{base(run.algo)}/seed-{run.seed}" for run in recipe.unfinished]
        damages = [f": {run.damage}" if run.damage else "" for run in recipe.unfinished]
        document.bullets(escaped(a + b) for a, b in zip(names, damages, strict=True))
