"""The files of a report: one HTML page, markdown with its figures, all runs as JSON."""

from __future__ import annotations

import base64
import shlex
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import results
from benchmarks.commands import program
from benchmarks.report import aggregates as over_datasets
from benchmarks.report import figures, language, scores, tables, tuning
from benchmarks.report.aggregates import Aggregates
from benchmarks.report.document import (
    MARK,
    Document,
    check_replaced,
    escaped,
    shareable,
    to_html,
)
from benchmarks.report.language import RecipeRuns, read_recipes
from benchmarks.report.loops import RecordedLoop, add_loops, read_loops
from benchmarks.report.scores import Cell, runs_of
from benchmarks.results import RecordedRun
from benchmarks.runs import VIDEO
from benchmarks.statistics import MIN_SEEDS
from iwsft.files import write

PAGE, MARKDOWN, RECORDS = "index.html", "report.md", "runs.json"
# Words of every page.
_MADE = "made this page"
# A page with larger videos would be slow to load.
_LARGEST = 4_000_000
# Entries of a result that only the run's own folder keeps.
_EPISODES = ("episode_scores", "episode_returns", "episode_lengths", "episode_successes")


class WrittenReport(NamedTuple):
    """The HTML page of a report, and what was read for it."""

    page: Path
    runs: list[RecordedRun]  # of control
    recipes: list[RecipeRuns]
    unfinished: list[RecordedRun]  # all of them
    loops: list[RecordedLoop]


def write_report(folder: Path, out: Path) -> WrittenReport:
    """Read the runs below ``folder`` and write the pages and the figures into ``out``.

    A file in ``out`` that no report wrote is a ``FileExistsError``, and so are the records read.
    Without a finished run it raises ``ResultsError``.
    """
    _check_place(folder, out)
    runs, unfinished = results.read_all(folder, results.CONTROL)
    recipes, evaluations = read_recipes(folder), results.read_evaluations(folder)
    language_runs = [run for recipe in recipes for run in runs_of(recipe.scores)]
    others = [*unfinished, *(run for recipe in recipes for run in recipe.unfinished)]
    loops = read_loops(folder)
    if not runs and not language_runs and not evaluations and not loops:
        _refuse(folder, others)
    document, group = Document(), scores.cells(runs)
    document.section("")
    if group:
        _control(document, group, unfinished)
    document.section("")
    for recipe in recipes:
        if recipe.scores:
            document.text(f"**{escaped(recipe.name)}.** {escaped(language.summary(recipe))}")
    for recipe in recipes:
        _recipe(document, recipe)
    _evaluations(document, evaluations)
    add_loops(document, loops)
    document.section("How these numbers were made")
    command = shareable(shlex.join([*program("report").split(), str(folder)]))
    document.text(
        f"`{command}` {_MADE}. All runs, with their results, settings and commands, are in "
        f"[{RECORDS}]({RECORDS})."
    )
    if runs or language_runs:
        document.provenance([*runs, *language_runs])
    kinds = ["control"] * bool(runs) + ["language"] * bool(recipes or evaluations)
    kinds += ["loop"] * bool(loops and not kinds)
    markdown = document.markdown(f"{' and '.join(kinds).capitalize()} runs")
    entries = [*map(_record, [*runs, *language_runs]), *(loop.record for loop in loops)]
    written = {
        **document.images,
        MARKDOWN: markdown.encode(),
        RECORDS: results.as_records(entries).encode(),
        PAGE: to_html(markdown, document.images, _video_section(runs)).encode(),
    }
    for name, content in written.items():
        write(out / name, content)
    return WrittenReport(out / PAGE, runs, recipes, others, loops)


def _check_place(folder: Path, out: Path) -> None:
    """Check that no file of the user's is in the place of a report."""
    pages = {out / PAGE: MARK, out / MARKDOWN: _MADE}
    alone = not any(path.exists() for path in pages)
    check_replaced(pages | ({out / RECORDS: '"benchmark": '} if alone else {}))
    if folder.is_file() and (out / RECORDS).exists() and folder.samefile(out / RECORDS):
        raise FileExistsError(f"{folder} would be replaced by a report of it; pass another --out")


def _refuse(folder: Path, others: Sequence[RecordedRun]) -> None:
    damages = "".join(f"; {run.damage}" for run in others if run.damage)
    what = "a folder d4rl/DATASET/ALGO/seed-K or llm/RECIPE/ALGO/seed-K with a result.json"
    problem = f"no finished run below {folder} ({len(others)} unfinished{damages})"
    raise results.ResultsError(f"{problem}: a run is {what}")


def _record(run: results.RecordedRun) -> dict[str, Any]:
    """The result, settings, versions and command.

    Episodes and metrics are in it as far as the report needs them.
    """
    small = {"episode_groups": tuning.episode_groups(run), "curve": scores.curve_of(run)}
    return {
        **({"variant": run.variant} if run.variant else {}),
        **{name: value for name, value in run.result.items() if name not in _EPISODES},
        **{name: value for name, value in small.items() if value},
        "env_kwargs": run.config.get("env_kwargs"),
        "settings": run.config.get("settings"),
        "versions": run.versions,
        "hardware": run.config.get("hardware"),
        "command": shareable(run.config["command"]) if "command" in run.config else None,
    }


def _control(document: Document, group: Sequence[Cell], missing: Sequence[RecordedRun]) -> None:
    """Add what control runs have: the summary first, then all sections."""
    aggregates = over_datasets.aggregate(group)
    for line in _summary(group, aggregates, missing):
        document.text(line)
    document.table(
        tables.matrix_grid(group),
        f"Mean scores, {tables.unit(group)}; the highest of each dataset is bold.",
    )
    _scores(document, group, missing)
    document.section("Missing runs")
    _unfinished(document, missing)
    _differences(document, group, aggregates)
    _aggregates(document, group, aggregates)
    _curves(document, group)
    _tuning(document, group)


def _counted(number: int, name: str) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def _summary(
    group: Sequence[Cell], aggregates: Aggregates, missing: Sequence[RecordedRun]
) -> Iterator[str]:
    """Three lines: what was run, what is best, and whether the paper's two methods differ."""
    counts = [
        f"{_counted(len(runs_of(group)), 'run')} of "
        f"{_counted(len(scores.algorithms(group)), 'algorithm')} on "
        f"{_counted(len(scores.datasets(group)), 'dataset')}"
    ]
    if missing:
        counts.append(f"{len(missing)} more are unfinished or damaged")
    if short := runs_of(cell for cell in group if cell.under_trained):
        counts.append(f"{len(short)} made {scores.UNDER_TRAINED} and enter no comparison")
    if moving := runs_of(cell for cell in group if cell.moving):
        counts.append(f"critics of {len(moving)} have not levelled off")
    yield f"**Runs.** {'; '.join(counts)}."
    estimates, rows = aggregates.estimates, aggregates.rows
    if not estimates:
        takes = f"D4RL-normalised scores of {MIN_SEEDS} seeds or more"
        yield f"**Best.** None: a rank takes {takes}, at half of the published updates or more."
        return
    best = sorted(estimates, key=lambda algo: -estimates[algo][0].point)[:2]
    ranks = [
        f"{scores.algorithm_label(name)} {over_datasets.text(estimates[name][0], 1)}"
        for name in best
    ]
    over = f"over {_counted(len(aggregates.datasets), 'dataset')}"
    title, verdict = "Highest", ""
    if len(best) > 1 and scores.is_higher(*(rows[name] for name in best)):
        title = "Best"
    elif len(best) > 1 and scores.is_higher(*(rows[name] for name in reversed(best))):
        verdict = ": the second has the higher mean"
    elif len(best) > 1:
        verdict = ": their means may be equal, a tie"
    ranked = escaped(", then ".join(ranks))
    yield f"**{title}.** {ranked} {over} (interquartile mean, 95 % interval){verdict}."
    pair = [rows[algo] for algo in (over_datasets.PAPER, over_datasets.BASIS) if algo in estimates]
    difference = scores.compare(*pair) if len(pair) == 2 else None
    if difference is not None:
        words = "it is better" if difference.estimate.point > 0 else "it is worse"
        if not difference.settled:
            seeds = difference.seeds
            need = "" if seeds is None else f"; {seeds:,} seeds would settle this"
            words = f"they tie: the interval holds 0{need}"
        points = f"{over_datasets.signed(difference)} points, mean over these datasets"
        if differ := over_datasets.other_schedules(*pair):
            on = escaped(", ".join(map(scores.dataset_label, differ)))
            words += f". That is not the effect of the weights alone: on {on} the learning rate or "
            words += "the number of updates differs, too (`--temperature 0` runs without weights)"
        yield f"**iw-SFT(Q) less SFT(Q).** {points}; {words}."


def _scores(document: Document, group: Sequence[Cell], missing: Sequence[RecordedRun]) -> None:
    document.section("Scores")
    grid = tables.score_grid(group, missing)
    document.text(
        "Score of the last policy, never of the best one on the way. Standard deviation and "
        f"interval (95 %, Student's t) are over seeds, for {MIN_SEEDS} or more."
    )
    caption = f"Scores, {tables.unit(group)}."
    if any(cell.success_rates.size for cell in group):
        caption += " Success is the share of the episodes in which the environment reports it."
    document.table(grid, caption)
    if grid.published:
        theirs = "They were not run here, and enter no mean, aggregate or figure."
        source = tables.published_scores()[0]
        document.text(f"Columns named by a paper are its numbers: {source}. {theirs}")
    caption = (
        "Score of each seed (dots), mean (bars) and 95 % interval (lines); † is under-trained."
    )
    document.figure("scores", figures.draw_scores(group), caption)


def _differences(document: Document, group: Sequence[Cell], aggregates: Aggregates) -> None:
    document.section("Differences")
    grid = over_datasets.difference_grid(group, aggregates)
    if grid.rows:
        document.text(
            "*higher* and *lower* are differences whose 95 % interval leaves 0 out; all others are "
            "*open*. The number is the seeds of both algorithms with which it would leave 0 out in "
            "80 % of all cases, if difference and spread are as measured. Differences to the "
            "highest look larger than they are, as it was chosen on the same runs."
        )
    document.table(grid, "Differences of mean scores.")


def _aggregates(document: Document, group: Sequence[Cell], aggregates: Aggregates) -> None:
    tasks, algorithms = aggregates.datasets, aggregates.estimates
    document.section("Over datasets")
    reasons = aggregates.left_out.items()
    left_out = [f"{scores.algorithm_label(algo)}: {reason}" for algo, reason in reasons]
    if algorithms:
        document.text(
            f"Over {escaped(', '.join(map(scores.dataset_label, tasks)))}: the datasets that all "
            f"algorithms of this section have with {MIN_SEEDS} seeds or more, the first ones where "
            "an algorithm has more. The aggregates are those of rliable "
            "(<https://arxiv.org/abs/2108.13264>), with Welch's intervals; the optimality gap is "
            "the mean distance below a score of 100."
        )
        document.table(over_datasets.aggregate_grid(aggregates), "Scores over datasets.")
        few = f"not all of these algorithms have {MIN_SEEDS} seeds there"
        tasks_left_out = map(scores.dataset_label, aggregates.datasets_left_out)
        left_out += [f"{task}: {few}" for task in tasks_left_out]
    if left_out:
        document.text("Left out of the aggregates:")
        document.bullets(map(escaped, left_out))


def _curves(document: Document, group: Sequence[Cell]) -> None:
    # Variants have figures of their own, together with the algorithms that they are variants of.
    variants = [cell for cell in group if scores.is_variant(cell.algo)]
    logged = figures.logged(variants, "step")
    bases, tasks = {scores.base(cell.algo) for cell in logged}, scores.datasets(logged)
    related = [c for c in group if scores.base(c.algo) in bases and c.dataset in tasks]
    parts = {"": [cell for cell in group if cell not in variants], "_variants": related}
    for end, part in parts.items():
        words = "Variants. " if end else ""
        document.section("Learning curves")
        document.figure(
            f"learning_curves{end}",
            figures.draw_learning_curves(part),
            f"{words}Mean over seeds; the band is the 95 % interval ({MIN_SEEDS} seeds or more), "
            "cut at the frame. Points on the way are evaluated on fewer episodes; the dot is the "
            "last policy's score of the table. A triangle marks what leaves the frame.",
        )
        document.section("Training")
        document.figure(
            f"training{end}",
            figures.draw_training_curves(part),
            f"{words}Log-likelihood of the batches, value of the critics, and effective sample "
            "size of the importance weights where they left 1.",
        )


def _tuning(document: Document, group: Sequence[Cell]) -> None:
    settings = tuning.find_settings(group)
    document.section("Cost of choosing a setting")
    tuned = tuning.tune_all(settings)
    if not tuned:
        return
    document.text(
        "Where an algorithm has several settings, one must be chosen, by episodes in the "
        "environment. A bandit (UCB1) plays them with the policies of one seed of each setting. "
        "The score is that of the policy whose mean is highest so far, expected over 1,000 trials "
        "with recorded episodes (<https://arxiv.org/abs/2504.11453>). It has no interval."
    )
    document.table(
        tuning.tuning_grid(tuned), "Expected score of the chosen policy, by online episodes."
    )
    caption = "Expected score of the chosen policy over the online episodes spent on choosing."
    document.figure("tuning", tuning.draw_tuning(tuned), caption)
    single = {algo for (_, algo), cells in settings.items() if len(cells) == 1}
    single -= {algo for _, algo in tuned}
    if single:
        names = ", ".join(map(scores.algorithm_label, sorted(single, key=scores.algorithm_rank)))
        document.text(f"One setting each, which costs no episode: {escaped(names)}.")


def _recipe(document: Document, recipe: RecipeRuns) -> None:
    document.section(f"Language: {recipe.name}")
    if recipe.scores:
        document.text(recipe.note)
        for title, grid in language.grids(recipe).items():
            document.table(grid, title)
        if lines := language.changes(recipe):
            document.text("Changes from the base, paired by prompt:")
            document.bullets([*map(escaped, lines)])
        document.figure(
            f"language_{recipe.name}",
            language.draw_recipe(recipe),
            "Score of each seed (dots), mean (bars) and interval (lines); effective sample size "
            "and largest weight over the updates, mean over seeds.",
        )
    _unfinished(document, recipe.unfinished)


def _unfinished(document: Document, runs: Sequence[RecordedRun]) -> None:
    """List runs that enter nothing, with how far they came, or what is damaged."""
    if runs:
        unfinished = "the same command with `--resume` continues those that are cut off"
        document.text(f"They enter nothing here; {unfinished}:")
    lines = []
    for run in runs:
        of = "" if run.steps is None else f" of {run.steps}"
        state = run.damage or f"update {run.step}{of}"
        lines.append(escaped(f"{run.dataset}, {run.algo}, seed {run.seed}: {state}"))
    if lines:
        document.bullets(lines)


def _evaluations(document: Document, evaluations: Sequence[dict[str, Any]]) -> None:
    document.section("Language: evaluations")
    document.table(
        language.evaluation_grid(evaluations),
        "Share of right answers in percent, mean over questions, with 95 % intervals over "
        "questions (Wilson's, for the number of questions that the answers are worth).",
    )
    damages = [each["damage"] for each in evaluations if "damage" in each]
    if damages:
        document.text("Damaged evaluations, which are left out:")
        document.bullets(map(escaped, damages))
    published, note = language.published_grid(evaluations)
    document.table(published, "Numbers of the paper, which were not run here.")
    if published.rows:
        document.text(note)


def _video_section(runs: Sequence[RecordedRun]) -> str:
    """HTML with one video of each algorithm and dataset; empty without any."""
    first: dict[tuple[str, str], RecordedRun] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        file = run.folder / VIDEO
        if file.is_file() and file.stat().st_size <= _LARGEST:
            first.setdefault((run.dataset, run.algo), run)
    parts = ['<h2 id="videos">Videos</h2>', "<p>The first episode of the final score.</p>"]
    for (dataset, algo), run in first.items():
        data = base64.b64encode((run.folder / VIDEO).read_bytes()).decode()
        task, name = scores.dataset_label(dataset), scores.algorithm_label(algo)
        words = escape(f"{task}, {name}, seed {run.seed}")
        parts.append(
            f'<figure><video controls style="max-width: 100%" src="data:video/mp4;base64,{data}">'
            f"</video><figcaption>{words}</figcaption></figure>"
        )
    return "\n".join([*parts, ""]) if first else ""
