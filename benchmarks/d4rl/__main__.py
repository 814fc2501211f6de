"""Train and score offline algorithms on control data.

Examples:
    iwsft d4rl --algo iw-sft-q
    iwsft d4rl --algo bc sft-q iw-sft-q --dataset hopper-medium-replay-v2
    iwsft d4rl --suite paper --resume
    iwsft d4rl --config run.yaml --seeds 0 1 2
    iwsft d4rl loop --env Hopper-v4 --start bc:hopper-replay-mini
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from benchmarks import stopping

if TYPE_CHECKING:
    from benchmarks.d4rl.options import Options

_LOOP = """Roll out a policy, keep the best episodes, fine-tune on them, score it, and again.

Examples:
    iwsft d4rl loop --start bc:hopper-replay-mini
    iwsft d4rl loop --env Hopper-v4 --start runs/d4rl/hopper-replay-mini/bc/seed-0
    iwsft d4rl loop --start bc:hopper-replay-mini --algo sft --keep-rounds 2
"""


@stopping.ends_in_one_line()
def main(options: Options) -> None:
    """Run the job; an error that a user can mend ends it in one line."""
    from benchmarks.d4rl.options import check_names, check_options, choose_suite, folders
    from benchmarks.runs import check_free

    suite = choose_suite(options)
    check_options(options, suite)
    if not options.resume:
        check_free(folders(options, suite))
    # A suite leaves out what is not there.
    if options.suite is None:
        check_names(suite)
    # Takes seconds to import.
    from benchmarks.d4rl.job import run_job

    if run_job(options, suite).failed:
        raise SystemExit(1)


@stopping.ends_in_one_line()
def loop(words: Sequence[str]) -> None:
    """Run the loop and print its table; an error that a user can mend ends it in one line."""
    from benchmarks.d4rl.loop_options import LoopOptions
    from benchmarks.options import parse
    from iwsft.loop import check_free

    options = parse(LoopOptions, "d4rl loop", _LOOP, words)
    if not options.resume:
        check_free(options.out)
    from benchmarks.d4rl.loop import run_rounds

    run_rounds(options)


def run() -> None:
    """Read the command line and run the job, or the loop."""
    stopping.watch()
    with stopping.command("tyro", "joblib", "scipy", "gymnasium", "mujoco"):
        if sys.argv[1:2] == ["loop"]:
            return loop(sys.argv[2:])
        from benchmarks.d4rl.options import Options
        from benchmarks.options import parse

        return main(parse(Options, "d4rl", __doc__))


if __name__ == "__main__":
    run()
