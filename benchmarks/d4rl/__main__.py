"""Train and score offline algorithms on control data.

python -m benchmarks.d4rl --algo iw-sft-q

python -m benchmarks.d4rl --algo bc sft-q iw-sft-q --dataset hopper-medium-replay-v2 --seeds 0 1 2

python -m benchmarks.d4rl --suite paper --resume
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import stopping

if TYPE_CHECKING:
    from benchmarks.d4rl.settings import Options


def main(options: Options) -> None:
    """Run the job; an error that a user can mend ends it in one line."""
    from benchmarks.runs import ends_in_one_line

    with ends_in_one_line():
        from benchmarks.d4rl.job import run_job

        summary = run_job(options)
    if summary.failed:
        raise SystemExit(1)


if __name__ == "__main__":
    stopping.watch()
    with stopping.command():
        import tyro

        from benchmarks.d4rl.settings import Options

        main(tyro.cli(Options, prog="python -m benchmarks.d4rl", description=__doc__))
