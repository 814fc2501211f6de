"""Train and score offline algorithms on control data.

Examples:
    python -m benchmarks.d4rl --algo iw-sft-q
    python -m benchmarks.d4rl --algo bc sft-q iw-sft-q --dataset hopper-medium-replay-v2
    python -m benchmarks.d4rl --suite paper --resume
    python -m benchmarks.d4rl --config run.yaml --seeds 0 1 2
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import stopping

if TYPE_CHECKING:
    from benchmarks.d4rl.options import Options


@stopping.ends_in_one_line()
def main(options: Options) -> None:
    """Run the job; an error that a user can mend ends it in one line."""
    from benchmarks.d4rl.options import check_options, choose_suite

    suite = choose_suite(options)
    check_options(options, suite)
    # Takes seconds to import.
    from benchmarks.d4rl.job import run_job

    if run_job(options, suite).failed:
        raise SystemExit(1)


def run() -> None:
    """Read the command line and run the job."""
    stopping.watch()
    with stopping.command("tyro", "joblib", "scipy", "gymnasium", "mujoco"):
        from benchmarks.d4rl.options import Options
        from benchmarks.options import parse

        main(parse(Options, "d4rl", __doc__))


if __name__ == "__main__":
    run()
