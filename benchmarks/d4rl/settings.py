"""The paper's control runs as data: algorithms, settings of each task, and tables as sets of runs.

Sources: Appendix F and Table 4 of the paper; where the authors' code differs, the preset
``authors`` follows the code.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from baselines import BASELINES
from benchmarks.options import check_known
from iwsft.curation import Ties
from iwsft.datasets import DEFAULT
from iwsft.training import Schedule
from iwsft.weights import ClipRatio, ImportanceWeights, SelfNormalize, TargetESS

Preset = Literal["paper", "authors"]
Estimator = Literal["steps", "trajectories"]

TOP_10 = (90.0,)
QUALITY_BINS = (90.0, 95.0, 98.0)


@dataclass(frozen=True)
class Algorithm:
    """One of the paper's algorithms."""

    # Percentiles of the return that curate the data; without any, all data are used.
    cuts: tuple[float, ...] = ()
    # Start at the reference policy (fine-tuning), or from scratch (cloning).
    from_reference: bool = False
    # Use importance weights, one a trajectory or one a step; otherwise all are 1.
    weighted: bool = False
    per_step: bool = False

    @property
    def per_trajectory(self) -> bool:
        """Whether each trajectory has one weight."""
        return self.weighted and not self.per_step


# Any share of the data has a name like "bc-10": "bc-5" is behaviour cloning on the top 5 %.
ALGORITHMS: Mapping[str, Algorithm] = {
    "bc": Algorithm(),
    "bc-10": Algorithm(TOP_10),
    "sft": Algorithm(TOP_10, from_reference=True),
    "sft-q": Algorithm(QUALITY_BINS, from_reference=True),
    "iw-sft": Algorithm(TOP_10, from_reference=True, weighted=True),
    "iw-sft-q": Algorithm(QUALITY_BINS, from_reference=True, weighted=True),
    "iw-sft-step": Algorithm(TOP_10, from_reference=True, weighted=True, per_step=True),
}
EVERY_ALGORITHM = (*ALGORITHMS, *BASELINES)
_SHARE = re.compile(r"bc-(\d+(?:\.\d+)?)")


def find_algorithm(name: str) -> Algorithm:
    """The algorithm that has this name; a baseline trains from scratch on all data."""
    share = _SHARE.fullmatch(name)
    if share is None:
        check_known("algorithm", name, [*ALGORITHMS, *BASELINES])
        return ALGORITHMS.get(name, Algorithm())
    if not 0 < float(share[1]) < 100:
        raise ValueError(f"{name}: behaviour cloning on the top 0 % to 100 %, as in bc-10")
    return replace(ALGORITHMS["bc-10"], cuts=(100 - float(share[1]),))


@dataclass(frozen=True)
class FineTuning:
    """A row of Table 4: Adam's rate after the linear warm-up, decay of q, and the weights.

    ``k`` is the temperature of the mean log-ratio (the column k / |tau|). ``normalize`` divides
    weights by their mean over the batch.
    """

    lr: float = 4e-5
    warmup: int = 300
    steps: int = 4500
    alpha: float = 0.995
    k: float = 1.0
    normalize: bool = False

    @property
    def sync_every(self) -> int:
        """Updates between hard syncs at which q is on average as old as the moving average."""
        return max(1, round(2 / (1 - self.alpha)) - 1)


_TABLE_4 = {
    "halfcheetah-medium-replay": FineTuning(lr=4e-5, alpha=0.995, k=1.0),
    "hopper-medium-replay": FineTuning(lr=1e-4, alpha=0.99, k=1.0, normalize=True),
    "walker2d-medium-replay": FineTuning(steps=2000, alpha=0.9, k=10.0, normalize=True),
    "halfcheetah-expert": FineTuning(lr=4e-5, alpha=0.995, k=0.8),
    "hopper-expert": FineTuning(lr=4e-4, alpha=0.995, k=0.8),
    "walker2d-expert": FineTuning(lr=4e-5, alpha=0.995, k=0.8),
}
# Batches of single steps, or of whole trajectories.
FINE_TUNING_BATCH: Mapping[Estimator, int] = {"steps": 1024, "trajectories": 256}
CLONING_BATCH: Mapping[tuple[Estimator, Preset], int] = {
    ("steps", "paper"): 256,
    ("steps", "authors"): 256,
    ("trajectories", "paper"): 32,
    ("trajectories", "authors"): 128,
}
CLONING = Schedule(steps=10_000, lr=1e-3, decay="constant")
TIES: Mapping[Preset, Ties] = {"paper": ">", "authors": ">="}


def find_fine_tuning(dataset: str, algorithm: Algorithm) -> tuple[FineTuning, str]:
    """The row of Table 4 for a dataset, and its source in words.

    A dataset that the paper does not use takes the row of its environment and its kind: ``expert``
    where the name says so, medium-replay otherwise. Unweighted runs use the learning rate of the
    paper's SFT(Q): 4e-5, and 4e-4 on hopper-medium-expert.
    """
    kind = "expert" if "expert" in dataset else "medium-replay"
    name = f"{dataset.split('-')[0]}-{kind}"
    if name not in _TABLE_4:
        return FineTuning(), f"{dataset} is not in the paper: the row of halfcheetah-medium-replay"
    if not algorithm.weighted:
        return FineTuning(lr=4e-4 if name == "hopper-expert" else 4e-5), "SFT(Q) of Appendix F"
    return _TABLE_4[name], f"Table 4, {name}"


def choose_weights(
    preset: Preset, row: FineTuning, *, per_step: bool, target_ess: float | None
) -> ImportanceWeights:
    """The transforms of a preset; ``target_ess`` uses :class:`TargetESS` instead of k."""
    if per_step:
        # Ratio clips of the per-step variant: 1 -+ 0.8 (paper, 3.4), [0, 2] (authors' control).
        clip = ClipRatio(0.2, 1.8) if preset == "paper" else ClipRatio(0.0, 2.0)
        return ImportanceWeights(step=(clip,), reduce=None)
    if target_ess is not None:
        return ImportanceWeights(trajectory=(TargetESS(target_ess), SelfNormalize()))
    if preset == "authors":
        return ImportanceWeights.authors_control(row.k, row.normalize)
    chain = ImportanceWeights.paper_control(row.k)
    return replace(chain, trajectory=(SelfNormalize(),)) if row.normalize else chain


@dataclass(frozen=True)
class Suite:
    """A table of the paper: every algorithm on every dataset with every seed, as in ``Options``."""

    algorithms: tuple[str, ...]
    datasets: tuple[str, ...]
    seeds: tuple[int, ...]
    pretrain_dataset: str | None = None
    top: float | None = None
    # How cuts treat equal returns, by dataset, where the preset's way would keep nothing.
    ties: Mapping[str, Ties] = field(default_factory=dict)


_ROBOTS = ("halfcheetah", "hopper", "walker2d")
# Without --suite.
SINGLE = Suite(("iw-sft-q",), (DEFAULT,), (0,))
SUITES: Mapping[str, Suite] = {
    # Tables 2 and 5. Returns of AntMaze are 0 or 1, and most are 1: ">" would keep nothing, ">="
    # keeps those that reach the goal.
    "paper": Suite(
        EVERY_ALGORITHM,
        (
            *(f"{robot}-medium-replay-v2" for robot in _ROBOTS),
            *(f"{robot}-medium-expert-v2" for robot in _ROBOTS),
            "antmaze-umaze-v0",
        ),
        seeds=(0, 1, 2, 3, 4),
        ties={"antmaze-umaze-v0": ">="},
    ),
    "locomotion": Suite(
        EVERY_ALGORITHM,
        tuple(
            f"{robot}-{kind}-v2"
            for kind in ("medium-replay", "medium-expert", "medium", "expert", "random")
            for robot in _ROBOTS
        ),
        seeds=(0, 1, 2, 3, 4),
    ),
    # Table 3, three runs of each. Its "BC (5%)" is "bc-5", its "BC (all data)" is "bc" of the
    # fine-tuning data.
    "kitchen": Suite(
        ("bc", "bc-5", "sft", "sft-q", "iw-sft-q"),
        ("kitchen-complete-v0", "kitchen-mixed-v0"),
        seeds=(0, 1, 2),
        pretrain_dataset="kitchen-partial-v0",
        top=5.0,
    ),
}
