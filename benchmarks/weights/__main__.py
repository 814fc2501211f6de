"""What the importance weights of a policy against its reference do, as tables and a page.

Examples:
    iwsft weights runs/d4rl/hopper-replay-mini/iw-sft-q/seed-0
    iwsft weights runs/llm/arithmetic/iw-sft/seed-0 --target-ess 0.5
    iwsft weights --model my-model --base its-base --data rows.jsonl
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import stopping

if TYPE_CHECKING:
    from benchmarks.weights.options import Options
    from benchmarks.weights.source import Source


@stopping.ends_in_one_line()
def main(options: Options) -> None:
    """Weigh, print the tables and write the page; an error that a user can mend is one line."""
    options.check()
    # Takes seconds to import.
    import rich

    from benchmarks.weights.page import measure, tables, write_page

    source = find(options)
    measured = measure(source, options)
    for title, grid in tables(measured).items():
        rich.print(grid.rich(title), "")
    print(f"Page: {write_page(source, measured, options.folder)}")


def find(options: Options) -> Source:
    """Compute log q and log pi_ref of what a command line names."""
    if options.run is None:
        from benchmarks.weights.language import of_models

        return of_models(options)
    from benchmarks.weights.source import read_run

    config, out = read_run(options.run)
    if config["benchmark"] == "llm":
        from benchmarks.weights.language import of_run
    else:
        from benchmarks.weights.control import of_run
    return of_run(options, options.run, config, out)


def run() -> None:
    """Read the command line and run the job."""
    with stopping.command("tyro", "scipy", "matplotlib", "markdown_it"):
        from benchmarks.options import parse
        from benchmarks.weights.options import Options

        main(parse(Options, "weights", __doc__))


if __name__ == "__main__":
    run()
