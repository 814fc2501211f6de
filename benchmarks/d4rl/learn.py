"""From data to a trained policy: cloning, fine-tuning from a reference, or a baseline."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase

from benchmarks.d4rl import settings as paper
from benchmarks.d4rl.plan import BENCHMARK, Plan, reference_settings, settings_of
from benchmarks.d4rl.task import Task
from benchmarks.runs import alone_in
from iwsft.curation import curate
from iwsft.diagnostics import diagnose, weighted_mean
from iwsft.objective import ImportanceWeightedMLE, Proposal
from iwsft.policies import GaussianPolicy
from iwsft.proposals import EMA, HardSync
from iwsft.samplers import StepSampler, TrajectorySampler
from iwsft.training import Cost, Probe, Row, Schedule, fit
from iwsft.trajectory import ACTION, OBSERVATION, REWARD, Segments

# Told of the stage, its number of updates, and a row of metrics.
Say = Callable[[str, int, Row], None]
# Return of a step's trajectory; batches carry it along for the look at the weights.
_RETURN = "trajectory_return"
_CURVE_POINTS = 10
# Seeds of the learning curve's episodes, apart from those of the final score.
_CURVE_SEED = 10_000


def curated(plan: Plan, everything: TensorDictBase) -> TensorDictBase:
    """The trajectories that the algorithm trains on."""
    if not plan.cuts:
        return everything
    return curate(everything, cuts=plan.cuts, ties=plan.cut_ties, seed=plan.seed)


def reference(plan: Plan, task: Task, say: Say) -> tuple[GaussianPolicy, Path, Cost]:
    """The reference policy of a seed: behaviour cloning on all data, trained once and kept.

    Its folder is named by its settings, so that runs that share them share it; a second process
    waits for the first.
    """
    settings = reference_settings(plan, task)
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    root = Path(plan.out) / BENCHMARK / task.pretrain.name / "reference"
    # Not "seed-...", which is the name of a run's folder.
    folder = root / f"{key}-seed-{plan.seed}"
    before = Task(task.pretrain.name, task.pretrain, task.pretrain)
    data = task.pretrain.trajectories.to(plan.device)
    with alone_in(folder, wait=True):
        policy, cost = clone(
            plan, before, data, plan.reference, folder, settings, partial(say, "reference")
        )
    return policy, folder, cost


def clone(
    plan: Plan,
    task: Task,
    data: TensorDictBase,
    schedule: Schedule,
    folder: Path,
    settings: dict[str, Any],
    say: Callable[[int, Row], None],
) -> tuple[GaussianPolicy, Cost]:
    """Behaviour cloning from scratch: the mean over trajectories of -log p / length."""
    torch.manual_seed(plan.seed)
    policy = gaussian(*sizes(data)).to(plan.device)
    cost = fit(
        ImportanceWeightedMLE(policy, proposal="reference"),
        sampler(plan, data, paper.CLONING_BATCH[plan.estimator, plan.preset]),
        schedule,
        probes=curve(plan, task, policy, schedule.steps),
        folder=folder,
        settings=settings,
        log_every=max(1, schedule.steps // 100),
        checkpoint_every=checkpoints(schedule.steps),
        report=partial(say, schedule.steps),
    )
    return policy, cost


def sizes(data: TensorDictBase) -> tuple[int, int]:
    """Sizes of observation and action."""
    return data.get(OBSERVATION).shape[-1], data.get(ACTION).shape[-1]


def gaussian(observation_dim: int, action_dim: int) -> GaussianPolicy:
    """The policy of all of the paper's algorithms (Appendix F)."""
    return GaussianPolicy(observation_dim, action_dim)


def sampler(plan: Plan, data: TensorDictBase, batch: int) -> StepSampler | TrajectorySampler:
    """The sampler of the plan's estimator."""
    kind = StepSampler if plan.estimator == "steps" else TrajectorySampler
    return kind(data, batch, seed=plan.seed)


def curve(plan: Plan, task: Task, policy: TensorDictModuleBase, steps: int) -> list[Probe]:
    """Episodes now and then, on seeds of their own."""

    def look(_: TensorDictBase) -> Row:
        few = min(plan.curve_episodes, plan.eval_episodes)
        result = task.score(policy, episodes=few, seed=plan.seed + _CURVE_SEED, device=plan.device)
        if result.score is None:
            return {"return_mean": result.return_mean}
        return {"return_mean": result.return_mean, "normalized_score": result.score}

    return [Probe(max(1, steps // _CURVE_POINTS), look)] if plan.curve_episodes else []


def checkpoints(steps: int) -> int:
    """Updates between checkpoints."""
    return min(500, max(1, steps // 10))


def weights(loss: ImportanceWeightedMLE, every: int, whole: TensorDictBase | None) -> Probe:
    """A closer look at the weights, and at the mean return of what they choose."""

    def look(batch: TensorDictBase) -> Row:
        seen = batch if whole is None else whole
        terms = loss.terms(seen)
        chosen = weighted_mean(seen.get(_RETURN), terms.log_weight.exp(), terms.share)
        return diagnose(loss, seen, terms) | {"weighted_return": float(chosen)}

    return Probe(every, look)


def fine_tune(
    plan: Plan,
    task: Task,
    data: TensorDictBase,
    policy: GaussianPolicy,
    folder: Path,
    say: Say,
) -> Cost:
    """(iw-)SFT from the reference policy on curated, annotated trajectories."""
    row, _ = plan.row(task)
    algorithm = plan.algorithm
    along = Segments.of(data)
    data.set(_RETURN, along.spread(along.sum(data.get(REWARD))))
    by_steps = plan.estimator == "steps"
    # q = pi_ref leaves all weights at 1.
    lag: Proposal = "cached" if by_steps else "lagged"
    loss = ImportanceWeightedMLE(
        policy,
        importance_weights=plan.weights(task),
        proposal=lag if algorithm.weighted else "reference",
    )
    updater: HardSync | EMA | None = None
    if algorithm.weighted:
        updater = (
            HardSync(loss, every=row.sync_every, trajectories=data)
            if by_steps
            else EMA(loss, decay=row.alpha)
        )
    look: list[Probe] = []
    if algorithm.weighted:
        every = row.sync_every if by_steps else max(1, row.steps // 100)
        # Single steps have no trajectory weights: the whole curated set is looked at instead.
        look = [weights(loss, every, data if by_steps else None)]
    return fit(
        loss,
        sampler(plan, data, paper.FINE_TUNING_BATCH[plan.estimator]),
        plan.tuning(task),
        updater=updater,
        probes=[*curve(plan, task, policy, row.steps), *look],
        folder=folder,
        settings=settings_of(plan, task),
        log_every=max(1, row.steps // 100),
        checkpoint_every=checkpoints(row.steps),
        report=partial(say, "tuning", row.steps),
    )


def baseline(
    plan: Plan, task: Task, data: TensorDictBase, folder: Path, say: Say
) -> tuple[TensorDictModuleBase, Cost]:
    """Train one of :mod:`baselines` on all data."""
    assert plan.baseline is not None
    settings, _ = plan.baseline_settings(task)
    learner = plan.baseline.build(data, settings, seed=plan.seed)
    cost = fit(
        learner.loss,
        learner.sampler,
        learner.schedule,
        updater=learner.updater,
        limits=learner.limits,
        probes=curve(plan, task, learner.policy, settings.steps),
        folder=folder,
        settings=settings_of(plan, task),
        log_every=max(1, settings.steps // 100),
        checkpoint_every=checkpoints(settings.steps),
        report=partial(say, plan.algo, settings.steps),
    )
    return learner.policy, cost
