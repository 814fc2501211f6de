"""One run: reference, curation, fine-tuning, evaluation, result.

Whatever a kill leaves of it is continued by the same call: training from its last checkpoint, and
all that comes after training is done again from the trained policy.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase

from benchmarks.d4rl import settings as paper
from benchmarks.d4rl.plan import BENCHMARK, Plan, alone_in, settings_of
from benchmarks.provenance import write_json
from iwsft import checkpoint, datasets, metrics
from iwsft.curation import curate
from iwsft.datasets import OfflineDataset
from iwsft.diagnostics import diagnose, weighted_mean
from iwsft.evaluation import Evaluation, evaluate
from iwsft.files import written_whole
from iwsft.objective import ImportanceWeightedMLE, Proposal
from iwsft.policies import GaussianPolicy
from iwsft.proposals import EMA, HardSync
from iwsft.reference import annotate_reference
from iwsft.samplers import StepSampler, TrajectorySampler
from iwsft.training import Cost, Probe, Row, Schedule, fit
from iwsft.trajectory import ACTION, OBSERVATION, REWARD, Segments

# Told of the stage, its number of updates, and a row of metrics.
Say = Callable[[str, int, Row], None]
# Return of a step's trajectory; batches carry it along for the look at the weights.
_RETURN = "trajectory_return"
_CURVE_EPISODES = 10
_CURVE_POINTS = 10
# Seeds of the learning curve's episodes, apart from those of the final score.
_CURVE_SEED = 10_000


def run(plan: Plan, say: Say) -> dict[str, Any]:
    """Train and score one seed; its folder must be claimed (see ``plan.claim``).

    Raises:
        FileExistsError: another process works in the folder.
    """
    # One thread a run: runs beside each other do not fight, and the numbers are the same alone.
    torch.set_num_threads(1)
    dataset = datasets.load(plan.dataset)
    folder = plan.folder(dataset)
    with alone_in(folder, wait=False):
        return _run(plan, dataset, folder, say)


def _run(plan: Plan, dataset: OfflineDataset, folder: Path, say: Say) -> dict[str, Any]:
    everything: TensorDictBase = dataset.trajectories.to(plan.device)
    reference_cost = Cost(0.0, 0.0)
    if plan.algorithm.from_reference:
        policy, kept, reference_cost = reference(plan, dataset, everything, say)
        annotate_reference(policy, everything, cache=kept)
        cost = fine_tune(plan, dataset, curated(plan, everything), policy, folder, say)
    elif plan.algorithm.cuts or plan.cloning != plan.reference:
        settings = settings_of(plan, dataset)
        data = curated(plan, everything)
        policy, cost = clone(
            plan, dataset, data, plan.cloning, folder, settings, partial(say, "cloning")
        )
    else:
        policy, kept, cost = reference(plan, dataset, everything, say)
        _copy_training(kept, folder)
    since_cpu = time.process_time()
    final = assess(plan, dataset, policy, episodes=plan.eval_episodes, seed=plan.seed)
    evaluation_cpu = time.process_time() - since_cpu
    result = {
        "benchmark": BENCHMARK,
        "dataset": dataset.name,
        "algo": plan.algo,
        "seed": plan.seed,
        "env_id": final.env_id,
        "preset": plan.preset,
        "estimator": plan.estimator,
        "steps": plan.total_steps(dataset),
        "normalized_score": final.score,
        "episode_scores": final.normalized_scores,
        "episode_returns": final.returns,
        "episode_lengths": final.lengths,
        "return_mean": final.return_mean,
        "episodes": len(final.returns),
        "wall_seconds": cost.wall_seconds + final.wall_seconds,
        "cpu_seconds": cost.cpu_seconds + evaluation_cpu,
        "reference_wall_seconds": reference_cost.wall_seconds,
        "reference_cpu_seconds": reference_cost.cpu_seconds,
        "versions": final.versions,
    }
    write_json(folder / "result.json", result)
    return result


def curated(plan: Plan, everything: TensorDictBase) -> TensorDictBase:
    """The trajectories that the algorithm trains on."""
    if not plan.algorithm.cuts:
        return everything
    cuts = plan.algorithm.cuts
    return curate(everything, cuts=cuts, ties=plan.cut_ties, seed=plan.seed)


def reference(
    plan: Plan, dataset: OfflineDataset, everything: TensorDictBase, say: Say
) -> tuple[GaussianPolicy, Path, Cost]:
    """The reference policy of a seed: behaviour cloning on all data, trained once and kept.

    Its folder is named by its settings, so that runs that share them share it; a second process
    waits for the first.
    """
    settings = {
        "data": dataset.fingerprint,
        "seed": plan.seed,
        "estimator": plan.estimator,
        "batch": paper.CLONING_BATCH[plan.estimator, plan.preset],
        "schedule": asdict(plan.reference),
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    root = Path(plan.out) / BENCHMARK / dataset.name / "reference"
    # Not "seed-...", which is the name of a run's folder.
    folder = root / f"{key}-seed-{plan.seed}"
    with alone_in(folder, wait=True):
        policy, cost = clone(
            plan, dataset, everything, plan.reference, folder, settings, partial(say, "reference")
        )
    return policy, folder, cost


def _copy_training(source: Path, folder: Path) -> None:
    """Copy what a training left, each file whole, so that a kill leaves nothing that misleads."""
    state, rows = source / checkpoint.FOLDER / checkpoint.FILE, source / metrics.FILE
    for path in (state, rows, *(source / metrics.BOARD).iterdir()):
        with written_whole(folder / path.relative_to(source)) as partial_path:
            shutil.copyfile(path, partial_path)


def clone(
    plan: Plan,
    dataset: OfflineDataset,
    data: TensorDictBase,
    schedule: Schedule,
    folder: Path,
    settings: dict[str, Any],
    say: Callable[[int, Row], None],
) -> tuple[GaussianPolicy, Cost]:
    """Behaviour cloning from scratch: the mean over trajectories of -log p / length."""
    torch.manual_seed(plan.seed)
    sizes = data.get(OBSERVATION).shape[-1], data.get(ACTION).shape[-1]
    policy = GaussianPolicy(*sizes).to(plan.device)
    cost = fit(
        ImportanceWeightedMLE(policy, proposal="reference"),
        sampler(plan, data, paper.CLONING_BATCH[plan.estimator, plan.preset]),
        schedule,
        probes=[curve(plan, dataset, policy, schedule.steps)],
        folder=folder,
        settings=settings,
        log_every=max(1, schedule.steps // 100),
        checkpoint_every=checkpoints(schedule.steps),
        report=partial(say, schedule.steps),
    )
    return policy, cost


def sampler(plan: Plan, data: TensorDictBase, batch: int) -> StepSampler | TrajectorySampler:
    """The sampler of the plan's estimator."""
    kind = StepSampler if plan.estimator == "steps" else TrajectorySampler
    return kind(data, batch, seed=plan.seed)


def curve(plan: Plan, dataset: OfflineDataset, policy: GaussianPolicy, steps: int) -> Probe:
    """A few episodes now and then, on seeds of their own."""

    def look(_: TensorDictBase) -> Row:
        few = min(_CURVE_EPISODES, plan.eval_episodes)
        result = assess(plan, dataset, policy, episodes=few, seed=plan.seed + _CURVE_SEED)
        if result.score is None:
            return {"return_mean": result.return_mean}
        return {"return_mean": result.return_mean, "normalized_score": result.score}

    return Probe(max(1, steps // _CURVE_POINTS), look)


def checkpoints(steps: int) -> int:
    """Updates between checkpoints."""
    return min(500, max(1, steps // 10))


def weights(loss: ImportanceWeightedMLE, every: int, whole: TensorDictBase | None) -> Probe:
    """A closer look at the weights, and at the mean return of what they choose."""

    def look(batch: TensorDictBase) -> Row:
        seen = batch if whole is None else whole
        terms = loss.terms(seen)
        chosen = weighted_mean(seen.get(_RETURN), terms.log_weight.exp(), terms.counts)
        return diagnose(loss, seen, terms) | {"weighted_return": float(chosen)}

    return Probe(every, look)


def environment_of(dataset: OfflineDataset) -> str:
    """The environment a dataset is scored in."""
    if dataset.env_id is None:
        raise ValueError(
            f"{dataset.name} names no environment to score policies in; write its gymnasium id "
            "into the file's attribute env_id"
        )
    return dataset.env_id


def assess(
    plan: Plan, dataset: OfflineDataset, policy: GaussianPolicy, *, episodes: int, seed: int
) -> Evaluation:
    """Roll the policy out in the environment of the data."""
    return evaluate(
        policy,
        environment_of(dataset),
        episodes=episodes,
        seed=seed,
        reference_scores=dataset.reference_scores,
        device=plan.device,
    )


def fine_tune(
    plan: Plan,
    dataset: OfflineDataset,
    data: TensorDictBase,
    policy: GaussianPolicy,
    folder: Path,
    say: Say,
) -> Cost:
    """(iw-)SFT from the reference policy on curated, annotated trajectories."""
    row, _ = plan.row(dataset)
    algorithm = plan.algorithm
    along = Segments.of(data)
    data.set(_RETURN, along.spread(along.sum(data.get(REWARD))))
    by_steps = plan.estimator == "steps"
    # q = pi_ref leaves all weights at 1.
    lag: Proposal = "cached" if by_steps else "lagged"
    loss = ImportanceWeightedMLE(
        policy,
        importance_weights=plan.weights(dataset),
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
        plan.tuning(dataset),
        updater=updater,
        probes=[curve(plan, dataset, policy, row.steps), *look],
        folder=folder,
        settings=settings_of(plan, dataset),
        log_every=max(1, row.steps // 100),
        checkpoint_every=checkpoints(row.steps),
        report=partial(say, "tuning", row.steps),
    )
