"""The environment that data are collected in, and roll-outs of policies in it.

Episodes are rolled out in groups, side by side. A group is a function of its policy and of its
episodes' seeds, and it is collected whole or not at all. So a collection that was cut off ends in
the same data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from tensordict.nn import TensorDictModuleBase
from torchrl.envs.utils import ExplorationType

from benchmarks.collect.options import Options
from benchmarks.collect.output import Fields, Parts
from iwsft import environments
from iwsft.acting import ROWS, PolicyInputs, act, acting, check_sizes
from iwsft.evaluation import episode_seeds
from iwsft.fingerprint import fingerprint
from iwsft.progress import Progress

# Separates the seeds of noise from those of environments.
_NOISE = 1


@contextmanager
def _failure_named(env_id: str, kwargs: dict[str, Any]) -> Iterator[None]:
    """Name the environment where it raises an error, as for an argument of a wrong type."""
    try:
        yield
    except Exception as error:
        problem = f"{env_id} fails at its first step ({type(error).__name__}: {error})"
        raise ValueError(f"{problem}; its arguments are {kwargs} (--env-arg)") from error


@dataclass(frozen=True)
class Simulator:
    """An environment, described so that instances of it can be made."""

    env_id: str  # full id, as ``iwsft.environments.make`` takes it
    kwargs: dict[str, Any]
    max_episode_steps: int
    observation_dim: int  # of the flattened observation
    # Bounds of the actions ``[act]``.
    low: NDArray[np.float32]
    high: NDArray[np.float32]
    versions: dict[str, str]  # of the packages that decide its numbers

    @classmethod
    def of(cls, env_id: str, kwargs: dict[str, Any]) -> Simulator:
        """Describe an environment after making it once."""
        with closing(environments.make(env_id, **kwargs)) as env:
            space, flatten = environments.action_space(env), environments.flattener(env)
            if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
                raise ValueError(f"the actions of {env_id} have no bounds: {space}; wrap it")
            if env.spec is None or env.spec.max_episode_steps is None:
                raise ValueError(f"episodes of {env_id} may never end; pass --max-episode-steps")
            with _failure_named(env_id, kwargs):
                observation, _ = env.reset(seed=0)
            module = env_id.rpartition(":")[0]
            resolved = environments.id_of(env)
            return cls(
                env_id=f"{module}:{resolved}" if module else resolved,
                kwargs=kwargs,
                max_episode_steps=env.spec.max_episode_steps,
                observation_dim=flatten(observation).size,
                low=space.low.astype(np.float32),
                high=space.high.astype(np.float32),
                versions=environments.versions(env),
            )

    def first_step(self) -> Fields:
        """An episode of one step, which has all fields of the data."""
        env = self.make()
        with env.env, _failure_named(self.env_id, self.kwargs):
            env.reset(seed=0)
            env.step(self.low)
        return env.episode(cut=True)

    def make(self, *, as_drawn: bool = False) -> Instance:
        """Make an instance of the environment; see :class:`Instance` for ``as_drawn``."""
        env = environments.make(self.env_id, **self.kwargs)
        return Instance(env, environments.flattener(env), self, as_drawn)


@dataclass
class Instance:
    """One environment, its current observation, and the record of the episode that runs in it."""

    env: gym.Env[Any, Any]
    flatten: environments.Flatten
    simulator: Simulator
    # Whether the record has actions as the policy drew them, not as they were clipped.
    as_drawn: bool = False
    observation: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    _seed: int = 0
    _steps: list[tuple[Any, ...]] = field(default_factory=list)
    _success: list[bool] = field(default_factory=list)

    def reset(self, seed: int) -> None:
        """Start an episode, and forget the record of the last one."""
        self._seed, self._steps, self._success = seed, [], []
        self.observation = self._flat(self.env.reset(seed=seed)[0])

    def step(self, action: NDArray[np.float32]) -> tuple[bool, float]:
        """Take one step with the action clipped to the bounds.

        The environment gets the float32 action that is recorded, clipped, so that replaying the
        record gives the same rewards. Return whether the episode ended, and the reward.
        """
        clipped = np.clip(action, self.simulator.low, self.simulator.high)
        sent = environments.in_dtype(clipped, environments.action_space(self.env).dtype)
        taken = sent.astype(np.float32)
        following, raw_reward, terminated, truncated, info = self.env.step(sent)
        reward = float(raw_reward)
        after = self._flat(following)
        if not (np.isfinite(after).all() and np.isfinite(reward)):
            where = f"at step {len(self._steps)} of the episode of seed {self._seed}"
            raise FloatingPointError(f"{self.simulator.env_id} gave a NaN or an infinity {where}")
        # With both, the episode has ended by itself.
        cut = bool(truncated and not terminated)
        recorded = action if self.as_drawn else taken
        self._steps.append((self.observation, recorded, reward, after, bool(terminated), cut))
        success = environments.success(info)
        if success is not None:
            self._success.append(bool(success))
        self.observation = after
        return bool(terminated or truncated), reward

    def transition(self) -> tuple[NDArray[Any], ...]:
        """Return the last step as observations, actions, rewards, terminals, next observations."""
        now, action, reward, after, terminated, _ = self._steps[-1]
        return tuple(np.asarray(x)[None] for x in (now, action, reward, terminated, after))

    def episode(self, *, cut: bool = False) -> Fields:
        """Return the record since the reset; with ``cut`` the last step counts as a timeout."""
        names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
        columns = zip(names, zip(*self._steps, strict=True), strict=True)
        fields = {name: np.array(column) for name, column in columns}
        fields["rewards"] = fields["rewards"].astype(np.float32)
        if cut:
            fields["timeouts"][-1] = True
        if len(self._success) == len(self._steps):
            fields["success"] = np.asarray(self._success, bool)
        return fields

    def _flat(self, observation: Any) -> NDArray[np.float32]:
        # A copy, because some environments return their own buffer.
        return np.array(self.flatten(observation), dtype=np.float32)


@dataclass(frozen=True)
class Behaviour:
    """A policy that collects data, named as on the command line."""

    name: str
    policy: TensorDictModuleBase | None  # None for uniform actions
    # The environment that it was trained in, if known.
    env_id: str | None = None
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    # The option that names it.
    flag: str = "--policy"

    @property
    def fingerprint(self) -> str:
        """Fingerprint of its parameters and buffers."""
        return "" if self.policy is None else fingerprint(dict(self.policy.state_dict()))

    def check_sizes(self, simulator: Simulator) -> None:
        """Check that the policy fits the environment."""
        if self.policy is not None:
            observation = np.zeros(simulator.observation_dim, np.float32)
            shape, name = simulator.low.shape, f"{self.flag} {self.name}"
            with acting(self.policy):
                check_sizes(self.policy, observation, shape, simulator.env_id, name=name)


def collect_rollouts(
    behaviours: list[Behaviour], simulator: Simulator, parts: Parts, options: Options, bar: Progress
) -> list[dict[str, Any]]:
    """Collect the episodes of all policies into ``parts``, after those that are there.

    Episodes are numbered through all policies. Number i starts from seed i of
    :func:`iwsft.evaluation.episode_seeds`, and its noise depends on that seed, too.
    Returns the sources of the data, one for each policy.
    """
    none = [0] * len(behaviours)
    counts = {"episodes": none, "steps": none.copy()} | (parts.progress() or {})
    episodes, steps = counts["episodes"], counts["steps"]
    envs: list[Instance] = []
    unwritten: list[Fields] = []
    mode = ExplorationType.RANDOM if options.stochastic else ExplorationType.DETERMINISTIC
    # Of steps, the least number of episodes that can have those that are missing.
    done, longest = (episodes, 1) if options.episodes else (steps, simulator.max_episode_steps)
    unit = "episodes" if options.episodes else "steps"
    tasks = [
        bar.add_task(f"{behaviour.name[-24:]} {unit}", total=amount, completed=count)
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
                    group = roll_out(behaviour, envs[:size], seeds, noise=options.noises[i])
                unwritten += group
                episodes[i] += size
                steps[i] += sum(len(episode["rewards"]) for episode in group)
                if sum(len(episode["rewards"]) for episode in unwritten) >= options.part_steps:
                    parts.append(unwritten, counts)
                    unwritten = []
                mean = np.mean([episode["rewards"].sum(dtype=np.float64) for episode in group])
                bar.update(tasks[i], completed=done[i], note=f"return {mean:.1f}")
        if unwritten:
            parts.append(unwritten, counts)
    finally:
        for env in envs:
            env.env.close()
    return sources_of(behaviours, options, episodes)


def sources_of(
    behaviours: Sequence[Behaviour], options: Options, episodes: Sequence[int | None]
) -> list[dict[str, Any]]:
    """The source of the data of each policy; a number of episodes is None where it is not known."""
    return [
        {
            "policy": behaviour.name,
            "noise": noise,
            "stochastic": options.stochastic or behaviour.policy is None,
            "episodes": count,
        }
        for behaviour, noise, count in zip(behaviours, options.noises, episodes, strict=True)
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
            name = f"{behaviour.flag} {behaviour.name}"
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
