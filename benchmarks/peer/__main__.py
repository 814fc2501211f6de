"""Train and score d3rlpy's IQL, TD3+BC, CQL and AWAC as ours are trained and scored.

python -m benchmarks.peer --algo iql td3-bc --dataset hopper-medium-replay-v2 --seeds 0 1 2

d3rlpy 2.8.1 asks for one gymnasium version and for gym; it runs beside the gymnasium of this
project when it is installed without what it asks for:

pip install --no-deps d3rlpy==2.8.1 gym==0.26.2 gym-notices
pip install structlog colorama dataclasses-json scikit-learn
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.d4rl.options import Options, check_options, chosen_suite
from benchmarks.runs import ends_as_ctrl_c_does, ends_in_one_line


@dataclass(frozen=True)
class Arguments:
    """Runs of d3rlpy, one after the other, on one thread."""

    algo: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")]
    """One or several of iql, td3-bc, cql and awac."""
    dataset: Annotated[str, tyro.conf.arg(metavar="NAME|FILE")] = "hopper-replay-mini"
    """Bundled or D4RL name, Minari id, or an HDF5 file in D4RL's layout."""
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT [INT ...]")] = (0,)
    """A run each. Evaluation starts from the episodes of our run of the same seed."""
    steps: int | None = None
    """Updates; by default the baseline's published number."""
    eval_episodes: int = 100
    """Episodes of the final score."""
    out: Path = Path("runs/d3rlpy")
    """Folder of all runs: OUT/d4rl/DATASET/ALGO/seed-K/. Below the folder of our runs, its name is
    that of a variant in the report: d3rlpy/iql beside iql."""
    resume: bool = False
    """Keep finished runs; those that were cut off start again."""


def compare(arguments: Arguments) -> None:
    """Run what the command line asks for; all that can be known to be wrong is found before.

    Raises:
        ValueError: and others of ``benchmarks.runs.EXPECTED``.
    """
    # Takes seconds to import.
    from benchmarks.d4rl.run import Run, Task, check_run
    from benchmarks.peer.learner import installed
    from benchmarks.peer.run import claim, run
    from benchmarks.peer.settings import check

    options = Options(
        algo=arguments.algo,
        seeds=arguments.seeds,
        steps=arguments.steps,
        eval_episodes=arguments.eval_episodes,
        out=arguments.out,
        resume=arguments.resume,
    )
    check_options(options, chosen_suite(options))
    for algo in arguments.algo:
        check(algo)
    installed()
    task = Task.load(arguments.dataset)
    task.check_environment()
    plans = [
        Run(task.name, algo, seed, options, arguments.dataset)
        for algo in arguments.algo
        for seed in arguments.seeds
    ]
    for plan in plans:
        check_run(plan, task)
    for plan in claim(plans, task):
        steps = plan.updates

        def say(row: dict[str, float], plan: Run = plan, steps: int = steps) -> None:
            score = row.get("normalized_score", row.get("return_mean"))
            shown = "" if score is None else f"  score {score:.1f}"
            line = f"{plan}  {row['step']:.0f}/{steps}  {row['wall_seconds']:.0f} s{shown}"
            print(line, file=sys.stderr)

        result = run(plan, task, say)
        score = result["normalized_score"]
        what, value = ("return", result["return_mean"]) if score is None else ("score", score)
        print(f"d3rlpy/{plan}: {what} {value:.1f}, {result['cpu_seconds']:.0f} CPU-seconds")


def main(arguments: Arguments) -> None:
    """Compare; an error that a user can mend ends it in one line."""
    with ends_in_one_line():
        compare(arguments)


if __name__ == "__main__":
    ends_as_ctrl_c_does()
    main(tyro.cli(Arguments, prog="python -m benchmarks.peer", description=__doc__))
