"""Tables and figures of the runs below a folder, as one HTML page and as markdown.

Example:
    python -m benchmarks.report runs
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import stopping

if TYPE_CHECKING:
    from benchmarks.report.options import Options


def main(options: Options) -> None:
    """Write the report and print the scores."""
    if not options.runs.exists():
        raise SystemExit(f"error: {options.runs} is not a folder: pass that of --out of the runs")
    from rich.console import Console

    from benchmarks.report.language import read_recipes, recipe_table
    from benchmarks.report.page import write_report
    from benchmarks.report.tables import score_table
    from benchmarks.results import CONTROL, ResultsError, printable, read_all

    try:
        place = options.runs.parent if options.runs.is_file() else options.runs
        page = write_report(options.runs, options.out or place / "report")
        runs, unfinished = read_all(options.runs, CONTROL)
        recipes = read_recipes(options.runs)
    except (ResultsError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    console = Console()
    if runs:
        console.print(score_table(runs))
    for recipe in recipes:
        if recipe.scores:
            console.print(recipe_table(recipe))
        unfinished += recipe.unfinished
    if unfinished:
        runs_of = "run" if len(unfinished) == 1 else "runs"
        console.print(f"{len(unfinished)} unfinished or damaged {runs_of} left out:")
        for run in unfinished:
            line = run.damage or printable(str(run.folder))
            console.print(f"  {line}", highlight=False, markup=False)
    console.print(f"Report: {page}", highlight=False, soft_wrap=True)


def run() -> None:
    """Read the command line and write the report."""
    with stopping.command("tyro", "scipy", "matplotlib", "markdown_it"):
        from benchmarks.options import parse
        from benchmarks.report.options import Options

        main(parse(Options, "report", __doc__))


if __name__ == "__main__":
    run()
