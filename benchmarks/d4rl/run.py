"""A run of control: its settings, its data, and its ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase

import baselines
from baselines import Baseline
from benchmarks import runs
from benchmarks.commands import typed
from benchmarks.d4rl import settings as paper
from benchmarks.d4rl.options import (
    SUITES,
    TO,
    Algorithm,
    Options,
    find_algorithm,
    parts_of,
    without_effect,
)
from benchmarks.options import to_config
from benchmarks.runs import hardware, tell, versions
from iwsft import datasets, environments
from iwsft.curation import Ties, curate, join
from iwsft.datasets import OfflineDataset
from iwsft.datasets.actions import describe
from iwsft.datasets.dataset import WHOLE, fingerprint_of
from iwsft.evaluation import Evaluation, evaluate
from iwsft.objective import Proposal
from iwsft.presets import ImportanceWeights
from iwsft.training import Schedule
from iwsft.trajectory import (
    ACTION,
    MULTIPLICITY,
    OBSERVATION,
    STANDARD_SCORE,
    lengths,
    select,
)


@dataclass(frozen=True)
class Run(runs.Run[Options]):
    """A run of control, on the dataset that is loaded by the name or path ``source``."""

    source: str
    # Name in tables of settings, where it is not that of the folders.
    name_in_tables: str | None = None
    benchmark = "d4rl"

    @property
    def root(self) -> Path:
        """Folder of all runs of the variant."""
        return self.options.out / self.options.variant

    @property
    def baseline(self) -> Baseline | None:
        """Module of an algorithm that is not the paper's."""
        return baselines.algorithm(self.algo) if self.algo in baselines.BASELINES else None

    @property
    def algorithm(self) -> Algorithm:
        """Description of the algorithm, with the cuts of ``--top``."""
        algorithm = find_algorithm(self.algo)
        top = self.options.top
        if top is None or not algorithm.from_reference:
            return algorithm
        # Finer bins keep their share of the coarsest.
        cuts = tuple(100 - (100 - cut) * top / 10 for cut in algorithm.cuts)
        return replace(algorithm, cuts=cuts)

    @property
    def ties(self) -> Ties | None:
        """How cuts treat equal returns, where it is not the preset's way."""
        if self.options.ties is None and self.options.suite is not None and self.algorithm.cuts:
            return SUITES[self.options.suite].ties.get(self.source)
        return self.options.ties

    @property
    def baseline_settings(self) -> tuple[Any, str]:
        """Settings of a baseline, and their source in words."""
        assert self.baseline is not None
        settings, source = self.baseline.published(self.table_name)
        steps = self.options.baseline_steps or self.options.steps
        return (settings if steps is None else replace(settings, steps=steps)), source

    @property
    def fine_tuning(self) -> tuple[paper.FineTuning, str]:
        """Settings of the fine-tuning, and their source in words."""
        row, source = paper.find_fine_tuning(self.table_name, self.algorithm)
        steps, k, alpha = self.options.steps, self.options.temperature, self.options.alpha
        if steps is not None:
            # A shortened run warms up for the same share of its updates.
            row = replace(row, steps=steps, warmup=row.warmup * steps // row.steps)
        if k is not None and self.algorithm.per_trajectory:
            row = replace(row, k=k)
        if alpha is not None and self.algorithm.weighted:
            row = replace(row, alpha=alpha)
        return row, source

    @property
    def schedule(self) -> Schedule:
        """Schedule of the fine-tuning, or of the cloning of a run that starts from scratch."""
        if self.algorithm.from_reference:
            row, _ = self.fine_tuning
            return Schedule(row.steps, row.lr, row.warmup)
        steps = self.options.steps
        return self.reference_schedule if steps is None else replace(paper.CLONING, steps=steps)

    @property
    def reference_schedule(self) -> Schedule:
        """Schedule of the reference policy."""
        return replace(paper.CLONING, steps=self.options.reference_steps)

    @property
    def uses_reference(self) -> bool:
        """Whether the run starts at the reference policy, or is its training."""
        if self.algorithm.from_reference or self.baseline is not None:
            return self.algorithm.from_reference
        same = self.schedule == self.reference_schedule and self.options.pretrain_dataset is None
        return same and not self.algorithm.cuts

    @property
    def weights(self) -> ImportanceWeights:
        """Importance weights of the fine-tuning."""
        row, algorithm = self.fine_tuning[0], self.algorithm
        chosen: dict[str, Any] = {"related": algorithm.related, "per_step": algorithm.per_step}
        if algorithm.per_trajectory:
            chosen |= {name: getattr(self.options, name) for name in ("q", "target_ess")}
        return paper.choose_weights(self.options.preset, row, **chosen)

    @property
    def proposal(self) -> Proposal:
        """What q is in the fine-tuning; q = pi_ref leaves all weights at 1."""
        algorithm = self.algorithm
        if not algorithm.weighted:
            return "reference"
        if algorithm.related and algorithm.per_step:
            return "current"
        return "cached" if self.options.estimator == "steps" else "lagged"

    @property
    def why_unsynced(self) -> str | None:
        """Why cached weights stay at 1, in words; None if a sync of q comes before the end."""
        row, _ = self.fine_tuning
        if self.proposal != "cached" or row.steps > row.sync_every:
            return None
        return (
            f"q is synced every {row.sync_every} updates, so --steps {row.steps} leaves all "
            "weights at 1, as in SFT; pass more, or a smaller --alpha"
        )

    @property
    def chooses_q(self) -> bool:
        """Whether the returns of the data choose the weights."""
        algorithm = self.algorithm
        chooses = algorithm.per_trajectory and algorithm.related is None
        return chooses and self.options.q is not None

    @property
    def updates(self) -> int:
        """Number of updates, without those of the reference policy."""
        return self.schedule.steps if self.baseline is None else self.baseline_settings[0].steps

    @property
    def published_updates(self) -> int:
        """Number of updates without options that change it."""
        options = replace(
            self.options, steps=None, baseline_steps=None, reference_steps=paper.CLONING.steps
        )
        return replace(self, options=options).updates

    @property
    def table_name(self) -> str:
        """Name of the dataset in tables of settings."""
        known = self.options.settings_of or self.name_in_tables
        return known or self.dataset.rpartition(TO)[2]

    def curate(self, trajectories: TensorDictBase, parts: Sequence[int] = ()) -> TensorDictBase:
        """The trajectories that the algorithm trains on; each of the parts is cut by itself."""
        cuts, signed = self.algorithm.cuts, self.algorithm.signed
        if not cuts and not signed:
            return trajectories
        weight = paper.weigh_returns if signed else None
        ties = self.ties or paper.TIES[self.options.preset]
        chosen = [trajectories]
        if len(parts) > 1:
            numbers = torch.arange(sum(parts), device=trajectories.device).split(list(parts))
            chosen = [select(trajectories, part) for part in numbers]
        try:
            curated = [
                curate(part, cuts=cuts, ties=ties, weight=weight, seed=self.seed) for part in chosen
            ]
        except ValueError as error:
            how = self.algo if signed else f"{self.algo}, --ties {ties}"
            raise ValueError(f"{how}: {error}") from error
        return join(*curated) if len(parts) > 1 else curated[0]


@dataclass(frozen=True)
class Task:
    """The data of a run, with the environment that policies are scored in."""

    dataset: OfflineDataset
    # Data that the reference policy is cloned on; ``dataset`` where there are no others.
    pretrain: OfflineDataset
    # Number of trajectories of each dataset that ``dataset`` joins.
    parts: tuple[int, ...] = ()

    @classmethod
    def load(cls, source: str, pretrain_source: str | None = None, *, trust: bool = False) -> Task:
        """Load data by names or paths; ``A+B`` joins two, ``trust`` is ``trust_env_module``."""
        loaded = [
            datasets.load(part, scale_actions=True, trust_env_module=trust)
            for part in parts_of(source)
        ]
        parts = tuple(len(lengths(each.trajectories)) for each in loaded)
        data = loaded[0] if len(loaded) == 1 else _joined(loaded)
        modules = environments.modules_to_import(data.env_id or "", data.env_kwargs)
        if modules and not trust:
            raise ValueError(
                f"{data.name} imports {modules}; pass --trust-env-module if you trust it"
            )
        if pretrain_source is None:
            return cls(data, data, parts)
        before = datasets.load(pretrain_source, scale_actions=True, trust_env_module=trust)
        for key in (OBSERVATION, ACTION):
            size, needed = (part.trajectories.get(key).shape[-1] for part in (before, data))
            if size != needed:
                problem = f"has {key}s of size {size}, {data.name} of size {needed}"
                way_out = "pre-train on data of the same robot"
                raise ValueError(f"--pretrain-dataset {before.name} {problem}; {way_out}")
        # Both are mapped to [-1, 1], where the same number must be the same action.
        theirs, ours = (part.env_kwargs.get("action_bounds", WHOLE) for part in (before, data))
        if not all(np.allclose(a, b) for a, b in zip(theirs, ours, strict=True)):
            problem = f"has actions of the bounds {describe(theirs)}, {data.name} {describe(ours)}"
            way_out = "name the same environment in both (the file's attribute env_id)"
            raise ValueError(f"--pretrain-dataset {before.name} {problem}; {way_out}")
        if before.fingerprint == data.fingerprint:
            raise ValueError(f"--pretrain-dataset {before.name} holds the same data as --dataset")
        return cls(data, before, parts)

    @property
    def env_id(self) -> str:
        """The environment that policies are scored in."""
        if self.dataset.env_id is None:
            way_out = "write its gymnasium id into the file's attribute env_id"
            raise ValueError(f"{self.dataset.name} names no environment to score in; {way_out}")
        return self.dataset.env_id

    def check_environment(self) -> None:
        """Check that policies of the data fit the environment."""
        with closing(environments.make(self.env_id, **self.dataset.env_kwargs)) as env:
            given = environments.flattener(env)(env.reset(seed=0)[0]).shape[-1]
            actions = env.action_space
        observation_dim, action_dim = sizes(self.dataset.trajectories)
        problem = None
        if given != observation_dim:
            problem = f"{OBSERVATION}s of size {observation_dim}, {self.env_id} gives size {given}"
        elif not isinstance(actions, gym.spaces.Box) or actions.shape != (action_dim,):
            problem = f"actions of size {action_dim}, {self.env_id} takes {actions}"
        if problem is not None:
            way_out = "score it in its own environment (the file's attribute env_id)"
            raise ValueError(f"{self.dataset.name} has {problem}; {way_out}")

    def score(self, policy: TensorDictModuleBase, **options: Any) -> Evaluation:
        """Run a policy in the environment of the data, see :func:`iwsft.evaluation.evaluate`."""
        scores, env_kwargs = self.dataset.reference_scores, self.dataset.env_kwargs
        evaluation = evaluate(
            policy, self.env_id, reference_scores=scores, env_kwargs=env_kwargs, **options
        )
        if not math.isfinite(evaluation.return_mean):
            raise FloatingPointError(f"{self.env_id} gave rewards that are not finite: no score")
        return evaluation


def _joined(parts: Sequence[OfflineDataset]) -> OfflineDataset:
    """Several datasets of one environment as one, in their order."""
    first = parts[0]
    for part in parts[1:]:
        if (part.env_id, part.env_kwargs) != (first.env_id, first.env_kwargs):
            raise ValueError(f"{first.name} and {part.name} are of different environments")
    whole = join(*(part.trajectories for part in parts)).exclude(MULTIPLICITY)
    assert isinstance(whole, TensorDict)
    return replace(
        first,
        trajectories=whole,
        name="+".join(part.name for part in parts),
        source="+".join(part.source for part in parts),
        fingerprint=fingerprint_of(whole),
        notes=tuple(note for part in parts for note in part.notes),
    )


def sizes(trajectories: TensorDictBase) -> tuple[int, int]:
    """Sizes of observation and action."""
    return trajectories.get(OBSERVATION).shape[-1], trajectories.get(ACTION).shape[-1]


def check_run(run: Run, task: Task) -> None:
    """Check that a run fits its data: curated set, weights, critics."""
    if run.baseline is not None:
        # A baseline checks its data when it is built.
        run.baseline.build(task.dataset.trajectories, run.baseline_settings[0], seed=run.seed)
        return
    data = run.curate(task.dataset.trajectories, task.parts)
    if run.algorithm.from_reference:
        run.weights.check_overflow(int(lengths(data).max()))
    reason = why_unweighted(data) if run.chooses_q else None
    if reason := reason or run.why_unsynced:
        tell(f"{run.dataset} {run.algo}: {reason}")


def why_unweighted(curated: TensorDictBase) -> str | None:
    """Why ``--q auto`` leaves all weights of a curated set at 1, in words; None if it does not."""
    scores, count = curated.get(STANDARD_SCORE), len(lengths(curated))
    if bool((scores != scores[0]).any()):
        return None
    which = f"all {count} curated trajectories have the same return"
    if count == 1:
        which = "the curated set is one trajectory"
    return f"{which}, so --q auto leaves all weights at 1, as in SFT"


def settings_of(run: Run, task: Task) -> dict[str, Any]:
    """The values that decide a run's numbers; a checkpoint must agree with them."""
    common = {"data": task.dataset.fingerprint, "seed": run.seed}
    if run.baseline is not None:
        settings, source = run.baseline_settings
        return common | {"algo": run.algo, "baseline": asdict(settings), "settings_from": source}
    common |= {
        "preset": run.options.preset,
        "estimator": run.options.estimator,
        "algo": run.algo,
        "cuts": list(run.algorithm.cuts),
        # The preset decides otherwise.
        **({} if run.ties is None else {"ties": run.ties}),
        **_form_of(run),
    }
    if not run.algorithm.from_reference:
        return {**common, "cloning": _as_recorded(run.schedule)}
    row, source = run.fine_tuning
    hard = run.options.estimator == "steps" or run.weights.reference == "synced"
    return {
        **common,
        "fine_tuning": asdict(row),
        "settings_from": source,
        "reference": _as_recorded(run.reference_schedule),
        **({} if task.pretrain is task.dataset else {"pretrain": task.pretrain.fingerprint}),
        **({"q": run.options.q} if run.chooses_q else {}),
        **({"weights": repr(run.weights)} if run.algorithm.related else {}),
        "target_ess": run.options.target_ess if run.algorithm.per_trajectory else None,
        "sync_every": row.sync_every if hard else 1,
    }


def reference_settings_of(run: Run, task: Task) -> dict[str, Any]:
    """The values that decide the reference policy."""
    return {
        "data": task.pretrain.fingerprint,
        "seed": run.seed,
        "estimator": run.options.estimator,
        "batch": paper.CLONING_BATCH[run.options.estimator][run.options.preset],
        "schedule": _as_recorded(run.reference_schedule),
        **_form_of(run),
    }


def _form_of(run: Run) -> dict[str, str]:
    """The form of the policy, where it is not a Gaussian."""
    return {"policy": "mixture"} if run.options.policy == "mixture" else {}


def _as_recorded(schedule: Schedule) -> dict[str, Any]:
    """The fields of a schedule that the paper's runs set."""
    return {name: getattr(schedule, name) for name in ("steps", "lr", "warmup", "decay")}


def options_of(run: Run) -> dict[str, Any]:
    """The options of this run alone, which ``--config`` takes back."""
    alone = replace(
        run.options,
        suite=None,
        algo=(run.algo,),
        dataset=(run.source,),
        seeds=(run.seed,),
        ties=run.ties,
    )
    unused = [name for name, _ in without_effect(alone, (run.algo,))]
    return to_config(alone, without=("out", "resume", "stack_seeds", *unused))


def config_of(run: Run, task: Task) -> dict[str, Any]:
    """The content of ``config.json``."""
    return {
        **run.identity,
        "source": task.dataset.source,
        "notes": list(task.dataset.notes),
        "env_id": task.dataset.env_id,
        "env_kwargs": dict(task.dataset.env_kwargs),
        "preset": run.options.preset,
        "estimator": run.options.estimator,
        "settings": settings_of(run, task),
        "eval_episodes": run.options.eval_episodes,
        "versions": versions(),
        "hardware": hardware(run.options.device),
        "command": typed("d4rl"),
        "options": options_of(run),
    }
