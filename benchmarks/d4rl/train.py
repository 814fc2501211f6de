"""From a run's data to a trained and scored policy, on disk."""

from __future__ import annotations

import hashlib
import json
import socket
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.modules import ProbabilisticActor

from baselines import Learner
from benchmarks.d4rl import settings as paper
from benchmarks.d4rl.run import (
    Run,
    Task,
    reference_settings_of,
    settings_of,
    sizes,
    why_unweighted,
)
from benchmarks.runs import CONFIG, RESULT, VIDEO
from iwsft import checkpoint, metrics
from iwsft.diagnostics import diagnose, weighted_mean
from iwsft.files import alone_in, write, write_json
from iwsft.lower_bound import Choice
from iwsft.objective import ImportanceWeightedMLE
from iwsft.policies import GaussianPolicy, MixturePolicy
from iwsft.proposals import EMA, HardSync
from iwsft.reference import annotate_reference
from iwsft.samplers import StepSampler, TrajectorySampler
from iwsft.trained_policy import TrainedPolicy, save_policy
from iwsft.training import Cost, Probe, Row, Schedule, Training, fit_stack
from iwsft.trajectory import REWARD, Segments

# A function that shows progress: stage, number of updates of the stage, metrics.
Report = Callable[[str, int, Row], None]
# Return of a step's trajectory; batches carry it along for the probe of the weights.
_RETURN = "trajectory_return"
_CURVE_POINTS = 10
# Seeds of the learning curve's episodes differ from those of the final score.
_CURVE_SEED = 10_000
_SAMPLERS = {"steps": StepSampler, "trajectories": TrajectorySampler}


@dataclass(frozen=True)
class Trained:
    """A policy, and what its training and that of its reference have cost."""

    policy: TensorDictModuleBase
    cost: Cost
    reference_cost: Cost = Cost(0.0, 0.0)


def train_and_score(
    runs: Sequence[Run], reports: Sequence[Report]
) -> list[dict[str, Any] | FloatingPointError]:
    """Train and score runs that differ in their seed alone, as one stack; write their results.

    Their folders are claimed. What is there of them is continued. A run that diverges ends alone:
    its error is in the place of its result.
    """
    for run in runs:
        if not (run.folder / CONFIG).exists():
            raise FileNotFoundError(
                f"{socket.gethostname()} does not see {run.folder}; every node of a cluster needs "
                "the project, the data files and --out at the same paths on a shared file system"
            )
    # With one thread, runs do not disturb each other, and the numbers do not depend on them.
    torch.set_num_threads(1)
    options, outcomes = runs[0].options, []
    with warnings.catch_warnings():
        # The command has told them, before it started this process.
        warnings.simplefilter("ignore", UserWarning)
        task = Task.load(runs[0].source, options.pretrain_dataset, trust=options.trust_env_module)
    recorded = json.loads((runs[0].folder / CONFIG).read_text()).get("settings", {})
    for name, data in (("data", task.dataset), ("pretrain", task.pretrain)):
        if recorded.get(name, data.fingerprint) != data.fingerprint:
            problem = (
                f"{data.source} has changed since these runs began, so they would differ in it"
            )
            raise ValueError(f"{problem}; put it back and pass --resume, or choose another --out")
    with ExitStack() as locks:
        for run in runs:
            locks.enter_context(alone_in(run.folder, wait=False))
        for run, report, trained in zip(runs, reports, _train(runs, task, reports), strict=True):
            outcome: dict[str, Any] | FloatingPointError
            try:
                outcome = _score(run, task, trained, report)
            except FloatingPointError as error:
                outcome = error
            outcomes.append(outcome)
    return outcomes


def _score(
    run: Run, task: Task, trained: Trained | FloatingPointError, report: Report
) -> dict[str, Any]:
    """Save and score what a run has trained; raise the error that its training has ended with."""
    if isinstance(trained, FloatingPointError):
        raise trained
    _save_policy(run, task, trained.policy)
    about: dict[str, Any] = {"preset": run.options.preset, "estimator": run.options.estimator}
    about |= {f"reference_{name}": value for name, value in asdict(trained.reference_cost).items()}
    if run.chooses_q:
        about |= _last_choice(run, task)

    def ended(episodes: int) -> None:
        report("scoring", run.options.eval_episodes, {"step": episodes})

    return score_policy(run, task, trained.policy, trained.cost, about, ended)


def score_policy(
    run: Run,
    task: Task,
    policy: TensorDictModuleBase,
    cost: Cost,
    about: Mapping[str, Any],
    ended: Callable[[int], None] | None = None,
) -> dict[str, Any]:
    """Score a run's policy, whose training had a cost; write and return its ``result.json``.

    ``about`` are further entries of the file. ``ended`` takes the number of episodes after each.
    """
    since, options = time.process_time(), run.options
    video = run.folder / VIDEO if options.video else None
    final = task.score(
        policy,
        episodes=options.eval_episodes,
        seed=run.seed,
        device=options.device,
        video=video,
        report=ended,
    )
    evaluation_cpu = time.process_time() - since
    updates, published, successes = run.updates, run.published_updates, final.successes
    success: dict[str, Any] = {}
    if successes is not None:
        success = {"success_rate": float(np.mean(successes)), "episode_successes": successes}
    result = {
        **run.identity,
        "env_id": final.env_id,
        **about,
        "steps": updates,
        **({} if updates == published else {"published_steps": published}),
        "normalized_score": final.score,
        "episode_scores": final.normalized_scores,
        "episode_returns": final.returns,
        "episode_lengths": final.lengths,
        "return_mean": final.return_mean,
        **success,
        "episodes": len(final.returns),
        "wall_seconds": cost.wall_seconds + final.wall_seconds,
        "cpu_seconds": cost.cpu_seconds + evaluation_cpu,
        "evaluation_cpu_seconds": evaluation_cpu,
        "versions": final.versions,
    }
    write_json(run.folder / RESULT, result)
    return result


def _last_choice(run: Run, task: Task) -> dict[str, Any]:
    """What the returns of the data choose for the last policy, and why they could not choose."""
    row = metrics.read(run.folder / metrics.FILE)[-1]
    reason = why_unweighted(run.curate(task.dataset.trajectories, task.parts))
    note = {} if reason is None else {"note": reason}
    return {"q": {"rule": run.options.q, **{name: row[name] for name in Choice._fields}, **note}}


def _train(
    runs: Sequence[Run], task: Task, reports: Sequence[Report]
) -> list[Trained | FloatingPointError]:
    """Train the policies of runs, each with the cost of its reference, or its error."""
    first, data = runs[0], task.dataset.trajectories.to(runs[0].options.device)
    outcomes: dict[Run, Trained | FloatingPointError] = {}
    references: dict[Run, tuple[Trained, Path]] = {}
    stage = "cloning" if first.baseline is None else first.algo
    if first.uses_reference:
        stage = "tuning"
        for run, outcome in zip(runs, train_references(runs, task, reports), strict=True):
            if isinstance(outcome, FloatingPointError):
                outcomes[run] = outcome
            else:
                references[run] = outcome, reference_folder(run, task)
    jobs: dict[Run, tuple[Learner, Training]] = {}
    for run, report in zip(runs, reports, strict=True):
        probes: list[Probe] = []
        if run in outcomes:
            continue
        if run.baseline is not None:
            learner = run.baseline.build(data, run.baseline_settings[0], seed=run.seed)
        elif run not in references:
            learner = build_cloning(run, run.curate(data, task.parts), run.schedule)
        elif run.algorithm.from_reference:
            reference, folder = references[run]
            # The log-probs of each seed are its own.
            own = data.copy()
            annotate_reference(reference.policy, own, cache=folder)
            learner, probes = build_fine_tuning(run, run.curate(own, task.parts), reference.policy)
        else:
            reference, folder = references[run]
            _copy_training(folder, run.folder)
            for row in metrics.read(run.folder / metrics.FILE):
                report("cloning", run.updates, row)
            outcomes[run] = reference
            continue
        report = partial(report, stage)
        settings = settings_of(run, task)
        jobs[run] = (
            learner,
            _training(run, task, learner, run.updates, run.folder, settings, report, probes),
        )
    costs = _fit(first, first.updates, [training for _, training in jobs.values()])
    for (run, (learner, _)), cost in zip(jobs.items(), costs, strict=True):
        before = references[run][0].cost if run in references else Cost(0.0, 0.0)
        if isinstance(cost, FloatingPointError):
            outcomes[run] = cost
        else:
            outcomes[run] = Trained(learner.policy, cost, before)
    return [outcomes[run] for run in runs]


def train_references(
    runs: Sequence[Run], task: Task, reports: Sequence[Report]
) -> list[Trained | FloatingPointError]:
    """Train the reference policies of seeds on all data, or load those of the same settings."""
    before, schedule = Task(task.pretrain, task.pretrain), runs[0].reference_schedule
    data = task.pretrain.trajectories.to(runs[0].options.device)
    trainings, policies = [], []
    for run, report in zip(runs, reports, strict=True):
        learner = build_cloning(run, data, schedule)
        policies.append(learner.policy)
        settings, folder = reference_settings_of(run, task), reference_folder(run, task)
        report = partial(report, "reference")
        trainings.append(_training(run, before, learner, schedule.steps, folder, settings, report))
    with ExitStack() as locks:
        # In one order, so that no two commands wait for each other.
        for folder in sorted(reference_folder(run, task) for run in runs):
            locks.enter_context(alone_in(folder, wait=True))
        costs = _fit(runs[0], schedule.steps, trainings)
    return [
        cost if isinstance(cost, FloatingPointError) else Trained(policy, cost)
        for policy, cost in zip(policies, costs, strict=True)
    ]


def reference_folder(run: Run, task: Task) -> Path:
    """Folder of the reference policy of a run, which runs of the same settings and seed share."""
    settings = json.dumps(reference_settings_of(run, task), sort_keys=True)
    key = hashlib.sha256(settings.encode()).hexdigest()[:8]
    root = run.options.out / run.benchmark / task.pretrain.name / "reference"
    # A name "seed-..." would be that of a run's folder.
    return root / f"{key}-seed-{run.seed}"


def make_policy(run: Run, data: TensorDictBase) -> ProbabilisticActor:
    """Make an untrained policy of the form that a run names, for data of these sizes."""
    form = MixturePolicy if run.options.policy == "mixture" else GaussianPolicy
    return form(*sizes(data)).to(run.options.device)


def build_cloning(run: Run, data: TensorDictBase, schedule: Schedule) -> Learner:
    """Build behaviour cloning from scratch: the mean over trajectories of -log p / length."""
    torch.manual_seed(run.seed)
    policy = make_policy(run, data)
    loss = ImportanceWeightedMLE(policy, proposal="reference")
    batch = paper.CLONING_BATCH[run.options.estimator][run.options.preset]
    sampler = _SAMPLERS[run.options.estimator](data, batch, seed=run.seed)
    return Learner(policy, loss, sampler, schedule)


def build_fine_tuning(
    run: Run, data: TensorDictBase, policy: ProbabilisticActor
) -> tuple[Learner, list[Probe]]:
    """Build (iw-)SFT from the reference policy, on curated and annotated trajectories."""
    row, _ = run.fine_tuning
    steps = Segments.of(data)
    data.set(_RETURN, steps.spread(steps.sum(data.get(REWARD))))
    estimator, proposal = run.options.estimator, run.proposal
    loss = ImportanceWeightedMLE(policy, importance_weights=run.weights, proposal=proposal)
    updater: HardSync | EMA | None = None
    probes = [weight_probe(loss, max(1, row.steps // 100))] if run.algorithm.weighted else []
    if proposal == "cached" or loss.awaits_sync:
        updater = HardSync(loss, every=row.sync_every, trajectories=data)
    elif proposal == "lagged":
        updater = EMA(loss, decay=row.alpha)
    if proposal == "cached":
        # A batch of single steps has no trajectory weights, so the probe takes the curated set.
        probes = [weight_probe(loss, row.sync_every, data)]
    batch = paper.FINE_TUNING_BATCH[estimator]
    sampler = _SAMPLERS[estimator](data, batch, seed=run.seed)
    return Learner(policy, loss, sampler, run.schedule, updater), probes


def _training(
    run: Run,
    task: Task,
    learner: Learner,
    steps: int,
    folder: Path,
    settings: dict[str, Any],
    report: Callable[[int, Row], None],
    probes: Sequence[Probe] = (),
) -> Training:
    """The training of a learner, with the learning curve of all runs."""
    if run.options.curve_episodes:
        probes = [learning_curve_probe(run, task, learner.policy, steps), *probes]
    return learner.training(
        probes=probes, folder=folder, settings=settings, report=partial(report, steps)
    )


def _fit(run: Run, steps: int, trainings: Sequence[Training]) -> list[Cost | FloatingPointError]:
    """Train with the log and the checkpoints of all runs."""
    return fit_stack(
        trainings,
        log_every=max(1, steps // 100),
        checkpoint_every=min(500, max(1, steps // 10)),
        graph=run.options.graph,
    )


def learning_curve_probe(run: Run, task: Task, policy: TensorDictModuleBase, steps: int) -> Probe:
    """A probe that scores the policy at each point of the learning curve."""
    options = run.options
    episodes = min(options.curve_episodes, options.eval_episodes)

    def look(_: TensorDictBase) -> Row:
        seed = run.seed + _CURVE_SEED
        result = task.score(policy, episodes=episodes, seed=seed, device=options.device)
        score = {} if result.score is None else {"normalized_score": result.score}
        return {"return_mean": result.return_mean, **score}

    return Probe(max(1, steps // _CURVE_POINTS), look)


def weight_probe(
    loss: ImportanceWeightedMLE, every: int, whole: TensorDictBase | None = None
) -> Probe:
    """A probe of the importance weights and their mean return, on ``whole`` or the batch."""

    def look(batch: TensorDictBase) -> Row:
        trajectories = batch if whole is None else whole
        terms = loss.terms(trajectories)
        mean_return = weighted_mean(trajectories.get(_RETURN), terms.log_weight.exp(), terms.share)
        return diagnose(loss, trajectories, terms) | {"weighted_return": float(mean_return)}

    return Probe(every, look)


def _copy_training(source: Path, folder: Path) -> None:
    """Copy what a training left, each file whole, so that a kill leaves nothing that misleads."""
    state, rows = source / checkpoint.FOLDER / checkpoint.FILE, source / metrics.FILE
    for path in (state, rows):
        write(folder / path.relative_to(source), path.read_bytes())


def _save_policy(run: Run, task: Task, policy: TensorDictModuleBase) -> None:
    """Write ``policy.pt`` for :func:`iwsft.load_policy`."""
    observation_dim, action_dim = sizes(task.dataset.trajectories)
    environment = task.env_id, task.dataset.env_kwargs, task.dataset.reference_scores
    trained = TrainedPolicy(policy, *environment, observation_dim)
    with closing(trained.make()) as env:
        trained = replace(trained, action_dtype=str(env.action_space.dtype))
    save_policy(
        run.folder,
        trained,
        algo=run.algo,
        action_dim=action_dim,
        settings=None if run.baseline is None else run.baseline_settings[0],
    )
