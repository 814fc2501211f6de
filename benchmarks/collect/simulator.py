"""The environment that data are collected in, and the record of an episode."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray

from benchmarks.collect.output import Fields
from iwsft import environments


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
        try:
            env = environments.make(env_id, **kwargs)
        except TypeError as error:
            raise ValueError(f"{env_id} does not take {kwargs}: {error}") from error
        try:
            space, flatten = environments.action_space(env), environments.flattener(env)
            if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
                raise ValueError(f"the actions of {env_id} have no bounds: {space}; wrap it")
            if env.spec is None or env.spec.max_episode_steps is None:
                raise ValueError(
                    f"episodes of {env_id} may never end: it has no limit of steps; pass "
                    "--max-episode-steps"
                )
            module = env_id.rpartition(":")[0]
            resolved = environments.id_of(env)
            return cls(
                env_id=f"{module}:{resolved}" if module else resolved,
                kwargs=kwargs,
                max_episode_steps=env.spec.max_episode_steps,
                observation_dim=flatten(env.reset(seed=0)[0]).size,
                low=space.low.astype(np.float32),
                high=space.high.astype(np.float32),
                versions=environments.versions(env),
            )
        finally:
            env.close()

    def make(self) -> Instance:
        """Make an instance of the environment."""
        env = environments.make(self.env_id, **self.kwargs)
        return Instance(env, environments.flattener(env), self)


@dataclass
class Instance:
    """One environment, its current observation, and the record of the episode that runs in it."""

    env: gym.Env[Any, Any]
    flatten: environments.Flatten
    simulator: Simulator
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

        The environment gets the float32 action that is recorded, so that replaying the record gives
        the same rewards. Return whether the episode ended, and the reward.
        """
        taken = np.clip(action, self.simulator.low, self.simulator.high)
        following, raw_reward, terminated, truncated, info = self.env.step(
            taken.astype(self.env.action_space.dtype)
        )
        reward = float(raw_reward)
        after = self._flat(following)
        if not (np.isfinite(after).all() and np.isfinite(reward)):
            raise FloatingPointError(
                f"{self.simulator.env_id} gave a number that is not finite at step "
                f"{len(self._steps)} of the episode of seed {self._seed}; its state has diverged"
            )
        # With both, the episode has ended by itself.
        cut = bool(truncated and not terminated)
        self._steps.append((self.observation, taken, reward, after, bool(terminated), cut))
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
        now, actions, rewards, then, terminals, timeouts = zip(*self._steps, strict=True)
        fields = {
            "observations": np.stack(now),
            "actions": np.stack(actions),
            "rewards": np.asarray(rewards, np.float32),
            "next_observations": np.stack(then),
            "terminals": np.asarray(terminals, bool),
            "timeouts": np.asarray(timeouts, bool),
        }
        if cut:
            fields["timeouts"][-1] = True
        if len(self._success) == len(self._steps):
            fields["success"] = np.asarray(self._success, bool)
        return fields

    def _flat(self, observation: Any) -> NDArray[np.float32]:
        # A copy, because some environments return their own buffer.
        return np.array(self.flatten(observation), dtype=np.float32)
