"""Train and score offline algorithms on control data.

    python -m benchmarks.d4rl --algo iw-sft-q
    python -m benchmarks.d4rl --algo bc sft-q iw-sft-q --dataset hopper-medium-replay-v2 \
        --seeds 0 1 2 3 4
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from benchmarks.d4rl import settings as paper
from iwsft.datasets import DEFAULT

if TYPE_CHECKING:
    from benchmarks.d4rl.plan import Plan

Algo = Literal["bc", "bc-10", "sft", "sft-q", "iw-sft", "iw-sft-q", "iw-sft-step"]


@dataclass(frozen=True)
class Arguments:
    """Train and score algorithms on a dataset, several seeds over the cores."""

    algo: tuple[Algo, ...] = ("iw-sft-q",)
    """One or several; see ``benchmarks/d4rl/settings.py``."""
    dataset: str = DEFAULT
    """Bundled or D4RL name, Minari id, or an HDF5 file in D4RL's layout."""
    seeds: tuple[int, ...] = (0,)
    """Of initialisation, batches and evaluation; a run each."""
    steps: int | None = None
    """Updates of the run; by default the paper's (Table 4)."""
    reference_steps: int = paper.CLONING.steps
    """Updates of behaviour cloning for the reference policy."""
    eval_episodes: int = 100
    """Episodes of the final score."""
    preset: paper.Preset = "paper"
    """Whose reading of weights and cuts: the paper's text, or its authors' code."""
    estimator: paper.Estimator = "steps"
    """Batches of single steps with cached weights (q synced hard), or the paper's batches of whole
    trajectories (q a moving average): the same expected loss at a hundredth of the cost."""
    temperature: float | None = None
    """k of the weights in place of Table 4's."""
    target_ess: float | None = None
    """Choose the temperature at each batch (or sync) for this effective sample size, in (0, 1]."""
    device: str = "cpu"
    """Of the networks and the data."""
    jobs: int | None = None
    """Runs at a time; by default one a core."""
    out: Path = Path("runs")
    """Folder of all runs: OUT/d4rl/DATASET/ALGO/seed-K/."""
    resume: bool = False
    """Continue runs that were cut off; finished ones are kept."""


def main(arguments: Arguments) -> None:
    """Check everything that can be known before, run, and print the table."""
    from joblib import Parallel, delayed
    from rich.console import Console

    from benchmarks.d4rl.plan import Plan, prepare
    from benchmarks.d4rl.run import curated, environment_of
    from benchmarks.report.runs import read_runs
    from benchmarks.report.tables import score_table
    from iwsft import datasets, environments

    plans = [
        Plan(
            algo=algo,
            dataset=arguments.dataset,
            seed=seed,
            preset=arguments.preset,
            estimator=arguments.estimator,
            steps=arguments.steps,
            reference_steps=arguments.reference_steps,
            temperature=arguments.temperature,
            target_ess=arguments.target_ess,
            eval_episodes=arguments.eval_episodes,
            device=arguments.device,
            out=str(arguments.out),
            resume=arguments.resume,
        )
        for seed in arguments.seeds
        for algo in arguments.algo
    ]
    dataset = datasets.load(arguments.dataset)
    environments.make(environment_of(dataset)).close()
    for plan in plans[: len(arguments.algo)]:
        curated(plan, dataset.trajectories)
    todo = [plan for plan in plans if not prepare(plan, dataset)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    jobs = min(arguments.jobs or cores or 1, max(1, len(todo)))
    Parallel(n_jobs=jobs)(delayed(execute)(plan) for plan in todo)
    runs = [run for run in read_runs(arguments.out) if run.dataset == dataset.name]
    Console().print(score_table(runs))


def execute(plan: Plan) -> None:
    """One run in a process of its own, with a line of progress now and then."""
    from benchmarks.d4rl.run import run

    def say(stage: str, row: dict[str, float]) -> None:
        if "normalized_score" in row or "return_mean" in row:
            score = row.get("normalized_score", row.get("return_mean"))
            ess = f"  ESS {row['ESS']:.2f}"
            print(
                f"{plan.algo} seed {plan.seed}  {stage} {row['step']:>6}  "
                f"loss {row['loss']:8.3f}{ess}  score {score:6.1f}  {row['wall_seconds']:5.0f} s",
                file=sys.stderr,
                flush=True,
            )

    run(plan, say)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
