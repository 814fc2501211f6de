"""What a run is: its settings, its folder, and the claim on it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from benchmarks.d4rl import settings as paper
from benchmarks.provenance import hardware, versions, write_json
from iwsft import checkpoint
from iwsft.checkpoint import CheckpointError, differences
from iwsft.curation import Ties
from iwsft.datasets import OfflineDataset
from iwsft.files import full_disk_named
from iwsft.training import Schedule
from iwsft.weights import ImportanceWeights

BENCHMARK = "d4rl"


@dataclass(frozen=True)
class Plan:
    """Everything a run hangs on; plain values. See ``benchmarks.d4rl.arguments.Arguments``."""

    algo: str
    dataset: str
    seed: int
    preset: paper.Preset
    estimator: paper.Estimator
    steps: int | None
    reference_steps: int
    temperature: float | None
    target_ess: float | None
    eval_episodes: int
    device: str
    out: str
    resume: bool
    ties: Ties | None = None

    def __str__(self) -> str:
        return f"{self.algo} seed {self.seed}"

    @property
    def algorithm(self) -> paper.Algorithm:
        """What the name stands for."""
        return paper.ALGORITHMS[self.algo]

    @property
    def reference(self) -> Schedule:
        """Schedule of the reference policy."""
        return replace(paper.CLONING, steps=self.reference_steps)

    @property
    def cloning(self) -> Schedule:
        """Schedule of a run that clones from scratch."""
        return self.reference if self.steps is None else replace(paper.CLONING, steps=self.steps)

    @property
    def cut_ties(self) -> Ties:
        """How cuts treat equal returns."""
        return self.ties or paper.TIES[self.preset]

    def folder(self, dataset: OfflineDataset) -> Path:
        """Where the run writes."""
        return Path(self.out) / BENCHMARK / dataset.name / self.algo / f"seed-{self.seed}"

    def row(self, dataset: OfflineDataset) -> tuple[paper.FineTuning, str]:
        """Settings of the fine-tuning after the command line's, and where they come from."""
        row, source = paper.fine_tuning(dataset.name, self.algorithm)
        if self.steps is not None:
            # A shortened run warms up for the same share of it.
            row = replace(row, steps=self.steps, warmup=row.warmup * self.steps // row.steps)
        if self.temperature is not None:
            row = replace(row, k=self.temperature)
        return row, source

    def tuning(self, dataset: OfflineDataset) -> Schedule:
        """Schedule of the fine-tuning."""
        row, _ = self.row(dataset)
        return Schedule(row.steps, row.lr, row.warmup)

    def weights(self, dataset: OfflineDataset) -> ImportanceWeights:
        """Importance weights of the fine-tuning."""
        row, _ = self.row(dataset)
        return paper.importance_weights(
            self.preset, row, per_step=self.algorithm.per_step, target_ess=self.target_ess
        )

    def total_steps(self, dataset: OfflineDataset) -> int:
        """Updates of the run, the reference's apart."""
        if self.algorithm.from_reference:
            return self.tuning(dataset).steps
        return self.cloning.steps


def settings_of(plan: Plan, dataset: OfflineDataset) -> dict[str, Any]:
    """The values that decide the numbers: what a checkpoint must agree with."""
    common = {
        "data": dataset.fingerprint,
        "seed": plan.seed,
        "preset": plan.preset,
        "estimator": plan.estimator,
        "algo": plan.algo,
        "cuts": list(plan.algorithm.cuts),
        # The preset names them otherwise.
        **({} if plan.ties is None else {"ties": plan.ties}),
    }
    if not plan.algorithm.from_reference:
        return {**common, "cloning": asdict(plan.cloning)}
    row, source = plan.row(dataset)
    return {
        **common,
        "fine_tuning": asdict(row),
        "settings_from": source,
        "reference": asdict(plan.reference),
        "target_ess": plan.target_ess,
        "sync_every": row.sync_every if plan.estimator == "steps" else 1,
    }


def claim(plans: Sequence[Plan], dataset: OfflineDataset) -> list[Plan]:
    """Claim the folders of all runs, or none, by writing ``config.json``; the unfinished runs.

    Raises:
        FileExistsError: folders that hold a run, and ``resume`` is off.
        CheckpointError: with ``resume``, folders that hold one of other settings.
        OSError: ``out`` can't be written.
    """
    root = Path(plans[0].out) / BENCHMARK / dataset.name
    with full_disk_named(root):
        root.mkdir(parents=True, exist_ok=True)
    # Two commands at once don't both find a folder free.
    with FileLock(root / ".claim.lock"):
        configs = {plan: config_of(plan, dataset) for plan in plans}
        held = {plan: _held(plan.folder(dataset)) for plan in plans}
        taken = [str(plan.folder(dataset)) for plan in plans if held[plan] is not None]
        if taken and not plans[0].resume:
            raise FileExistsError(
                f"{', '.join(taken)}: {'a run is' if len(taken) == 1 else 'runs are'} there "
                "already; pass --resume to continue and to keep what is finished, or another --out"
            )
        for plan in plans:
            config = held[plan]
            if config is not None:
                _check_same(plan.folder(dataset), config, configs[plan])
        free = [plan for plan in plans if held[plan] is None]
        try:
            for plan in free:
                write_json(plan.folder(dataset) / "config.json", configs[plan])
        except OSError:
            for plan in free:
                (plan.folder(dataset) / "config.json").unlink(missing_ok=True)
            raise
    return [plan for plan in plans if not (plan.folder(dataset) / "result.json").exists()]


@contextmanager
def alone_in(folder: Path, *, wait: bool) -> Iterator[None]:
    """Keep other processes out of a folder that trains, and clear what a killed one left half-way.

    Args:
        folder: made where it is missing.
        wait: until another process is done.

    Raises:
        FileExistsError: another process works there, and ``wait`` is off.
    """
    with full_disk_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(folder / ".lock").acquire(timeout=-1 if wait else 0)
    except Timeout as error:
        raise FileExistsError(
            f"another process works in {folder}; wait for it or end it, then pass --resume"
        ) from error
    with held:
        for stale in (folder / checkpoint.FOLDER).glob(".*.partial"):
            stale.unlink()
        yield


def config_of(plan: Plan, dataset: OfflineDataset) -> dict[str, Any]:
    """What ``config.json`` holds."""
    return {
        "benchmark": BENCHMARK,
        "dataset": dataset.name,
        "source": dataset.source,
        "algo": plan.algo,
        "seed": plan.seed,
        "env_id": dataset.env_id,
        "preset": plan.preset,
        "estimator": plan.estimator,
        "settings": settings_of(plan, dataset),
        "eval_episodes": plan.eval_episodes,
        "versions": versions(),
        "hardware": hardware(plan.device),
        "command": " ".join(["python -m benchmarks.d4rl", *sys.argv[1:]]),
    }


def _held(folder: Path) -> dict[str, Any] | None:
    """The ``config.json`` of a folder; empty where only a result stands, None where no run is."""
    path = folder / "config.json"
    if not path.exists():
        return {} if (folder / "result.json").exists() else None
    try:
        config = json.loads(path.read_text())
        return {"settings": config["settings"], "eval_episodes": config["eval_episodes"]}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not what a run writes ({type(error).__name__}: {error}); move {folder} "
            "away, or choose another --out"
        ) from error


def _check_same(folder: Path, held: dict[str, Any], config: dict[str, Any]) -> None:
    # Another number of episodes would give a result that its config does not describe.
    keys = ("settings", "eval_episodes")
    differ = differences({k: held.get(k) for k in keys}, {k: config[k] for k in keys})
    if differ:
        raise CheckpointError(
            f"{folder} holds a run with other settings: {differ}; run with those, or choose "
            "another --out"
        )
