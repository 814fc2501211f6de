"""What a run is: its settings, its folder, and the claim on it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import baselines
from baselines import Baseline
from benchmarks import runs
from benchmarks.d4rl import settings as paper
from benchmarks.d4rl.task import Task
from benchmarks.runs import hardware, versions
from iwsft.curation import Ties
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
    pretrain_dataset: str | None = None
    top: float | None = None
    alpha: float | None = None
    variant: str = ""
    curve_episodes: int = 10

    def __str__(self) -> str:
        return f"{self.algo} seed {self.seed}"

    @property
    def algorithm(self) -> paper.Algorithm:
        """What the name of one of the paper's algorithms stands for."""
        found = paper.algorithm(self.algo)
        if found.from_reference and self.top is not None:
            return replace(found, cuts=paper.top_cuts(found.cuts, self.top))
        return found

    @property
    def baseline(self) -> Baseline | None:
        """The module of an algorithm that is not the paper's."""
        return baselines.algorithm(self.algo) if self.algo in baselines.BASELINES else None

    @property
    def from_reference(self) -> bool:
        """Whether the run starts at a reference policy."""
        return self.baseline is None and self.algorithm.from_reference

    @property
    def cuts(self) -> tuple[float, ...]:
        """Percentiles that curate the data; none is all data."""
        return self.algorithm.cuts if self.baseline is None else ()

    @property
    def weighted(self) -> bool:
        """Whether trajectories are weighed as wholes."""
        return self.from_reference and self.algorithm.weighted and not self.algorithm.per_step

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

    def folder(self, task: Task) -> Path:
        """Where the run writes."""
        root = Path(self.out) / self.variant / BENCHMARK / task.name
        return root / self.algo / f"seed-{self.seed}"

    def row(self, task: Task) -> tuple[paper.FineTuning, str]:
        """Settings of the fine-tuning after the command line's, and where they come from."""
        row, source = paper.fine_tuning(task.dataset.name, self.algorithm)
        if self.steps is not None:
            # A shortened run warms up for the same share of it.
            row = replace(row, steps=self.steps, warmup=row.warmup * self.steps // row.steps)
        if self.temperature is not None and self.weighted:
            row = replace(row, k=self.temperature)
        if self.alpha is not None and self.from_reference and self.algorithm.weighted:
            row = replace(row, alpha=self.alpha)
        return row, source

    def tuning(self, task: Task) -> Schedule:
        """Schedule of the fine-tuning."""
        row, _ = self.row(task)
        return Schedule(row.steps, row.lr, row.warmup)

    def weights(self, task: Task) -> ImportanceWeights:
        """Importance weights of the fine-tuning."""
        row, _ = self.row(task)
        return paper.importance_weights(
            self.preset,
            row,
            per_step=self.algorithm.per_step,
            target_ess=self.target_ess if self.weighted else None,
        )

    def baseline_settings(self, task: Task) -> tuple[Any, str]:
        """Settings of a baseline after the command line's, and where they come from."""
        assert self.baseline is not None
        settings, source = self.baseline.published(task.dataset.name)
        return (settings if self.steps is None else replace(settings, steps=self.steps)), source

    def steps_of(self, task: Task) -> tuple[int, int]:
        """Updates of the run, the reference's apart, and the published number of them."""
        published = replace(self, steps=None)
        if self.baseline is not None:
            return self.baseline_settings(task)[0].steps, published.baseline_settings(task)[0].steps
        if self.from_reference:
            return self.tuning(task).steps, published.tuning(task).steps
        return self.cloning.steps, paper.CLONING.steps


def settings_of(plan: Plan, task: Task) -> dict[str, Any]:
    """The values that decide the numbers: what a checkpoint must agree with."""
    common: dict[str, Any] = {
        "data": task.dataset.fingerprint,
        "seed": plan.seed,
    }
    if plan.baseline is not None:
        settings, source = plan.baseline_settings(task)
        return {
            **common,
            "algo": plan.algo,
            "baseline": asdict(settings),
            "settings_from": source,
        }
    common |= {
        "preset": plan.preset,
        "estimator": plan.estimator,
        "algo": plan.algo,
        "cuts": list(plan.cuts),
        # The preset names them otherwise.
        **({} if plan.ties is None else {"ties": plan.ties}),
    }
    if not plan.from_reference:
        return {**common, "cloning": _recorded(plan.cloning)}
    row, source = plan.row(task)
    return {
        **common,
        "fine_tuning": asdict(row),
        "settings_from": source,
        "reference": _recorded(plan.reference),
        **({} if task.pretrain is task.dataset else {"pretrain": task.pretrain.fingerprint}),
        "target_ess": plan.target_ess if plan.weighted else None,
        "sync_every": row.sync_every if plan.estimator == "steps" else 1,
    }


def reference_settings(plan: Plan, task: Task) -> dict[str, Any]:
    """The values that decide the reference policy."""
    return {
        "data": task.pretrain.fingerprint,
        "seed": plan.seed,
        "estimator": plan.estimator,
        "batch": paper.CLONING_BATCH[plan.estimator, plan.preset],
        "schedule": _recorded(plan.reference),
    }


def _recorded(schedule: Schedule) -> dict[str, Any]:
    """What the paper's runs set of a schedule."""
    return {name: getattr(schedule, name) for name in ("steps", "lr", "warmup", "decay")}


def claim(plans: Sequence[Plan], task: Task) -> list[Plan]:
    """Claim the folders of all runs, or none, by writing ``config.json``; the unfinished runs.

    Raises:
        FileExistsError: folders that hold a run, and ``resume`` is off.
        CheckpointError: with ``resume``, folders that hold one of other settings.
        OSError: ``out`` can't be written.
    """
    root = Path(plans[0].out) / BENCHMARK / task.name
    configs = {plan.folder(task): config_of(plan, task) for plan in plans}
    # Another number of episodes would give a result that its config does not describe.
    same = ("settings", "eval_episodes")
    unfinished = runs.claim(root, configs, same=same, resume=plans[0].resume)
    return [plan for plan in plans if plan.folder(task) in unfinished]


def config_of(plan: Plan, task: Task) -> dict[str, Any]:
    """What ``config.json`` holds."""
    return {
        "benchmark": BENCHMARK,
        "dataset": task.name,
        "source": task.dataset.source,
        "notes": list(task.dataset.notes),
        "algo": plan.algo,
        "seed": plan.seed,
        "env_id": task.dataset.env_id,
        "preset": plan.preset,
        "estimator": plan.estimator,
        "settings": settings_of(plan, task),
        "eval_episodes": plan.eval_episodes,
        "versions": versions(),
        "hardware": hardware(plan.device),
        "command": " ".join(["python -m benchmarks.d4rl", *sys.argv[1:]]),
    }
