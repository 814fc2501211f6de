"""All that can be known to be wrong before a run: settings first, then the data."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import gymnasium as gym
import torch

from benchmarks.d4rl import settings as paper
from benchmarks.d4rl.plan import Plan
from benchmarks.d4rl.run import curated, environment_of
from iwsft import environments
from iwsft.datasets import OfflineDataset
from iwsft.trajectory import ACTION, OBSERVATION, lengths


def check_settings(plans: Sequence[Plan]) -> None:
    """Check what the command line asks for; takes no data.

    Raises:
        ValueError: naming the setting, its value and the way out.
    """
    if not plans:
        raise ValueError("nothing to run: pass at least one name to --algo and one to --seeds")
    for plan in plans:
        if plan.algo not in paper.ALGORITHMS:
            raise ValueError(_unknown(plan.algo))
        if not 0 <= plan.seed < 2**32:
            raise ValueError(f"--seeds {plan.seed}: a seed lies in 0 ... 2^32 - 1")
    names = [str(plan) for plan in plans]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"asked for twice: {', '.join(twice)}; name each algorithm and each seed once"
        )
    plan = plans[0]
    for flag, number in (
        ("--steps", plan.steps),
        ("--reference-steps", plan.reference_steps),
        ("--eval-episodes", plan.eval_episodes),
    ):
        if number is not None and number < 1:
            raise ValueError(f"{flag} {number}: at least 1")
    algorithms = [plan.algorithm for plan in plans]
    weighted = any(algorithm.weighted and not algorithm.per_step for algorithm in algorithms)
    choices: Sequence[tuple[str, object, bool]] = (
        ("--temperature", plan.temperature, weighted and plan.target_ess is None),
        ("--target-ess", plan.target_ess, weighted),
        ("--ties", plan.ties, any(algorithm.cuts for algorithm in algorithms)),
    )
    for flag, value, used in choices:
        if value is not None and not used:
            also = f" with --target-ess {plan.target_ess}" if weighted else ""
            raise ValueError(
                f"{flag} {value} changes nothing in {', '.join(names)}{also}; leave it out"
            )
    _check_device(plan.device)


def check_data(plans: Sequence[Plan], dataset: OfflineDataset) -> None:
    """Check that the runs fit the data: environment, sizes, curated sets, weights.

    Raises:
        ValueError: naming what does not fit and the way out.
        OverflowError: weights that overflow on the longest trajectory.
        ImportError: the environment's package is not installed.
    """
    _check_environment(dataset)
    for plan in {plan.algo: plan for plan in plans}.values():
        try:
            data = curated(plan, dataset.trajectories)
        except ValueError as error:
            raise ValueError(f"{plan.algo}, --ties {plan.cut_ties}: {error}") from error
        if plan.algorithm.from_reference:
            plan.tuning(dataset)
            plan.weights(dataset).check_overflow(int(lengths(data).max()))


def _unknown(algo: str) -> str:
    near = difflib.get_close_matches(algo.lower(), paper.ALGORITHMS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown algorithm {algo!r}; {hint}it is one of {', '.join(paper.ALGORITHMS)}"


def _check_device(device: str) -> None:
    try:
        torch.ones(1, device=device).item()
    # What torch raises for names it does not know, and for devices that are not there.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split("\n")[0]
        raise ValueError(f"--device {device} can't be used here: {reason}; cpu can") from error


def _check_environment(dataset: OfflineDataset) -> None:
    env_id = environment_of(dataset)
    env = environments.make(env_id)
    try:
        observation, _ = env.reset(seed=0)
        has = environments.flattener(env)(observation).shape[-1]
        actions = env.action_space
    finally:
        env.close()
    needs = dataset.trajectories.get(OBSERVATION).shape[-1]
    if has != needs:
        raise ValueError(
            f"{dataset.name} has observations of size {needs}, {env_id} gives size {has}; score "
            "it in its own environment (the file's attribute env_id)"
        )
    wide = dataset.trajectories.get(ACTION).shape[-1]
    if not isinstance(actions, gym.spaces.Box) or actions.shape != (wide,):
        raise ValueError(
            f"{dataset.name} has actions of size {wide}, {env_id} takes {actions}; score it in its "
            "own environment (the file's attribute env_id)"
        )
