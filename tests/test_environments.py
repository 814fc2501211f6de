"""Environments by their ids, as D4RL has them."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import nn

from benchmarks.collect.rollout import Simulator
from iwsft import environments
from iwsft.evaluation import evaluate


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


class Levels(gym.Env[Any, Any]):
    """One step; the reward is the action, a whole number from ``low`` to ``high``."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, low: int, high: int, dtype: str) -> None:
        self.action_space = gym.spaces.Box(low, high, (1,), np.dtype(dtype))

    def reset(self, **_: Any) -> tuple[np.ndarray, dict[str, Any]]:
        return np.ones(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert action.dtype == self.action_space.dtype
        return np.ones(1, np.float32), float(action[0]), True, False, {}


@pytest.mark.parametrize(
    ("low", "high", "dtype", "action", "taken"),
    [
        (-1, 1, "int8", 0.99, 1),
        (-1, 1, "int8", -0.6, -1),
        (-1, 1, "int8", 0.4, 0),
        (0, 255, "uint8", 0.99, 254),
        (0, 255, "uint8", np.float32((199 - 127.5) / 127.5), 199),
        (-2, 2, "float32", 0.99, 1.98),
    ],
)
def test_whole_actions_are_the_nearest_ones(
    low: int, high: int, dtype: str, action: float, taken: float
) -> None:
    if "Levels-v0" not in gym.registry:
        gym.register("Levels-v0", entry_point=Levels, max_episode_steps=1)
    kwargs: dict[str, Any] = {"low": low, "high": high, "dtype": dtype}
    if (low, high) != (-1, 1):
        kwargs["action_bounds"] = [float(low), float(high)]
    policy = TensorDictModule(
        lambda o: torch.full_like(o, float(action)), in_keys=["observation"], out_keys=["action"]
    )
    assert evaluate(policy, "Levels-v0", episodes=1, env_kwargs=kwargs).returns == pytest.approx(
        [taken]
    )
    instance = Simulator.of("Levels-v0", {**kwargs, "max_episode_steps": 1}).make()
    instance.reset(0)
    assert instance.step(np.full(1, action, np.float32))[1] == pytest.approx(taken)
    if "action_bounds" not in kwargs:
        # The record has what the environment took.
        assert instance.transition()[1] == taken


def test_wrappers_that_learn_at_each_step_are_named() -> None:
    make = environments.make
    assert environments.moving_wrappers(make("Pendulum-v1")) == ""
    known = gym.wrappers.NormalizeReward(gym.wrappers.NormalizeObservation(make("Pendulum-v1")))
    assert environments.moving_wrappers(known) == "NormalizeReward, NormalizeObservation"
    known.update_running_mean = known.env.update_running_mean = False
    assert environments.moving_wrappers(known) == ""
    kwargs = {"wrappers": [{"entry_point": "gymnasium.wrappers:NormalizeReward", "kwargs": {}}]}
    with pytest.warns(UserWarning, match="NormalizeReward of Pendulum-v1 learns at each step"):
        policy = TensorDictModule(nn.Linear(3, 1), ["observation"], ["action"])
        evaluate(policy, "Pendulum-v1", episodes=1, env_kwargs={**kwargs, "max_episode_steps": 2})


@pytest.mark.parametrize("env_id", ["Hopper-v2", "Hopper-v3"])
def test_environments_of_mujoco_py_name_their_successors(env_id: str) -> None:
    with pytest.raises(ImportError, match=r"mujoco_py.* Did you mean .*Hopper-v4") as caught:
        environments.make(env_id)
    assert "pip install" not in str(caught.value)
