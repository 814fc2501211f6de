"""What the report says of a group of runs, section by section."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks.report import curves, figures, language, provenance, published, tables
from benchmarks.report.aggregates import Aggregates, aggregate
from benchmarks.report.document import (
    Block,
    Bullets,
    Code,
    Document,
    Paragraph,
    Picture,
    Section,
    Table,
)
from benchmarks.report.grid import Grid
from benchmarks.report.language import Recipe
from benchmarks.report.names import algorithm_label, base, dataset_label, is_variant
from benchmarks.report.scores import Cell, algorithms, datasets, runs_of, uneven
from benchmarks.report.sweep import last_look, swept
from benchmarks.results import UnfinishedRun
from benchmarks.statistics import MIN_SEEDS

# Files of all figures that a report may have.
PICTURES = (
    "scores.png",
    "aggregates.png",
    "improvement.png",
    "profiles.png",
    "learning_curves.png",
    "learning_curves_variants.png",
    "training.png",
    "training_variants.png",
    "weights.png",
    "sweep.png",
    "cost.png",
)


def report(
    group: Sequence[Cell],
    missing: Sequence[UnfinishedRun],
    recipes: Sequence[Recipe],
    command: str,
) -> Document:
    """The whole report.

    Args:
        group: the finished control runs.
        missing: the other control runs.
        recipes: the language runs.
        command: that makes the report.
    """
    pen = _Pen(command)
    kinds = ["Control"] * bool(group) + ["Language"] * bool(recipes)
    sections = [
        *_control(pen, group, missing),
        *(language.section(recipe, command) for recipe in recipes),
        Section("How these numbers were made", _provenance(pen, group, recipes)),
    ]
    title = f"{' and '.join(kinds).capitalize()} runs"
    return Document(title, [section for section in sections if section.blocks])


def _control(pen: _Pen, group: Sequence[Cell], missing: Sequence[UnfinishedRun]) -> list[Section]:
    if not group:
        return [Section("Missing runs", _missing(pen, group, missing))]
    aggregates = aggregate(group)
    return [
        Section("Scores", _scores(pen, group, missing)),
        Section("Missing runs", _missing(pen, group, missing)),
        Section("Over datasets", _aggregates(pen, group, aggregates)),
        Section("Learning curves", _learning(pen, group)),
        Section("Training and weights", _training(pen, group)),
        Section("Settings of the weights", _sweep(pen, group)),
        Section("Cost", _cost(pen, group)),
    ]


class _Pen:
    """Writes tables and figures with what they were made by."""

    def __init__(self, command: str) -> None:
        self._command = command

    def table(self, grid: Grid, caption: str, group: Sequence[Cell]) -> list[Block]:
        """The table, where it has rows."""
        made = provenance.made(runs_of(group), self._command)
        return [Table(grid, caption, made)] if grid.rows else []

    def picture(
        self, name: str, figure: Figure | None, caption: str, group: Sequence[Cell]
    ) -> list[Block]:
        """The figure, where there is one."""
        if figure is None:
            return []
        return [Picture(name, figure, caption, provenance.made(runs_of(group), self._command))]


def _scores(pen: _Pen, group: Sequence[Cell], missing: Sequence[UnfinishedRun]) -> list[Block]:
    grid = tables.score_grid(group, missing)
    caption = "Scores, D4RL-normalised where nothing else is said."
    if tables.SUCCESS_INTERVAL in grid.columns:
        caption += " Success is the share of the episodes in which the environment reports it."
    blocks: list[Block] = [
        Paragraph(
            "Score of the last policy, never of the best one on the way; the mean over episodes is "
            "taken in each seed, then over seeds. Standard deviation and interval (95 %, "
            f"percentile bootstrap of the mean) are over seeds, and only given for {MIN_SEEDS} "
            "seeds or more; with so few seeds the interval is rather too narrow."
        ),
        *pen.table(grid, caption, group),
    ]
    if grid.published:
        blocks.append(
            Paragraph(
                f"Columns named by a paper are its numbers: {published.source()}. They were not "
                "run here, and enter no mean, aggregate or figure."
            )
        )
    else:
        blocks.append(Paragraph("The paper has no numbers for these datasets and algorithms."))
    different = uneven(group)
    if different:
        blocks += [
            Paragraph("Read with care: seeds of one row that were not run alike."),
            Bullets(different),
        ]
    caption = "Score of each seed (dots), mean (bars) and 95 % interval (lines)."
    return blocks + pen.picture("scores.png", figures.scores(group), caption, group)


def _missing(pen: _Pen, group: Sequence[Cell], missing: Sequence[UnfinishedRun]) -> list[Block]:
    if not missing:
        return []
    return [
        Paragraph(
            f"{len(missing)} unfinished runs enter nothing on this page: they were cut off, "
            "failed, or are not done yet. The same command with `--resume` continues them."
        ),
        *pen.table(tables.missing_grid(missing), "Runs without a result.", group),
    ]


def _aggregates(pen: _Pen, group: Sequence[Cell], aggregates: Aggregates) -> list[Block]:
    blocks: list[Block] = []
    if aggregates.estimates:
        tasks = ", ".join(map(dataset_label, aggregates.datasets))
        entered = [
            cell
            for cell in group
            if cell.dataset in aggregates.datasets and cell.algo in aggregates.estimates
        ]
        blocks += [
            Paragraph(
                f"Over {tasks}: the datasets that all algorithms of this section have with "
                f"{MIN_SEEDS} seeds or more. By rliable (https://arxiv.org/abs/2108.13264), with "
                "95 % intervals from a stratified bootstrap over seeds. The optimality gap is "
                "what is missing to a score of 100. Where an algorithm has more seeds on one "
                "dataset than on another, its first ones enter."
            ),
            *pen.table(tables.aggregate_grid(aggregates), "Aggregate scores.", entered),
            *pen.picture(
                "aggregates.png",
                figures.aggregate_metrics(aggregates, group),
                "Aggregate scores: point estimates (lines) and 95 % intervals (bars).",
                entered,
            ),
            *pen.table(
                tables.improvement_grid(aggregates),
                "Probability of improvement: that a run of the column's algorithm scores higher "
                "than a run of the row's on the same dataset, mean over datasets.",
                entered,
            ),
            *pen.picture(
                "improvement.png",
                figures.improvement(aggregates, group),
                "Probability of improvement, with 95 % intervals.",
                entered,
            ),
            *pen.picture(
                "profiles.png",
                figures.profiles(aggregates, group),
                "Performance profiles: share of the runs, over all datasets, that score higher "
                "than the value on the x axis; bands are 95 % intervals. Higher is better.",
                entered,
            ),
        ]
    out = [f"{algorithm_label(algo)}: {why}" for algo, why in aggregates.left_out.items()]
    if aggregates.estimates:
        out += [
            f"{dataset_label(name)}: not all of these algorithms have {MIN_SEEDS} seeds there"
            for name in aggregates.datasets_left_out
        ]
    return blocks + ([Paragraph("Left out of the aggregates:"), Bullets(out)] if out else [])


def _parts(group: Sequence[Cell]) -> list[tuple[str, str, list[Cell]]]:
    """The cells of one figure each: end of its file name, words for its caption, and its cells.

    Variants have figures of their own, beside the algorithms that they are variants of.
    """
    plain = [cell for cell in group if not is_variant(cell.algo)]
    bases = {base(name) for name in algorithms(group) if is_variant(name)}
    variants = [cell for cell in group if base(cell.algo) in bases]
    where = set(datasets(cell for cell in variants if is_variant(cell.algo)))
    variants = [cell for cell in variants if cell.dataset in where]
    return [part for part in (("", "", plain), ("_variants", "Variants. ", variants)) if part[2]]


def _learning(pen: _Pen, group: Sequence[Cell]) -> list[Block]:
    blocks: list[Block] = []
    for end, words, part in _parts(group):
        blocks += pen.picture(
            f"learning_curves{end}.png",
            curves.learning_curves(part),
            f"{words}Mean over seeds; the band is the 95 % bootstrap interval ({MIN_SEEDS} seeds "
            "or more). Points on the way are evaluated on fewer episodes; the dot is the last "
            "policy's score of the table.",
            part,
        )
    return blocks


def _training(pen: _Pen, group: Sequence[Cell]) -> list[Block]:
    blocks: list[Block] = []
    for end, words, part in _parts(group):
        blocks += pen.picture(
            f"training{end}.png",
            curves.training_curves(part),
            f"{words}Log-likelihood of the batches, value of the critics, and effective sample "
            "size of the importance weights where they left 1.",
            part,
        )
    weighted = [cell for cell in group if last_look(cell, "weight_q50")]
    caption = "Quantiles of the importance weights, mean over seeds."
    blocks += pen.picture("weights.png", curves.weight_quantiles(weighted), caption, weighted)
    caption = "The weights when they were last looked at, mean over seeds."
    return blocks + pen.table(tables.weight_grid(weighted), caption, weighted)


def _sweep(pen: _Pen, group: Sequence[Cell]) -> list[Block]:
    rows = swept(group)
    cells = [cell for _, cell in rows]
    caption = (
        "Every setting of the weights that was run, with the score and with the weights at the "
        "end, mean over seeds. A setting chosen by its score here has been chosen on the runs "
        "that it is compared on."
    )
    return pen.table(tables.sweep_grid(rows), caption, cells) + pen.picture(
        "sweep.png",
        figures.sweep(rows),
        "Score against the effective sample size at the end: temperatures in orange, target ESS "
        "in blue, 95 % intervals, and the same algorithm with all weights 1 (at the learning rate "
        "published for it) as the dashed line.",
        cells,
    )


def _cost(pen: _Pen, group: Sequence[Cell]) -> list[Block]:
    blocks: list[Block] = [
        Paragraph(
            "Of one run, mean over seeds: CPU seconds of training, learning curve and final "
            "evaluation. The reference policy is trained once for all algorithms that start from "
            "it, and stands apart."
        )
    ]
    if len(provenance.hardware(runs_of(group))) > 1:
        blocks.append(Paragraph("The runs are of different hardware: their seconds differ by it."))
    return [
        *blocks,
        *pen.table(tables.cost_grid(group), "Cost beside score.", group),
        *pen.picture(
            "cost.png",
            figures.cost(group),
            "Score against CPU seconds of a run, its reference policy included; lines are 95 % "
            "intervals of the score.",
            group,
        ),
    ]


def _provenance(pen: _Pen, group: Sequence[Cell], recipes: Sequence[Recipe]) -> list[Block]:
    runs: list[provenance.Recorded] = [*runs_of(group)]
    runs += [run for recipe in recipes for run in recipe.runs]
    return [
        *pen.table(provenance.run_grid(group), "The finished control runs.", group),
        Paragraph("Versions:"),
        Bullets(provenance.versions(runs) or ["not recorded"]),
        Paragraph("Hardware:"),
        Bullets(provenance.hardware(runs) or ["not recorded"]),
        Paragraph("Commands, without the folders of absolute paths:"),
        Code("\n".join(provenance.commands(runs)) or "not recorded"),
    ]
