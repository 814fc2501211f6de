"""Tables and figures of the runs below a folder, as one HTML page and as markdown.

Example:
    iwsft report runs
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import stopping

if TYPE_CHECKING:
    from benchmarks.report.options import Options


@stopping.ends_in_one_line()
def main(options: Options) -> None:
    """Write the report and print the scores; an error that a user can mend is one line."""
    import rich

    from benchmarks.report.language import recipe_table
    from benchmarks.report.loops import loop_grid, seed_grids
    from benchmarks.report.page import write_report
    from benchmarks.report.tables import score_table
    from benchmarks.results import printable

    place = options.runs.parent if options.runs.is_file() else options.runs
    report = write_report(options.runs, options.out or place / "report")
    if report.runs:
        rich.print(score_table(report.runs))
    for recipe in report.recipes:
        if recipe.scores:
            rich.print(recipe_table(recipe))
    for loop in report.loops:
        rich.print(loop_grid(loop.rows).rich(loop.name))
    for title, grid in seed_grids(report.loops).items():
        rich.print(grid.rich(title))
    if report.unfinished:
        runs_of = "run" if len(report.unfinished) == 1 else "runs"
        print(f"{len(report.unfinished)} unfinished or damaged {runs_of} left out:")
        for run in report.unfinished:
            print(f"  {run.damage or printable(str(run.folder))}")
    print(f"Report: {report.page}")


def run() -> None:
    """Read the command line and write the report."""
    with stopping.command("tyro", "scipy", "matplotlib", "markdown_it"):
        from benchmarks.options import parse
        from benchmarks.report.options import Options

        main(parse(Options, "report", __doc__))


if __name__ == "__main__":
    run()
