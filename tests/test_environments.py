"""Environments by their ids, as D4RL has them."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from iwsft import environments


def test_antmaze_has_the_columns_of_d4rl() -> None:
    env = environments.make("AntMaze_UMaze-v4")
    observation, _ = env.reset(seed=0)
    vector = environments.flattener(env)(observation)
    simulated = env.unwrapped.ant_env.data
    assert np.array_equal(vector, np.concatenate((simulated.qpos, simulated.qvel)))


def test_kitchen_has_the_columns_of_d4rl() -> None:
    env = environments.make(
        "FrankaKitchen-v1",
        tasks_to_complete=["microwave", "kettle"],
        robot_noise_ratio=0.0,
        object_noise_ratio=0.0,
    )
    observation, _ = env.reset(seed=0)
    vector = environments.flattener(env)(observation)
    assert vector.shape == (60,)
    assert np.allclose(vector[:30], env.unwrapped.data.qpos)
    # Positions of microwave (column 22) and kettle (23 to 29), as in the D4RL code base.
    goal = np.zeros(30)
    goal[22] = -0.75
    goal[23:] = [-0.23, 0.75, 1.62, 0.99, 0.0, 0.0, -0.06]
    assert np.array_equal(vector[30:], goal)


def test_a_package_that_is_missing_is_named_with_its_command() -> None:
    def entry() -> gym.Env[Any, Any]:
        raise ModuleNotFoundError("No module named 'imageio'", name="imageio")

    gym.register("HopperWithoutImageio-v4", entry_point=entry)
    with pytest.raises(ImportError, match=r"'imageio'\. pip install 'iwsft\[control"):
        environments.make("HopperWithoutImageio-v4")
