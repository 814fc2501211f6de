"""The policies of ``--policy`` and their roll-outs, in groups of episodes side by side.

A group is a function of its policy and of its episodes' seeds, and it is collected whole or not at
all. So a collection that was cut off ends in the same data.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from tensordict.nn import TensorDictModuleBase
from torchrl.envs.utils import ExplorationType

from benchmarks.collect import sac
from benchmarks.collect.options import RANDOM, Options
from benchmarks.collect.output import Fields, Parts
from benchmarks.collect.simulator import Instance, Simulator
from iwsft.acting import ROWS, PolicyInputs, act, acting, check_keys, check_sizes
from iwsft.evaluation import episode_seeds
from iwsft.fingerprint import fingerprint

# Separates the seeds of noise from those of environments.
_NOISE = 1


@dataclass(frozen=True)
class Behaviour:
    """A policy that collects data, named as on the command line."""

    name: str
    policy: TensorDictModuleBase | None  # None for uniform actions
    # The environment that it was trained in, if known.
    env_id: str | None = None
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of its parameters and buffers."""
        return "" if self.policy is None else fingerprint(dict(self.policy.state_dict()))


def load_behaviour(name: str) -> Behaviour:
    """Load a policy of ``--policy`` on the CPU."""
    if name == RANDOM:
        return Behaviour(name, None)
    folder = Path(name).expanduser()
    policy: TensorDictModuleBase
    env_id: str | None = None
    env_kwargs: dict[str, Any] = {}
    if (folder / sac.POLICY).is_dir():
        policy, env_id, env_kwargs = sac.load_policy(folder)
    elif folder.is_dir():
        from benchmarks.d4rl.train import load_policy

        policy, env_id, env_kwargs = load_policy(folder)
    elif ":" in name:
        policy = _of_callable(name)
    else:
        raise ValueError(
            f"--policy {name}: no folder of that name; give the folder of a finished run, "
            f"MODULE:CALLABLE, or {RANDOM!r}"
        )
    check_keys(policy, name=f"--policy {name}")
    return Behaviour(name, policy.cpu(), env_id, env_kwargs)


def _of_callable(name: str) -> TensorDictModuleBase:
    module, _, attribute = name.rpartition(":")
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"--policy {name}: {error}; MODULE is imported from the current folder or from what is "
            "installed"
        ) from error
    try:
        policy = make()
    except TypeError as error:
        raise ValueError(f"--policy {name} is called without arguments: {error}") from error
    if not isinstance(policy, TensorDictModuleBase):
        raise ValueError(
            f"--policy {name} gave {type(policy).__name__}; called without arguments, it must "
            "return a TensorDictModule"
        )
    return policy


def check_behaviour(behaviour: Behaviour, simulator: Simulator) -> None:
    """Check a policy by calling it once."""
    if behaviour.policy is not None:
        with acting(behaviour.policy):
            check_sizes(
                behaviour.policy,
                np.zeros(simulator.observation_dim, np.float32),
                simulator.low.shape,
                simulator.env_id,
                name=f"--policy {behaviour.name}",
            )


def collect_rollouts(
    behaviours: list[Behaviour],
    simulator: Simulator,
    parts: Parts,
    options: Options,
    bar: Progress,
) -> list[dict[str, Any]]:
    """Collect the episodes of all policies into ``parts``, after those that are there.

    Episodes are numbered through all policies. Number i starts from seed i of
    :func:`iwsft.evaluation.episode_seeds`, and its noise depends on that seed, too.

    Returns:
        The sources of the data, one for each policy.
    """
    before = parts.progress() or {}
    episodes = before.get("episodes", [0] * len(behaviours))
    steps = before.get("steps", [0] * len(behaviours))
    envs: list[Instance] = []
    unwritten: list[Fields] = []
    mode = ExplorationType.RANDOM if options.stochastic else ExplorationType.DETERMINISTIC
    # Of steps, the least number of episodes that can have those that are missing.
    done, longest = (episodes, 1) if options.episodes else (steps, simulator.max_episode_steps)
    tasks = [
        bar.add_task(behaviour.name[-24:], total=amount, completed=count, note="")
        for behaviour, amount, count in zip(behaviours, options.amounts, done, strict=True)
    ]
    try:
        for i, (behaviour, amount) in enumerate(zip(behaviours, options.amounts, strict=True)):
            while done[i] < amount:
                size = min(math.ceil((amount - done[i]) / longest), ROWS)
                envs += [simulator.make() for _ in range(size - len(envs))]
                first = sum(episodes)
                seeds = episode_seeds(options.seed, first + size)[first:]
                policy = behaviour.policy
                with nullcontext() if policy is None else acting(policy, mode):
                    group = roll_out(behaviour, envs[:size], seeds, noise=options.noise)
                unwritten += group
                episodes[i] += size
                steps[i] += sum(len(episode["rewards"]) for episode in group)
                if sum(len(episode["rewards"]) for episode in unwritten) >= options.part_steps:
                    parts.append(unwritten, {"episodes": episodes, "steps": steps})
                    unwritten = []
                mean = np.mean([episode["rewards"].sum(dtype=np.float64) for episode in group])
                bar.update(tasks[i], completed=done[i], note=f"return {mean:.1f}")
        if unwritten:
            parts.append(unwritten, {"episodes": episodes, "steps": steps})
    finally:
        for env in envs:
            env.env.close()
    return [
        {
            "policy": behaviour.name,
            "noise": options.noise if behaviour.policy is not None else 0.0,
            "stochastic": options.stochastic or behaviour.policy is None,
            "episodes": count,
        }
        for behaviour, count in zip(behaviours, episodes, strict=True)
    ]


def roll_out(
    behaviour: Behaviour, envs: list[Instance], seeds: list[int], *, noise: float
) -> list[Fields]:
    """Return one episode for each seed, each in an environment of its own.

    Uniform actions get no noise. A policy that draws does so from torch's generator, seeded by the
    first of ``seeds``.
    """
    torch.manual_seed(seeds[0])
    generators = [np.random.default_rng([episode_seed, _NOISE]) for episode_seed in seeds]
    simulator = envs[0].simulator
    seen = PolicyInputs(len(envs), simulator.observation_dim)
    for row, (env, episode_seed) in enumerate(zip(envs, seeds, strict=True)):
        env.reset(episode_seed)
        seen.begin(row, env.observation, f"the episode of seed {episode_seed}")
    running = list(range(len(envs)))
    while running:
        if behaviour.policy is not None:
            # Recorded as float32.
            name = f"--policy {behaviour.name}"
            actions = act(behaviour.policy, seen, name=name).astype(np.float32)
        for row in tuple(running):
            if behaviour.policy is None:
                action = generators[row].uniform(simulator.low, simulator.high).astype(np.float32)
            else:
                action = actions[row]
                if noise > 0:
                    spread = generators[row].normal(scale=noise, size=action.shape)
                    action = action + spread.astype(np.float32)
            ended, reward = envs[row].step(action)
            if ended:
                running.remove(row)
                seen.end(row)
            else:
                seen.follow(row, envs[row].observation, reward)
    return [env.episode() for env in envs]
