"""A control problem with a known optimum: follow the first coordinate of the state.

States are sampled anew at every step, uniformly in [-1, 1]^2, so that no action has consequences.
At every state the best action is 0.8 s_0, and its reward is the largest possible one, 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
from numpy.typing import NDArray

ENV_ID = "Tracking-v0"
HORIZON = 2
# Of the best policy, of the one that always acts 0 (the mean of the data), and a unit of reward.
BEST, STANDING = float(HORIZON), HORIZON * (1 - 0.64 / 3)


class Tracking(gym.Env[NDArray[Any], NDArray[Any]]):
    """Reward 1 - (a - 0.8 s_0)^2; an episode terminates after two steps."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float64)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def _next(self) -> NDArray[Any]:
        self._state = self.np_random.uniform(-1, 1, 2)
        return self._state

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        self._step = 0
        return self._next(), {}

    def step(self, action: NDArray[Any]) -> Any:
        reward = 1.0 - float((action[0] - 0.8 * self._state[0]) ** 2)
        self._step += 1
        return self._next(), reward, self._step == HORIZON, False, {}


def write_dataset(path: Path, episodes: int = 3000) -> None:
    """Episodes of uniformly random actions, which know nothing of the state, in D4RL's layout."""
    if ENV_ID not in gym.registry:
        gym.register(ENV_ID, Tracking)
    generator = np.random.default_rng(0)
    states = generator.uniform(-1, 1, (episodes, HORIZON + 1, 2))
    actions = generator.uniform(-1, 1, (episodes, HORIZON, 1))
    rewards = 1 - (actions[..., 0] - 0.8 * states[:, :-1, 0]) ** 2
    ends = np.zeros((episodes, HORIZON), dtype=bool)
    ends[:, -1] = True
    with h5py.File(path, "w") as file:
        file["observations"] = states[:, :-1].reshape(-1, 2).astype(np.float32)
        file["next_observations"] = states[:, 1:].reshape(-1, 2).astype(np.float32)
        file["actions"] = actions.reshape(-1, 1).astype(np.float32)
        file["rewards"] = rewards.reshape(-1).astype(np.float32)
        file["terminals"] = ends.reshape(-1)
        file["timeouts"] = np.zeros(episodes * HORIZON, dtype=bool)
        file.attrs["env_id"] = ENV_ID
