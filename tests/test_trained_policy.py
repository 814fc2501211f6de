from __future__ import annotations

import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.registration import EnvSpec

from baselines import algorithm
from iwsft import GaussianPolicy, ImportanceWeightedMLE, checkpoint, load_policy
from iwsft.acting import acting
from iwsft.evaluation import episode_seeds, evaluate
from iwsft.samplers import StepSampler
from iwsft.trained_policy import TrainedPolicy, save_policy
from iwsft.training import Schedule, fit
from iwsft.trajectory import from_steps

PENDULUM = {"action_bounds": [[-2.0], [2.0]], "max_episode_steps": 20}


def pendulum_policy(seed: int = 0) -> GaussianPolicy:
    torch.manual_seed(seed)
    return GaussianPolicy(3, 1)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    policy = TrainedPolicy(pendulum_policy(), "Pendulum-v1", PENDULUM, None, 3)
    save_policy(tmp_path, policy, algo="iw-sft", action_dim=1)
    return tmp_path


def test_actions_are_in_the_range_of_the_environment(saved: Path, tmp_path: Path) -> None:
    policy = load_policy(saved)
    rows = 10 * torch.randn(50, 3)
    with acting(policy.module):
        means = policy.module(observation=rows)[-1]
    action = policy.act(rows.numpy())
    np.testing.assert_allclose(action, 2 * means.detach().numpy(), rtol=1e-6)
    assert policy.action_bounds == ([-2.0], [2.0])
    with policy.make() as env:
        assert env.action_space == gym.spaces.Box(-2.0, 2.0, (1,))
    for row, wanted in zip(rows.numpy(), action, strict=True):
        np.testing.assert_array_equal(policy.act(row), wanted)
    program = torch.export.load(policy.export(tmp_path / "policy.pt2")).module()
    for n in (1, 2, 50):
        # The program has matrix products of its own: equal to the rounding of float32.
        np.testing.assert_allclose(program(rows[:n]).numpy(), action[:n], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match="observations have size 3, got 4"):
        policy.act(np.zeros(4))


def test_by_hand_and_by_evaluate_the_returns_are_the_same(saved: Path) -> None:
    policy = load_policy(saved / "policy.pt")
    result = policy.evaluate(episodes=1)
    other = evaluate(policy.module, "Pendulum-v1", episodes=1, env_kwargs=PENDULUM)
    assert result.returns == other.returns

    total = 0.0
    with policy.make() as env:
        observation, _ = env.reset(seed=episode_seeds(0, 1)[0])
        for _ in range(20):
            observation, reward, _, over, _ = env.step(policy.act(observation))
            total += float(reward)
    assert over
    assert total == result.returns[0]


class Counted(gym.Env[Any, Any]):
    """It takes numbers from 0 to 5, and keeps what it took."""

    observation_space = gym.spaces.Box(-1.0, 1.0, (3,), np.float32)
    taken: list[tuple[np.ndarray, np.ndarray]] = []

    def __init__(self, dtype: str) -> None:
        self.action_space = gym.spaces.Box(0, 5, (1,), np.dtype(dtype))

    def reset(self, **options: Any) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(**options)
        self.seen = self.np_random.uniform(-30, 30, 3).astype(np.float32)
        return self.seen, {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.taken.append((self.seen, action))
        return self.reset()[0], 0.0, False, False, {}


@pytest.mark.parametrize("dtype", ["int8", "int64", "float64"])
def test_actions_are_those_that_evaluation_sends(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gym.registry, "Counted-v0", EnvSpec("Counted-v0", Counted))
    kwargs = {"action_bounds": [0, 5], "dtype": dtype, "max_episode_steps": 20}
    policy = TrainedPolicy(pendulum_policy(), "Counted-v0", kwargs, None, 3, dtype)
    save_policy(tmp_path, policy, algo="iw-sft", action_dim=1)
    policy = load_policy(tmp_path)
    monkeypatch.setattr(Counted, "taken", [])
    policy.evaluate(episodes=1)
    assert len({float(action[0]) for _, action in Counted.taken}) > 2
    program = torch.export.load(policy.export(tmp_path / "policy.pt2")).module()
    for observation, action in Counted.taken:
        np.testing.assert_array_equal(policy.act(observation), action, strict=True)
        exported = program(torch.from_numpy(observation[None]))[0]
        # Rounding of a network's float32 output in [-1, 1], scaled to [0, 5].
        np.testing.assert_allclose(exported, action, rtol=0, atol=2.5e-6)
        assert exported.is_floating_point() == (dtype == "float64")


def test_dict_observations_are_flat(tmp_path: Path) -> None:
    torch.manual_seed(0)
    policy = TrainedPolicy(GaussianPolicy(29, 8), "AntMaze_UMaze-v4", {"conventions": "d4rl"})
    with policy.make() as env:
        observation, _ = env.reset(seed=0)
        assert observation.shape == env.observation_space.shape == (29,)
        env.step(policy.act(observation))


def test_a_checkpoint_fills_a_policy_of_the_same_form(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    torch.manual_seed(0)
    steps = {"observation": torch.randn(20, 3), "action": torch.rand(20, 1)}
    data = from_steps(steps, torch.arange(20) // 5)
    policy = GaussianPolicy(3, 1, hidden=(8,), squash=True)
    loss = ImportanceWeightedMLE(policy, proposal="reference")
    fit(loss, StepSampler(data, 4, seed=0), Schedule(3, 1e-3), folder=tmp_path)
    for path in (tmp_path, tmp_path / "checkpoint", tmp_path / "checkpoint" / "state.pt"):
        filled = load_policy(path, GaussianPolicy(3, 1, hidden=(8,), squash=True)).module
        for name, value in policy.state_dict().items():
            torch.testing.assert_close(filled.state_dict()[name], value, rtol=0, atol=0)
    assert not [each for each in recwarn if "as the trained one" in str(each.message)]
    with pytest.warns(UserWarning, match=r"not made as the trained one was: .*squash='True' \(now"):
        load_policy(tmp_path, GaussianPolicy(3, 1, hidden=(8,)))
    with pytest.raises(checkpoint.CheckpointError, match="holds no policy of this form"):
        load_policy(tmp_path, GaussianPolicy(3, 1))
    with pytest.raises(ValueError, match="names no environment"):
        load_policy(tmp_path, policy).evaluate()
    with pytest.raises(ValueError, match="does not say how large"):
        load_policy(tmp_path, policy).export(tmp_path / "policy.pt2")
    with pytest.raises(FileNotFoundError, match="policy= for the checkpoint"):
        load_policy(tmp_path)


@pytest.mark.parametrize(("algo", "warns"), [("td3-bc", True), ("iql", False)])
def test_an_unfinished_baseline_may_lack_its_normalisation(
    algo: str, warns: bool, tmp_path: Path
) -> None:
    module = algorithm(algo)
    actor = module.policy(3, 1, module.Settings())
    actor = getattr(actor, "actor", actor)
    state = {f"actor_network_params.{name}": value for name, value in actor.state_dict().items()}
    settings = {"algo": algo, "baseline": asdict(module.Settings())}
    checkpoint.save(tmp_path / "checkpoint", {"loss": state}, settings)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        load_policy(tmp_path, actor)
    assert ["normalised observations" in str(each.message) for each in warned] == [True] * warns


def test_what_is_no_policy_is_refused(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="a finished run's folder"):
        load_policy(tmp_path / "nowhere")
    model = tmp_path / "llm" / "checkpoint"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="language model"):
        load_policy(tmp_path / "llm")
    content = checkpoint.read(saved / "policy.pt", "")
    for change in ({"observation_dim": 4}, {"settings": {"nothing": 1}}, {"state": {}}):
        checkpoint.write(saved / "policy.pt", {**content, **change})
        with pytest.raises(checkpoint.CheckpointError, match="does not fit this version"):
            load_policy(saved)
    foreign: dict[str, Any] = {**content, "env_id": "module_of_a_stranger:Env-v0"}
    checkpoint.write(saved / "policy.pt", foreign)
    with pytest.raises(ValueError, match="trust_env_module"):
        load_policy(saved)
    assert load_policy(saved, trust_env_module=True).env_id == foreign["env_id"]
