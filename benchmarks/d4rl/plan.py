"""What a run is: its settings, its folder, and the claim on it."""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from benchmarks.d4rl import settings as paper
from iwsft.checkpoint import CheckpointError
from iwsft.datasets import OfflineDataset
from iwsft.files import written_whole
from iwsft.training import Schedule

BENCHMARK = "d4rl"
_PACKAGES = ("torch", "tensordict", "torchrl", "gymnasium", "mujoco", "numpy")


@dataclass(frozen=True)
class Plan:
    """Everything a run hangs on; plain values. See ``benchmarks.d4rl.__main__.Arguments``."""

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
        return replace(paper.CLONING, steps=self.steps or self.reference_steps)

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

    def total_steps(self, dataset: OfflineDataset) -> int:
        """Updates of the run, the reference's apart."""
        if self.algorithm.from_reference:
            return self.row(dataset)[0].steps
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


def prepare(plan: Plan, dataset: OfflineDataset) -> bool:
    """Claim the run's folder and write ``config.json``; whether the run is finished already.

    Raises:
        FileExistsError: the folder holds a run and ``resume`` is off.
        CheckpointError: it holds one of other settings.
    """
    folder = plan.folder(dataset)
    config = {
        "benchmark": BENCHMARK,
        "dataset": dataset.name,
        "source": dataset.source,
        "algo": plan.algo,
        "seed": plan.seed,
        "env_id": dataset.env_id,
        "preset": plan.preset,
        "estimator": plan.estimator,
        "settings": json.loads(json.dumps(settings_of(plan, dataset))),
        "eval_episodes": plan.eval_episodes,
        "versions": {"python": platform.python_version(), **{p: version(p) for p in _PACKAGES}},
        "hardware": hardware(plan.device),
        "command": " ".join(["python -m benchmarks.d4rl", *sys.argv[1:]]),
    }
    path = folder / "config.json"
    if path.exists():
        if not plan.resume:
            raise FileExistsError(
                f"{folder} holds a run already; pass --resume to continue it, or another --out"
            )
        held = json.loads(path.read_text())["settings"]
        new = config["settings"]
        differ = sorted(k for k in {*held, *new} if held.get(k) != new.get(k))
        if differ:
            was = ", ".join(f"{k}={held.get(k)!r} (now {new.get(k)!r})" for k in differ)
            raise CheckpointError(
                f"{folder} holds a run with other settings: {was}; run with those, or choose "
                "another --out"
            )
        return (folder / "result.json").exists()
    write_json(path, config)
    return False


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    with written_whole(path) as partial_path:
        partial_path.write_text(json.dumps(content, indent=1) + "\n")


def hardware(device: str) -> dict[str, str | int | None]:
    """What the run runs on."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    return {"device": device, "name": name, "cpus": os.cpu_count(), "system": platform.system()}
