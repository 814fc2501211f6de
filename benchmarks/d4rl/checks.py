"""All that can be known to be wrong before a run: settings first, then the data."""

from __future__ import annotations

from collections.abc import Sequence

import gymnasium as gym

import baselines
from benchmarks.d4rl import settings as paper
from benchmarks.d4rl.learn import curated, sizes
from benchmarks.d4rl.plan import BENCHMARK, Plan
from benchmarks.d4rl.task import Task
from benchmarks.options import (
    check_at_least,
    check_device,
    check_known,
    check_used,
)
from iwsft import environments
from iwsft.trajectory import OBSERVATION, lengths


def check_settings(plans: Sequence[Plan]) -> None:
    """Check what the command line asks for; takes no data.

    Raises:
        ValueError: naming the setting, its value and the way out.
    """
    if not plans:
        raise ValueError("nothing to run: pass at least one name to --algo and one to --seeds")
    for plan in plans:
        if not paper.is_algorithm(plan.algo):
            check_known("algorithm", plan.algo, [*paper.ALGORITHMS, *baselines.BASELINES])
    names = [str(plan) for plan in plans]
    plan = plans[0]
    check_at_least(
        1,
        steps=plan.steps,
        reference_steps=plan.reference_steps,
        eval_episodes=plan.eval_episodes,
    )
    check_at_least(0, curve_episodes=plan.curve_episodes)
    if plan.alpha is not None and not 0 <= plan.alpha < 1:
        raise ValueError(f"--alpha {plan.alpha}: a decay lies in [0, 1)")
    if plan.variant in (".", "..", BENCHMARK) or set(plan.variant) & set("/\\"):
        raise ValueError(f"--variant {plan.variant}: a name of a folder, without slashes")
    if plan.top is not None and not 0 < plan.top <= 100:
        raise ValueError(f"--top {plan.top}: a share of the data in %, above 0 and at most 100")
    weighted = any(plan.weighted for plan in plans)
    tuned = any(plan.from_reference for plan in plans)
    choices: Sequence[tuple[str, object, bool]] = (
        ("temperature", plan.temperature, weighted and plan.target_ess is None),
        ("target_ess", plan.target_ess, weighted),
        ("alpha", plan.alpha, any(p.from_reference and p.algorithm.weighted for p in plans)),
        ("ties", plan.ties, any(plan.cuts for plan in plans)),
        ("top", plan.top, tuned),
        ("pretrain_dataset", plan.pretrain_dataset, tuned),
    )
    also = f" with --target-ess {plan.target_ess}" if weighted else ""
    for name, value, used in choices:
        check_used(name, value, used, f"in {', '.join(names)}{also}")
    check_device(plan.device)


def check_data(plans: Sequence[Plan], task: Task) -> None:
    """Check that the runs fit the data: environment, sizes, curated sets, weights, critics.

    Raises:
        KeyError: an entry that an algorithm learns from is not in the data.
        ValueError: naming what does not fit and the way out.
        OverflowError: weights that overflow on the longest trajectory.
        ImportError: a package that the environment or an algorithm needs is not installed.
    """
    _check_environment(task)
    everything = task.dataset.trajectories
    for plan in {plan.algo: plan for plan in plans}.values():
        if plan.baseline is not None:
            # A baseline checks what it is given when it is built.
            plan.baseline.build(everything, plan.baseline_settings(task)[0], seed=plan.seed)
            continue
        try:
            data = curated(plan, everything)
        except ValueError as error:
            raise ValueError(f"{plan.algo}, --ties {plan.cut_ties}: {error}") from error
        if plan.from_reference:
            plan.tuning(task)
            plan.weights(task).check_overflow(int(lengths(data).max()))


def _check_environment(task: Task) -> None:
    dataset, env_id = task.dataset, task.env_id
    env = environments.make(env_id, **dataset.env_kwargs)
    try:
        observation, _ = env.reset(seed=0)
        has = environments.flattener(env)(observation).shape[-1]
        actions = env.action_space
    finally:
        env.close()
    needs, wide = sizes(dataset.trajectories)
    if has != needs:
        raise ValueError(
            f"{dataset.name} has {OBSERVATION}s of size {needs}, {env_id} gives size {has}; score "
            "it in its own environment (the file's attribute env_id)"
        )
    if not isinstance(actions, gym.spaces.Box) or actions.shape != (wide,):
        raise ValueError(
            f"{dataset.name} has actions of size {wide}, {env_id} takes {actions}; score it in its "
            "own environment (the file's attribute env_id)"
        )
