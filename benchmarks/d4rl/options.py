"""The command line of ``python -m benchmarks.d4rl``, which is also the settings of its runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from baselines import BASELINES
from benchmarks.d4rl import settings as paper
from benchmarks.options import (
    check_at_least,
    check_device,
    check_known,
    check_once,
    check_seeds,
    check_used,
)
from benchmarks.places import Cluster
from iwsft.curation import Ties


@dataclass(frozen=True)
class Options:
    """Train and score algorithms on datasets, several seeds over the cores or a cluster."""

    suite: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="NAME",
            help=f"A table of the paper: {', '.join(paper.SUITES)}. It sets --algo, --dataset, "
            "--seeds, --pretrain-dataset and --top where you do not, leaves out what the data do "
            "not allow, and ends in the report.",
        ),
    ] = None
    # Names are checked by us: tyro would not say which one is near.
    algo: Annotated[
        tuple[str, ...] | None,
        tyro.conf.arg(
            metavar="NAME [NAME ...]",
            help=f"One or several of {', '.join(paper.EVERY_ALGORITHM)}; bc-5 and the like for "
            f"another share. By default {' '.join(paper.SINGLE.algorithms)}.",
        ),
    ] = None
    dataset: Annotated[
        tuple[str, ...] | None,
        tyro.conf.arg(
            metavar="NAME|FILE [...]",
            help="One or several: bundled or D4RL name, Minari id, or an HDF5 file in D4RL's "
            f"layout. By default {' '.join(paper.SINGLE.datasets)}.",
        ),
    ] = None
    seeds: Annotated[
        tuple[int, ...] | None,
        tyro.conf.arg(
            metavar="INT [INT ...]",
            help="Seeds of initialisation, batches and evaluation; one run each. By default "
            f"{' '.join(map(str, paper.SINGLE.seeds))}.",
        ),
    ] = None
    pretrain_dataset: str | None = None
    """Clone the reference policy on these data and fine-tune it on --dataset (Table 3)."""
    top: float | None = None
    """Fine-tune on the top TOP % of the data instead of 10; the finer bins of sft-q and iw-sft-q
    shrink with it."""
    steps: int | None = None
    """Updates of the run; by default the published number (Table 4, or the baseline's own)."""
    baseline_steps: int | None = None
    """Updates of awac, iql, td3-bc, cql and dt, instead of --steps."""
    reference_steps: int = paper.CLONING.steps
    """Updates of behaviour cloning for the reference policy."""
    eval_episodes: int = 100
    """Episodes of the final score."""
    curve_episodes: int = 10
    """Episodes of each of the ten points of the learning curve; 0 draws no curve."""
    preset: paper.Preset = "paper"
    """The reading of weights and cuts: the paper's text, or its authors' code."""
    estimator: paper.Estimator = "steps"
    """Batches of single steps with cached weights (q synced hard), or the paper's batches of whole
    trajectories (q a moving average): the same expected loss at a hundredth of the cost."""
    temperature: float | None = None
    """Factor k of the weights, instead of Table 4's."""
    target_ess: float | None = None
    """Choose the temperature at each batch (or sync) for this effective sample size, in (0, 1]."""
    alpha: float | None = None
    """Decay of q, the policy's moving average, instead of Table 4's; hard syncs of q come as often
    as keeps its mean age."""
    ties: Ties | None = None
    """How cuts treat equal returns, instead of the preset's ">" (paper) or ">=" (authors): "rank"
    keeps the stated share, ties in random order, which sparse 0/1 returns need."""
    device: str = "cpu"
    """Device of the networks and the data."""
    jobs: int | None = None
    """Number of runs at a time; by default one per core."""
    cluster: Cluster | None = None
    """Run on a Ray cluster: the one that RAY_ADDRESS names, one that runs on this machine, or a new
    one of this machine's cores. Its nodes share --out, the data and the project."""
    out: Path = Path("runs")
    """Folder of all runs: OUT/d4rl/DATASET/ALGO/seed-K/."""
    variant: str = ""
    """Name of these settings in tables and reports: the runs go to OUT/VARIANT/d4rl/..., and share
    the reference policies of OUT."""
    resume: bool = False
    """Continue runs that were cut off; finished ones are kept."""


def choose_suite(options: Options) -> paper.Suite:
    """The suite of a command line, changed by the options that are given."""
    suite = paper.SINGLE
    if options.suite is not None:
        check_known("suite", options.suite, list(paper.SUITES))
        suite = paper.SUITES[options.suite]
    given: dict[str, Any] = {
        "algorithms": options.algo,
        "datasets": options.dataset,
        "seeds": options.seeds,
        "pretrain_dataset": options.pretrain_dataset,
        "top": options.top,
    }
    return replace(suite, **{name: value for name, value in given.items() if value is not None})


def check_options(options: Options, suite: paper.Suite) -> None:
    """Check everything that takes no data; ``suite`` is that of :func:`choose_suite`."""
    algorithms = [paper.find_algorithm(name) for name in suite.algorithms]
    check_once(algo=suite.algorithms, dataset=suite.datasets)
    check_seeds(suite.seeds)
    check_at_least(
        1,
        steps=options.steps,
        baseline_steps=options.baseline_steps,
        reference_steps=options.reference_steps,
        eval_episodes=options.eval_episodes,
        jobs=options.jobs,
    )
    check_at_least(0, curve_episodes=options.curve_episodes)
    alpha, top, variant = options.alpha, options.top, options.variant
    if alpha is not None and not 0 <= alpha < 1:
        raise ValueError(f"--alpha {alpha}: a decay lies in [0, 1)")
    if top is not None and not 0 < top <= 100:
        raise ValueError(f"--top {top}: a share of the data in %, above 0 and at most 100")
    if variant in (".", "..", "d4rl") or set(variant) & set("/\\"):
        raise ValueError(f"--variant {variant}: a name of a folder, without slashes")
    per_trajectory = any(algorithm.per_trajectory for algorithm in algorithms)
    tuned = any(algorithm.from_reference for algorithm in algorithms)
    chosen = f"in {', '.join(suite.algorithms)}"
    baselines = not set(BASELINES).isdisjoint(suite.algorithms)
    for name, used, where in (
        ("target_ess", per_trajectory, chosen),
        ("temperature", per_trajectory, chosen),
        ("temperature", options.target_ess is None, f"with --target-ess {options.target_ess}"),
        ("alpha", any(algorithm.weighted for algorithm in algorithms), chosen),
        ("ties", any(algorithm.cuts for algorithm in algorithms), chosen),
        ("top", tuned, chosen),
        ("pretrain_dataset", tuned, chosen),
        ("baseline_steps", baselines, f"without one of {', '.join(BASELINES)}"),
    ):
        check_used(name, getattr(options, name), used, where)
    check_device(options.device)
