"""Settings of control runs: Appendix F and Table 4 as data, and their weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from benchmarks.d4rl.options import REFERENCE_STEPS, Algorithm, Estimator, Preset
from iwsft.curation import Ties
from iwsft.datasets import OfflineDataset
from iwsft.datasets.catalog import CATALOG, find
from iwsft.presets import ImportanceWeights
from iwsft.training import Schedule
from iwsft.weights import ClipRatio, SelfNormalize, TargetESS


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


_TABLE_4: dict[str, FineTuning] = {
    "halfcheetah-medium-replay": FineTuning(lr=4e-5, alpha=0.995, k=1.0),
    "hopper-medium-replay": FineTuning(lr=1e-4, alpha=0.99, k=1.0, normalize=True),
    "walker2d-medium-replay": FineTuning(steps=2000, alpha=0.9, k=10.0, normalize=True),
    "halfcheetah-expert": FineTuning(lr=4e-5, alpha=0.995, k=0.8),
    "hopper-expert": FineTuning(lr=4e-4, alpha=0.995, k=0.8),
    "walker2d-expert": FineTuning(lr=4e-5, alpha=0.995, k=0.8),
}
# Batches of single steps, or of whole trajectories.
FINE_TUNING_BATCH: Mapping[Estimator, int] = {"steps": 1024, "trajectories": 256}
CLONING_BATCH: Mapping[Estimator, Mapping[Preset, int]] = {
    "steps": {"paper": 256, "authors": 256},
    "trajectories": {"paper": 32, "authors": 128},
}
CLONING = Schedule(steps=REFERENCE_STEPS, lr=1e-3, decay="constant")
TIES: Mapping[Preset, Ties] = {"paper": ">", "authors": ">="}


def name_in_tables(data: OfflineDataset) -> str:
    """The name under which tables of settings know a dataset, whatever its file is called.

    It is D4RL's for data of D4RL, that of the D4RL set which it resembles for a set of
    ``benchmarks.collect sets``, and the family of the environment (``hopper``) for others.
    """
    if data.source == f"the set {data.name} of benchmarks.collect":
        return f"{data.name.replace('-replay', '-medium-replay')}-v2"
    parts = zip(data.name.split("+"), data.source.split("+"), strict=False)
    entries = [find(name) or find(Path(source).name) for name, source in parts]
    if all(entry is not None and entry.env_id == data.env_id for entry in entries):
        return "+".join(entry.name for entry in entries if entry is not None)
    return family_of(data.env_id or "unknown")


def family_of(env_id: str) -> str:
    """The family of an environment, by which tables of settings know its data: ``hopper``."""
    families = {_kind_of(entry.env_id): entry.name.split("-")[0] for entry in CATALOG.values()}
    kind = _kind_of(env_id)
    return families.get(kind, kind.lower())


def _kind_of(env_id: str) -> str:
    """The part of an id that tasks of one family share: AntMaze of AntMaze_UMaze-v4."""
    return re.sub(r"-v\d+$", "", env_id.rpartition(":")[2]).split("_")[0]


def find_fine_tuning(dataset: str, algorithm: Algorithm) -> tuple[FineTuning, str]:
    """The row of Table 4 for a dataset, and its source in words.

    Another dataset takes the row of its environment and kind: ``expert`` where D4RL says so,
    medium-replay otherwise. Unweighted runs use the learning rate of the paper's SFT(Q).
    """
    kind = "expert" if "expert" in dataset else "medium-replay"
    name = f"{dataset.split('-')[0]}-{kind}"
    if name not in _TABLE_4:
        return FineTuning(), f"{dataset} is not in the paper: the row of halfcheetah-medium-replay"
    if not algorithm.weighted:
        return FineTuning(lr=4e-4 if name == "hopper-expert" else 4e-5), "SFT(Q) of Appendix F"
    return _TABLE_4[name], f"Table 4, {name}"


def weigh_returns(returns: Tensor) -> Tensor:
    """Data weights from returns: standard deviations above their mean."""
    # Not the distance to their mean, which has a rounding error.
    if bool((returns == returns[0]).all()):
        raise ValueError(f"all {len(returns)} returns are equal, so none is better than the rest")
    above = returns - returns.mean()
    return above / above.square().mean().sqrt()


def choose_weights(
    preset: Preset,
    row: FineTuning,
    *,
    per_step: bool = False,
    related: str | None = None,
    q: Literal["auto"] | None = None,
    target_ess: float | None = None,
) -> ImportanceWeights:
    """The transforms of a preset; ``q`` and ``target_ess`` choose the temperature instead of k.

    A ``related`` method weighs single steps, and minor_sft the mean log-ratio, as the paper's k
    does: over a whole episode a density ratio is 0 or infinite.
    """
    if related is not None:
        arguments = (row.k,) if related == "minor_sft" else ()
        chain: ImportanceWeights = getattr(ImportanceWeights, related)(*arguments)
        if chain.negative is not None:
            return replace(chain, reduce=None, negative=replace(chain.negative, reduce=None))
        return chain if per_step else replace(chain, reduce="mean")
    if per_step:
        # Ratio clips of the per-step variant: 1 -+ 0.8 (paper, 3.4), [0, 2] (authors' control).
        clip = ClipRatio(0.2, 1.8) if preset == "paper" else ClipRatio(0.0, 2.0)
        return ImportanceWeights(step=(clip,), reduce=None)
    if q is not None:
        return ImportanceWeights.auto()
    if target_ess is not None:
        return ImportanceWeights(trajectory=(TargetESS(target_ess), SelfNormalize()))
    if preset == "authors":
        return ImportanceWeights.authors_control(row.k, row.normalize)
    chain = ImportanceWeights.paper_control(row.k)
    return replace(chain, trajectory=(SelfNormalize(),)) if row.normalize else chain
