"""Language runs in a report: what ``benchmarks.llm`` wrote, a section a recipe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.llm import plot, results
from benchmarks.llm.results import Result, Row
from benchmarks.report import provenance
from benchmarks.report.document import Block, Bullets, Paragraph, Picture, Section, Table
from benchmarks.report.grid import NOTHING, Grid
from benchmarks.results import ResultsError
from benchmarks.statistics import MIN_SEEDS
from iwsft.checkpoint import CheckpointError

# Files of the figures, for those of an earlier report to be found.
PICTURES = "language_*.png"


@dataclass(frozen=True)
class Recipe:
    """The runs of one recipe below one folder.

    Attributes:
        recipe: its name.
        variant: folders between the report's and ``llm``, as in ``benchmarks.results.FinishedRun``.
        runs: the finished ones.
        rows: an algorithm each, over its seeds.
        unfinished: folders of the others.
    """

    recipe: str
    variant: str
    runs: list[Result]
    rows: list[Row]
    unfinished: list[Path]

    @property
    def name(self) -> str:
        """``variant/recipe``, or the recipe alone."""
        return "/".join(filter(None, (self.variant, self.recipe)))


def read_recipes(folder: Path) -> list[Recipe]:
    """All recipes with runs at or below ``folder``, by path.

    Raises:
        ResultsError: a file is not what a run writes.
    """
    found = []
    for path in results.recipe_folders(folder):
        try:
            runs = results.read(path)
        except CheckpointError as error:
            raise ResultsError(str(error)) from error
        found.append(
            Recipe(
                path.name,
                "/".join(path.relative_to(folder.absolute()).parts[:-2]),
                runs,
                results.summarise(runs),
                results.unfinished(path),
            )
        )
    return found


def section(recipe: Recipe, command: str) -> Section:
    """What the runs of a recipe came to; ``command`` is that of the report."""
    blocks: list[Block] = []
    if recipe.rows:
        score = recipe.rows[0].score_name
        made = provenance.made(recipe.runs, command)
        blocks += [
            Paragraph(
                f"Score: {score}, mean over seeds. Intervals (95 %) are over seeds (bootstrap) "
                f"where they are {MIN_SEEDS} or more, of the test's items for one seed. ESS: "
                "effective share of the draws of an update, its mean and least."
            ),
            Table(_scores(recipe.rows), f"Scores of {recipe.name}.", made),
        ]
        kinds = list(dict.fromkeys(kind for row in recipe.rows for kind in row.shares))
        if kinds:
            caption = "Chance of each kind of answer."
            blocks.append(Table(_shares(recipe.rows, kinds), caption, made))
        caption = (
            "Score of each seed (dots), mean (bars) and interval (lines); effective sample size "
            "and largest weight over the updates, mean over seeds."
        )
        name = PICTURES.replace("*", recipe.name.replace("/", "_"))
        blocks.append(Picture(name, plot.figure(recipe.rows), caption, made))
    if recipe.unfinished:
        blocks += [
            Paragraph("Unfinished runs enter nothing here; `--resume` continues them:"),
            Bullets(["/".join(run.parts[-2:]) for run in recipe.unfinished]),
        ]
    return Section(f"Language: {recipe.name}", blocks)


def _scores(rows: Sequence[Row]) -> Grid:
    grid = Grid(
        ["algorithm", "seeds", "score", "95 % interval", "updates", "ESS", "least ESS"]
        + ["largest weight", "CPU seconds, with reference"],
        left=1,
    )
    for row in rows:
        grid.rows.append(
            [
                row.algo,
                str(len(row.seeds)),
                f"{row.score:.3f}",
                NOTHING if row.interval is None else "{:.3f} to {:.3f}".format(*row.interval),
                str(row.steps),
                *map(_number, (row.ess, row.ess_min, row.weight_max)),
                f"{row.cpu_seconds:,.0f}",
            ]
        )
    return grid


def _shares(rows: Sequence[Row], kinds: Sequence[str]) -> Grid:
    grid = Grid(["algorithm", *kinds], left=1)
    for row in rows:
        grid.rows.append([row.algo, *(_number(row.shares.get(kind)) for kind in kinds)])
    return grid


def _number(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}"
