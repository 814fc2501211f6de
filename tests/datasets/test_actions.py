"""Ranges of actions: of the environment, of the data, and [-1, 1], in which policies act."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule, TensorDictSequential

from benchmarks.d4rl.run import Task
from iwsft import datasets, environments, evaluate
from iwsft.trajectory import ACTION

Write = Callable[..., Path]


def fields(low: float, high: float, act: int = 1, obs: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "observations": rng.normal(size=(40, obs)),
        "actions": rng.uniform(low, high, (40, act)).astype(np.float32),
        "rewards": rng.normal(size=40),
        "terminals": np.arange(40) % 20 == 19,
    }


@pytest.mark.parametrize(
    ("env_id", "bound", "act", "obs"),
    [("Pendulum-v1", 2.0, 1, 3), ("Humanoid-v4", 0.4, 17, 376), ("InvertedPendulum-v5", 3.0, 1, 4)],
)
def test_the_environment_maps_scaled_actions_back(
    write: Write, env_id: str, bound: float, act: int, obs: int
) -> None:
    path = write(fields(-bound, bound, act, obs), env_id=env_id)
    with pytest.warns(UserWarning, match=rf"\[-{bound:g}, {bound:g}\], policies act in \[-1, 1\]"):
        raw = datasets.load(path)
    data = datasets.load(path, scale_actions=True)
    np.testing.assert_allclose(raw.action_bounds, [-bound, bound], rtol=1e-6)
    assert raw.env_kwargs == {}
    assert data.action_bounds == (-1.0, 1.0)
    torch.testing.assert_close(data.trajectories[ACTION] * bound, raw.trajectories[ACTION])
    assert data.fingerprint != raw.fingerprint

    def constant(value: float) -> TensorDictModule:
        return TensorDictModule(
            lambda o: torch.full((len(o), act), value), in_keys=["observation"], out_keys=[ACTION]
        )

    scored = evaluate(constant(0.5), env_id, env_kwargs=data.env_kwargs, episodes=1)
    assert scored.returns == evaluate(constant(0.5 * bound), env_id, episodes=1).returns


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-0.3, 0.2)])
def test_actions_of_the_range_of_policies_stay_bit_for_bit(
    write: Write, low: float, high: float
) -> None:
    rows = fields(low, high, 3, 11)
    for attributes in ({}, {"env_id": "Hopper-v4"}, {"env_id": "NotInstalled-v0"}):
        data = datasets.load(write(rows, **attributes), scale_actions=True)
        np.testing.assert_array_equal(data.trajectories[ACTION], rows["actions"])
        assert (data.env_kwargs, data.action_bounds) == ({}, (-1.0, 1.0))


@pytest.mark.parametrize(
    ("actions", "env_id", "warns"),
    [
        (np.arange(40)[:, None] % 2, None, True),
        (np.eye(3)[np.arange(40) % 3], None, True),
        (np.arange(40)[:, None] % 2, "CartPole-v1", True),
        (np.arange(40)[:, None] % 2, "NotInstalled-v0", True),
        (np.sign(np.arange(40)[:, None] - 20), "Pendulum-v1", False),
        (np.linspace(-1, 1, 40)[:, None], None, False),
        (np.zeros((40, 1)), None, False),
    ],
)
def test_whole_numbers_of_no_known_environment_are_told(
    write: Write, actions: np.ndarray, env_id: str | None, warns: bool
) -> None:
    path = write(fields(-1, 1) | {"actions": actions}, **({"env_id": env_id} if env_id else {}))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        data = datasets.load(path, scale_actions=True)
    told = "all actions are whole numbers"
    assert [told in str(each.message) for each in caught].count(True) == warns
    assert [told in note for note in data.notes].count(True) == warns


def test_data_that_are_scaled_already_say_so(write: Write) -> None:
    """Beyond Humanoid's range they are refused otherwise."""
    rows = fields(-1, 1, 17, 376)
    with pytest.raises(ValueError, match=r"row 0, .* -0.4 to 0.4"):
        datasets.load(write(rows, env_id="Humanoid-v4"))
    data = datasets.load(
        write(rows, env_id="Humanoid-v4", env_kwargs='{"action_bounds": [-0.4, 0.4]}')
    )
    np.testing.assert_array_equal(data.trajectories[ACTION], rows["actions"])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"action_bounds": [-1, 1]}, r"Pendulum-v1 takes Box\(-2"),
        ({"action_bounds": 3}, "another form"),
        ({"wrappers": 3}, "another form"),
        ({"wrappers": [{"entry_point": "subprocess:Popen", "kwargs": {}}]}, "not a wrapper"),
        (
            {"wrappers": [{"entry_point": "gymnasium.wrappers:TimeLimit", "kwargs": None}]},
            "not rec",
        ),
        ({"g": 9.81, "mass": 2}, "Pendulum-v1 does not take .*'mass'"),
    ],
)
def test_arguments_that_an_environment_does_not_take(kwargs: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        environments.make("Pendulum-v1", **kwargs)
    assert "\n" not in str(caught.value)


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that registers an environment whose range is an argument without a default."""
    (tmp_path / "module_of_actions.py").write_text(
        "import gymnasium as gym, numpy as np\n"
        "class Wide(gym.Env):\n"
        "    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)\n"
        "    def __init__(self, top):\n"
        "        self.action_space = gym.spaces.Box(0, top, (1,), np.float32)\n"
        "gym.register('Wide-v0', entry_point=Wide, max_episode_steps=5)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield "module_of_actions"
    sys.modules.pop("module_of_actions", None)


def test_a_file_imports_a_module_only_if_it_is_trusted(write: Write, module: str) -> None:
    given = {"env_id": f"{module}:Wide-v0", "env_kwargs": '{"top": 100.0}'}
    inside = datasets.load(write(fields(0, 1), "inside.hdf5", **given))
    wide = write(fields(0, 100), **given)
    with pytest.raises(ValueError, match="pass trust_env_module"):
        datasets.load(wide)
    assert module not in sys.modules
    assert environments.modules_to_import(inside.env_id, inside.env_kwargs) == [module]
    data = datasets.load(wide, trust_env_module=True, scale_actions=True)
    assert data.env_kwargs == {"top": 100.0, "action_bounds": [0.0, 100.0]}
    assert data.trajectories[ACTION].min() < -0.9
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert datasets.load(wide).action_bounds == (0.0, 100.0)  # the program has imported it


def test_reference_scores_belong_to_the_task_of_d4rl() -> None:
    scores = datasets.reference_scores
    assert scores("Hopper-v4", {}) == scores("Hopper-v4", {"max_episode_steps": 1000}) is not None
    assert scores("Hopper-v4", {"healthy_reward": 10.0}) is None
    assert scores("Hopper-v4", {"max_episode_steps": 100}) is None
    assert scores("AdroitHandDoor-v1", {}) is None
    maze = {"conventions": "d4rl"}
    assert scores("AntMaze_UMaze-v4", maze) == (0.0, 1.0)
    assert scores("AntMaze_UMaze-v4", {**maze, "continuing_task": False}) == (0.0, 1.0)
    assert scores("AntMaze_UMaze-v4", {"continuing_task": False}) is None
    assert scores("hopper-medium-v2", {}) is None  # not an environment


def test_runs_train_and_score_in_the_range_of_policies(write: Write) -> None:
    task = Task.load(str(write(fields(-2, 2), env_id="Pendulum-v1")))
    assert task.dataset.action_bounds == (-1.0, 1.0)
    policy = TensorDictModule(
        lambda o: torch.full((len(o), 1), 0.5), in_keys=["observation"], out_keys=[ACTION]
    )
    half = TensorDictModule(torch.ones_like, in_keys=[ACTION], out_keys=[ACTION])
    raw = evaluate(TensorDictSequential(policy, half), "Pendulum-v1", episodes=1)
    assert task.score(policy, episodes=1).returns == raw.returns
