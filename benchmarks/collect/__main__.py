"""Make a dataset: roll policies out, or record the replay of an online SAC run.

Examples:
    iwsft collect --policy runs/my-run --episodes 100 --out mine.hdf5
    iwsft collect --policy runs/my-run random --episodes 50 200 --out mixed.hdf5
    iwsft collect --online sac --env Hopper-v4 --out minari:mine/hopper/replay-v0
    iwsft collect sets hopper-medium-expert
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from benchmarks import stopping

if TYPE_CHECKING:
    from benchmarks.collect.options import Options


@stopping.ends_in_one_line()
def main(options: Options) -> None:
    """Collect; an error that a user can mend ends it in one line."""
    from benchmarks.collect.options import check_options

    check_options(options)
    from benchmarks.collect.job import run_job

    run_job(options)


@stopping.ends_in_one_line()
def build_sets() -> None:
    """Build the sets that the command line names."""
    from benchmarks.collect import sets
    from benchmarks.options import check_known, parse

    description = f"{sets.__doc__}{', '.join(sets.SETS)}"
    options = parse(sets.Options, "collect sets", description, sys.argv[2:])
    for name in options.names:
        check_known("set", name, list(sets.SETS))
    sets.build(options)


def run() -> None:
    """Read the command line and run the job."""
    stopping.watch()
    with stopping.command("tyro", "gymnasium", "mujoco"):
        if sys.argv[1:2] == ["sets"]:
            return build_sets()
        from benchmarks.collect.options import Options
        from benchmarks.options import parse

        main(parse(Options, "collect", __doc__))


if __name__ == "__main__":
    run()
