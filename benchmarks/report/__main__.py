"""Command line of the report."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console

from benchmarks.report.language import read_recipes, recipe_table
from benchmarks.report.page import write_report
from benchmarks.report.tables import score_table
from benchmarks.results import CONTROL, ResultsError, printable, read_runs, unfinished_runs


@dataclass(frozen=True)
class Report:
    """Tables and figures of the runs below a folder, as one HTML page and as markdown."""

    runs: tyro.conf.Positional[Path]
    """Folder that --out of the runs named."""
    out: Path | None = None
    """Folder of index.html, report.md and its figures; by default `report` inside RUNS."""


def main(report: Report) -> None:
    """Write the report and print the scores."""
    try:
        page = write_report(report.runs, report.out or report.runs / "report")
        runs, unfinished = read_runs(report.runs, CONTROL), unfinished_runs(report.runs, CONTROL)
        recipes = read_recipes(report.runs)
    except (ResultsError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    console = Console()
    if runs:
        console.print(score_table(runs))
    for recipe in recipes:
        if recipe.runs:
            console.print(recipe_table(recipe))
        unfinished += recipe.unfinished
    if unfinished:
        console.print(f"{len(unfinished)} unfinished or damaged runs left out:")
        for run in unfinished:
            line = run.damage or printable(str(run.folder))
            console.print(f"  {line}", highlight=False, markup=False)
    console.print(f"Report: {page}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main(tyro.cli(Report, prog="python -m benchmarks.report"))
