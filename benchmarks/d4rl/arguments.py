"""The command line of ``python -m benchmarks.d4rl``."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, TypeVar

import tyro

from benchmarks.d4rl import settings as paper
from benchmarks.d4rl import suites
from benchmarks.options import check_known
from benchmarks.places import Cluster
from iwsft.curation import Ties

_Value = TypeVar("_Value")
_ALGORITHMS = ", ".join(suites.ALGORITHMS)


@dataclass(frozen=True)
class Arguments:
    """Train and score algorithms on datasets, several seeds over the cores or a cluster."""

    suite: Annotated[
        str | None,
        tyro.conf.arg(
            metavar="NAME",
            help=f"A table of the paper: {', '.join(suites.SUITES)}. It sets --algo, --dataset, "
            "--seeds, --pretrain-dataset and --top where you do not, leaves out what the data do "
            "not allow, and ends in the report.",
        ),
    ] = None
    # Names are checked by us: tyro would not say which one is near.
    algo: Annotated[
        tuple[str, ...] | None,
        tyro.conf.arg(
            metavar="NAME [NAME ...]",
            help=f"One or several of {_ALGORITHMS}; bc-5 and the like for another share. By "
            f"default {' '.join(suites.SINGLE.algorithms)}.",
        ),
    ] = None
    dataset: Annotated[
        tuple[str, ...] | None,
        tyro.conf.arg(
            metavar="NAME|FILE [...]",
            help="One or several: bundled or D4RL name, Minari id, or an HDF5 file in D4RL's "
            f"layout. By default {' '.join(suites.SINGLE.datasets)}.",
        ),
    ] = None
    seeds: Annotated[
        tuple[int, ...] | None,
        tyro.conf.arg(
            metavar="INT [INT ...]",
            help="Of initialisation, batches and evaluation; a run each. By default "
            f"{' '.join(map(str, suites.SINGLE.seeds))}.",
        ),
    ] = None
    pretrain_dataset: str | None = None
    """Clone the reference policy on these data and fine-tune it on --dataset (Table 3)."""
    top: float | None = None
    """Fine-tune on the top TOP % of the data, in place of 10; the finer bins of sft-q and iw-sft-q
    shrink with it."""
    steps: int | None = None
    """Updates of the run; by default the published number (Table 4, or the baseline's own)."""
    baseline_steps: int | None = None
    """Updates of awac, iql, td3-bc, cql and dt, in place of --steps."""
    reference_steps: int = paper.CLONING.steps
    """Updates of behaviour cloning for the reference policy."""
    eval_episodes: int = 100
    """Episodes of the final score."""
    curve_episodes: int = 10
    """Episodes of each of the ten points of the learning curve; 0 draws none."""
    preset: paper.Preset = "paper"
    """Whose reading of weights and cuts: the paper's text, or its authors' code."""
    estimator: paper.Estimator = "steps"
    """Batches of single steps with cached weights (q synced hard), or the paper's batches of whole
    trajectories (q a moving average): the same expected loss at a hundredth of the cost."""
    temperature: float | None = None
    """k of the weights in place of Table 4's."""
    target_ess: float | None = None
    """Choose the temperature at each batch (or sync) for this effective sample size, in (0, 1]."""
    alpha: float | None = None
    """Decay of q, the moving average behind the policy, in place of Table 4's; hard syncs of q come
    as often as keeps its mean age."""
    ties: Ties | None = None
    """How cuts treat equal returns, in place of the preset's ">" (paper) or ">=" (authors): "rank"
    keeps the stated share, ties in random order, which sparse 0/1 returns need."""
    device: str = "cpu"
    """Of the networks and the data."""
    jobs: int | None = None
    """Runs at a time; by default one a core."""
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


def chosen(arguments: Arguments) -> suites.Suite:
    """What a command line asks for: its suite, with what it says itself in the place of that.

    Raises:
        ValueError: no such suite.
    """
    name = arguments.suite
    if name is not None:
        check_known("suite", name, list(suites.SUITES))
    suite = suites.SINGLE if name is None else suites.SUITES[name]
    return replace(
        suite,
        algorithms=_or(arguments.algo, suite.algorithms),
        # In Python a single name may stand by itself.
        datasets=_or(_alone(arguments.dataset), suite.datasets),
        seeds=_or(arguments.seeds, suite.seeds),
        pretrain_dataset=_or(arguments.pretrain_dataset, suite.pretrain_dataset),
        top=_or(arguments.top, suite.top),
    )


def _or(said: _Value | None, otherwise: _Value) -> _Value:
    return otherwise if said is None else said


def _alone(dataset: tuple[str, ...] | str | None) -> tuple[str, ...] | None:
    return (dataset,) if isinstance(dataset, str) else dataset
