"""D4RL's AntMaze and Adroit tasks, made from gymnasium-robotics' environments.

gymnasium-robotics rebuilt D4RL's tasks (https://arxiv.org/abs/2004.07219) with other numbers. The
numbers of this module are those of D4RL's code (https://github.com/Farama-Foundation/D4RL), to
which its data and reference scores belong. ``environments.make(env_id, conventions="d4rl")``
applies them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iwsft.extras import named

with named():
    import gymnasium as gym
    from gymnasium.utils import RecordConstructorArgs

# Row and column of the goal in D4RL's mazes; the ant starts in cell (1, 1) of each.
_GOAL_CELLS = {
    "AntMaze_UMaze-v4": ("U_MAZE", (3, 1)),
    "AntMaze_Medium-v4": ("MEDIUM_MAZE", (6, 6)),
    "AntMaze_Large-v4": ("LARGE_MAZE", (7, 9)),
}
# From an observation to the vector between the palm and the object to grasp.
_REACH: dict[str, Callable[[NDArray[Any]], NDArray[Any]] | None] = {
    "AdroitHandDoor-v1": lambda observation: observation[35:38],
    "AdroitHandHammer-v1": lambda observation: observation[33:36] - observation[36:39],
    "AdroitHandRelocate-v1": lambda observation: observation[30:33],
    "AdroitHandPen-v1": None,  # its reward has no such term
}
ENV_IDS = (*_GOAL_CELLS, *_REACH)


def get_arguments(env_id: str) -> dict[str, Any]:
    """Return the arguments of the environment by D4RL's conventions, if there are any for it."""
    if env_id in _GOAL_CELLS:
        return {"continuing_task": False, "maze_map": _maze(env_id)}
    if env_id in _REACH:
        return {"max_episode_steps": 100} if env_id == "AdroitHandPen-v1" else {}
    raise ValueError(f"conventions='d4rl' does not cover {env_id}, only {', '.join(ENV_IDS)}")


def wrap(env: gym.Env[Any, Any], env_id: str) -> gym.Env[Any, Any]:
    """Wrap ``env``, which was made with :func:`get_arguments`, in the other conventions."""
    return AntMaze(env) if env_id in _GOAL_CELLS else AdroitHand(env, env_id)


class AntMaze(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """D4RL's AntMaze: its ant, start, goal, coordinates, reward and end.

    - Ant: gymnasium's has steps of 0.01 s, motors of 150 N m and harder contacts.
    - Goal: drawn in each episode, D4RL's rule of the v2 tasks (v0 drew it once per environment).
    - Coordinates: x and y are 0 where the ant starts, and grow along the rows and columns of the
      maze, as in the files.
    - Reward: 1 within 0.5 of the goal, where the episode ends, else 0. So a return is 0 or 1.
      gymnasium-robotics has 0.45.
    """

    RADIUS = 0.5

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        super().__init__(env)
        maze: Any = env.unwrapped
        maze.position_noise_range = 0.0
        maze.ant_env._reset_noise_scale = 0.1
        model = maze.ant_env.model
        model.opt.timestep = 0.02
        model.actuator_gear[:, 0] = 30.0
        model.geom_solimp[:, :3] = (0.8, 0.8, 0.01)
        self._maze = maze
        self._origin = maze.maze.unique_reset_locations[0].copy()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        random = self._maze.np_random
        # Without position noise, the goal is still the middle of its cell.
        self._maze.goal += random.uniform(0.0, 1.0, 2) + random.uniform(0.0, 0.5, 2)
        self._maze.update_target_site_pos()
        return self._from_start(observation), {**info, "success": self._reached(observation)}

    def step(
        self, action: Any
    ) -> tuple[dict[str, NDArray[Any]], float, bool, bool, dict[str, Any]]:
        observation, _, _, truncated, info = self.env.step(action)
        reached = self._reached(observation)
        info = {**info, "success": reached}
        return self._from_start(observation), float(reached), reached, truncated, info

    def _reached(self, observation: dict[str, NDArray[Any]]) -> bool:
        distance = np.linalg.norm(observation["achieved_goal"] - self._maze.goal)
        return bool(distance <= self.RADIUS)

    def _from_start(self, observation: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return {
            "observation": observation["observation"],
            "achieved_goal": observation["achieved_goal"] - self._origin,
            "desired_goal": self._maze.goal - self._origin,
        }


class AdroitHand(gym.Wrapper[Any, Any, Any, Any], RecordConstructorArgs):
    """D4RL's Adroit tasks: reward and end.

    - Reward of door, hammer and relocate: minus 0.1 times the distance between the palm and the
      object to grasp; in gymnasium-robotics' v1 the term has lost its minus.
    - Pen: at most 100 steps, and the episode ends when the pen is dropped (lower than 0.075).
    """

    def __init__(self, env: gym.Env[Any, Any], env_id: str) -> None:
        RecordConstructorArgs.__init__(self, env_id=env_id)
        super().__init__(env)
        self._reach = _REACH[env_id]
        self._pen = env_id == "AdroitHandPen-v1"

    def step(self, action: Any) -> tuple[NDArray[Any], float, bool, bool, dict[str, Any]]:
        observation, env_reward, terminated, truncated, info = self.env.step(action)
        reward = float(env_reward)
        if self._reach is not None:
            reward -= 0.2 * float(np.linalg.norm(self._reach(observation)))
        if self._pen:
            terminated = bool(terminated or observation[26] < 0.075)
        return observation, reward, terminated, truncated, info


def _maze(env_id: str) -> list[list[int | str]]:
    with named():
        maps = importlib.import_module("gymnasium_robotics.envs.maze.maps")
    name, goal = _GOAL_CELLS[env_id]
    cells: list[list[int | str]] = [list(row) for row in getattr(maps, name)]
    cells[1][1], cells[goal[0]][goal[1]] = maps.RESET, maps.GOAL
    return cells[::-1]  # its y grows from the last row to the first, D4RL's the other way
