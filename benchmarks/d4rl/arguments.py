"""The command line of ``python -m benchmarks.d4rl``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.d4rl import settings as paper
from iwsft.curation import Ties
from iwsft.datasets import DEFAULT

_ALGORITHMS = ", ".join(paper.ALGORITHMS)


@dataclass(frozen=True)
class Arguments:
    """Train and score algorithms on a dataset, several seeds over the cores."""

    # Names are checked by us: tyro would not say which one is near.
    algo: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="NAME [NAME ...]", help=f"One or several of {_ALGORITHMS}."),
    ] = ("iw-sft-q",)
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
    ties: Ties | None = None
    """How cuts treat equal returns, in place of the preset's ">" (paper) or ">=" (authors): "rank"
    keeps the stated share, ties in random order, which sparse 0/1 returns need."""
    device: str = "cpu"
    """Of the networks and the data."""
    jobs: int | None = None
    """Runs at a time; by default one a core."""
    out: Path = Path("runs")
    """Folder of all runs: OUT/d4rl/DATASET/ALGO/seed-K/."""
    resume: bool = False
    """Continue runs that were cut off; finished ones are kept."""
