from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from operator import itemgetter
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.modules import IndependentNormal, ProbabilisticActor

from iwsft import evaluation
from iwsft.evaluation import episode_seeds, evaluate, normalized_score
from iwsft.policies.gaussian import GaussianPolicy

HOPPER_REFERENCE = (-20.272305, 3234.3)


def hopper_policy() -> GaussianPolicy:
    torch.manual_seed(0)
    return GaussianPolicy(11, 3)


def actor(mean: Callable[[Tensor], Tensor], std: float = 0.3) -> ProbabilisticActor:
    """A policy with a hand-written mean, as a plain TorchRL actor."""

    class Mean(nn.Module):
        def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
            loc = mean(observation)
            return loc, torch.full_like(loc, std)

    return ProbabilisticActor(
        TensorDictModule(Mean(), in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=IndependentNormal,
    )


def test_a_policy_of_minus_1_to_1_in_an_environment_of_other_bounds_is_told() -> None:
    scaled = {"action_bounds": [-2.0, 2.0], "max_episode_steps": 2}
    with pytest.warns(
        UserWarning, match=r"Pendulum-v1 have the bounds \[-2.\] and \[2.\], and the"
    ):
        evaluate(
            GaussianPolicy(3, 1), "Pendulum-v1", episodes=1, env_kwargs={"max_episode_steps": 2}
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        evaluate(GaussianPolicy(3, 1), "Pendulum-v1", episodes=1, env_kwargs=scaled)
        evaluate(actor(lambda x: x[:, :1]), "Pendulum-v1", episodes=1)


def plain_loop(
    env_id: str,
    act: Callable[[np.ndarray], np.ndarray],
    seeds: list[int],
    vector: Callable[[Any], np.ndarray] = np.asarray,
    **kwargs: Any,
) -> tuple[list[float], list[int]]:
    """One environment, one episode after the other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # gymnasium: v4 is out of date
        env = gym.make(env_id, **kwargs)
    returns, lengths = [], []
    for seed in seeds:
        observation, _ = env.reset(seed=seed)
        total, steps, over = 0.0, 0, False
        while not over:
            action = act(np.asarray(vector(observation), dtype=np.float32))
            observation, reward, terminated, truncated, _ = env.step(action)
            total, steps, over = total + float(reward), steps + 1, terminated or truncated
        returns.append(total)
        lengths.append(steps)
    return returns, lengths


def alone(policy: GaussianPolicy, rows: int = 32) -> Callable[[np.ndarray], np.ndarray]:
    """The policy's mean action for one observation, computed in a batch of equal rows."""

    def act(observation: np.ndarray) -> np.ndarray:
        batch = torch.from_numpy(np.tile(observation, (rows, 1)))
        with torch.no_grad():
            loc = policy.get_dist(TensorDict({"observation": batch}, [rows])).mean
        return np.clip(loc[0].numpy(), -1.0, 1.0)

    return act


def test_equals_a_plain_loop_over_single_episodes() -> None:
    policy = hopper_policy()
    result = evaluate(policy, "Hopper-v4", episodes=6, seed=3, num_envs=4)
    returns, lengths = plain_loop("Hopper-v4", alone(policy), episode_seeds(3, 6))
    assert result.returns == returns
    assert result.lengths == lengths
    assert result.env_id == "Hopper-v4"
    assert result.versions["gymnasium"] == gym.__version__
    assert set(result.versions) == {"gymnasium", "mujoco"}


@pytest.mark.parametrize(("env_id", "sizes"), [("Hopper-v4", (11, 3)), ("HalfCheetah-v4", (17, 6))])
def test_number_of_environments_changes_nothing(env_id: str, sizes: tuple[int, int]) -> None:
    torch.manual_seed(1)
    policy = GaussianPolicy(*sizes)
    results = [
        evaluate(policy, env_id, episodes=10, num_envs=n, env_kwargs={"max_episode_steps": 60})
        for n in (1, 4, 10)
    ]
    assert results[0].returns == results[1].returns == results[2].returns
    assert results[0].lengths == results[1].lengths == results[2].lengths
    assert len(set(results[0].returns)) == 10  # every episode has its own start


def test_first_episodes_do_not_depend_on_how_many_follow() -> None:
    policy = hopper_policy()
    few = evaluate(policy, "Hopper-v4", episodes=3, seed=5)
    many = evaluate(policy, "Hopper-v4", episodes=7, seed=5, num_envs=2)
    other = evaluate(policy, "Hopper-v4", episodes=3, seed=6)
    assert many.returns[:3] == few.returns
    assert other.returns != few.returns


@given(st.integers(0, 2**63), st.integers(1, 40), st.integers(1, 40))
def test_seeds_are_distinct_prefixes(seed: int, first: int, second: int) -> None:
    few, many = sorted((first, second))
    assert episode_seeds(seed, many)[:few] == episode_seeds(seed, few)


def test_seeds_differ() -> None:
    assert len(set(episode_seeds(0, 1000))) == 1000
    assert not set(episode_seeds(0, 1000)) & set(episode_seeds(1, 1000))


class Countdown(gym.Env[np.ndarray, np.ndarray]):
    """Lasts as many steps as its seed draws; each step pays the action; reports success once."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (1,), np.float32)
    action_space = gym.spaces.Box(-2.0, 2.0, (1,), np.float32)

    def __init__(self, key: str = "success") -> None:
        self.key = key

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 20))
        self.wins = self.left >= 10
        return np.array([self.left], np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert self.left > 0, "stepped after its end"
        told = {self.key: self.wins and self.left == 5}
        self.left -= 1
        return np.array([self.left], np.float32), float(action[0]), self.left == 0, False, told


class Endless(Countdown):
    """A countdown that does not stop at 0."""

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return np.array([0.0], np.float32), 0.0, False, False, {}


@pytest.fixture
def countdown() -> Iterator[str]:
    gym.register("Countdown-v0", entry_point=Countdown)
    yield "Countdown-v0"
    del gym.registry["Countdown-v0"]


@pytest.mark.parametrize("key", ["success", "is_success"])
@pytest.mark.parametrize("num_envs", [1, 3, 50])
def test_closed_form(countdown: str, key: str, num_envs: int) -> None:
    """Steps, returns and successes follow from the seeds alone; no seed is skipped or reused."""
    result = evaluate(
        actor(lambda o: 0.25 * o[:, :1]),
        countdown,
        episodes=50,
        seed=9,
        num_envs=num_envs,
        env_kwargs={"key": key},
    )
    draws = [int(np.random.default_rng(seed).integers(1, 20)) for seed in episode_seeds(9, 50)]
    assert result.lengths == draws
    # Actions are a quarter of the steps left, at most the bound 2.
    assert result.returns == [sum(min(k / 4, 2.0) for k in range(1, n + 1)) for n in draws]
    assert result.successes == [n >= 10 for n in draws]


def test_acts_deterministically_and_leaves_generators_alone() -> None:
    policy = actor(lambda observation: observation[:, :3].tanh(), std=2.0)
    torch.manual_seed(7)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()
    result = evaluate(policy, "Hopper-v4", episodes=3)
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(numpy_before, np.random.get_state()[1])
    expected, _ = plain_loop(
        "Hopper-v4",
        lambda o: torch.from_numpy(np.tile(o[:3], (32, 1))).tanh()[0].numpy(),
        episode_seeds(0, 3),
    )
    assert result.returns == expected


def test_actions_are_clipped_to_the_bounds() -> None:
    beyond = evaluate(actor(lambda o: 5.0 * torch.ones(len(o), 3)), "Hopper-v4", episodes=2)
    at = evaluate(actor(lambda o: torch.ones(len(o), 3)), "Hopper-v4", episodes=2)
    assert beyond.returns == at.returns


def test_one_policy_call_a_step() -> None:
    calls: list[int] = []

    def mean(observation: Tensor) -> Tensor:
        calls.append(len(observation))
        return torch.zeros(len(observation), 1)

    steps = 25
    result = evaluate(
        actor(mean), "InvertedPendulum-v4", episodes=8, env_kwargs={"max_episode_steps": steps}
    )
    # One call finds out whether the sizes fit, one follows for each step of the longest episode.
    assert len(calls) == 1 + max(result.lengths)
    assert len(set(calls)) == 1


@given(
    st.lists(st.floats(-1e4, 1e4), min_size=1, max_size=5),
    st.floats(-1e3, 1e3),
    st.floats(1.0, 1e4),
)
def test_normalised_score_closed_form(returns: list[float], low: float, gap: float) -> None:
    scores = normalized_score(returns, (low, low + gap))
    for score, value in zip(scores, returns, strict=True):
        assert low + score / 100.0 * (low + gap - low) == pytest.approx(value, abs=1e-6)


def test_normalised_scores_of_an_evaluation() -> None:
    result = evaluate(hopper_policy(), "Hopper-v4", episodes=2, reference_scores=HOPPER_REFERENCE)
    low, high = HOPPER_REFERENCE
    expected = [100.0 * (value - low) / (high - low) for value in result.returns]
    assert result.normalized_scores == pytest.approx(expected, rel=1e-12)
    assert result.score == pytest.approx(sum(expected) / 2)
    assert normalized_score(high, HOPPER_REFERENCE) == 100.0
    assert evaluate(hopper_policy(), "Hopper-v4", episodes=1).normalized_scores is None


def test_modes_of_modules_are_put_back() -> None:
    policy = hopper_policy()
    policy.train()
    frozen = next(module for module in policy.modules() if isinstance(module, nn.Linear))
    frozen.eval()
    evaluate(policy, "Hopper-v4", episodes=1)
    assert policy.training
    assert not frozen.training


def test_no_warning_about_the_version() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate(hopper_policy(), "Hopper-v4", episodes=1)


def test_summary_names_environment_and_versions() -> None:
    result = evaluate(hopper_policy(), "Hopper-v4", episodes=2, reference_scores=HOPPER_REFERENCE)
    text = str(result)
    assert "Hopper-v4" in text and f"gymnasium {gym.__version__}" in text and "mujoco" in text
    assert "2 episodes" in text


class TestRobotics:
    def test_adroit_reports_success(self) -> None:
        result = evaluate(
            actor(lambda o: torch.zeros(len(o), 28)),
            "AdroitHandDoor-v1",
            episodes=2,
            env_kwargs={"max_episode_steps": 20},
        )
        assert result.successes == [False, False]
        assert "gymnasium-robotics" in result.versions

    def test_own_function_for_dict_observations(self) -> None:
        result = evaluate(
            actor(lambda o: o[:, :4]),
            "FetchReachDense-v4",
            episodes=2,
            observation=itemgetter("observation"),
            env_kwargs={"max_episode_steps": 5},
        )
        returns, lengths = plain_loop(
            "FetchReachDense-v4",
            lambda o: np.clip(o[:4], -1.0, 1.0),
            episode_seeds(0, 2),
            vector=itemgetter("observation"),
            max_episode_steps=5,
        )
        assert result.lengths == lengths == [5, 5]
        assert result.returns == returns


class TestErrors:
    def test_unknown_environment_suggests_the_nearest(self) -> None:
        with pytest.raises(ValueError, match=r"unknown environment 'Hoper-v4'.*Hopper-v4"):
            evaluate(hopper_policy(), "Hoper-v4")

    def test_an_environment_is_no_id(self) -> None:
        for wrong in (gym.make("Hopper-v4"), lambda: gym.make("Hopper-v4"), None):
            with pytest.raises(TypeError, match=r"is not an id of an environment; pass its id"):
                evaluate(hopper_policy(), wrong)  # type: ignore[arg-type]
        spec = gym.spec("Hopper-v4")
        assert evaluate(hopper_policy(), spec, episodes=1, seed=3).returns == (  # type: ignore[arg-type]
            evaluate(hopper_policy(), "Hopper-v4", episodes=1, seed=3).returns
        )

    def test_retired_environment(self) -> None:
        with pytest.raises(ValueError, match=r"deprecated.*Hopper-v4"):
            evaluate(hopper_policy(), "Hopper-v1")

    @pytest.mark.parametrize(
        ("sizes", "message"),
        [((17, 3), r"observations have size 11"), ((11, 6), r"shape \(6,\), Hopper-v4 takes \(3,")],
    )
    def test_policy_of_another_environment(self, sizes: tuple[int, int], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            evaluate(GaussianPolicy(*sizes), "Hopper-v4")

    def test_policy_without_action(self) -> None:
        policy = GaussianPolicy(11, 3, out_key="torque")
        with pytest.raises(ValueError, match=r"must write 'action'.*torque"):
            evaluate(policy, "Hopper-v4")

    def test_policy_that_reads_other_keys(self) -> None:
        with pytest.raises(ValueError, match=r"reads \['pixels'\]"):
            evaluate(GaussianPolicy(11, 3, in_key="pixels"), "Hopper-v4")

    def test_nan_action_names_step_and_episode(self) -> None:
        calls = 0

        def mean(observation: Tensor) -> Tensor:
            nonlocal calls
            calls += 1  # the first call is the size check, the second is step 0
            out = torch.zeros(len(observation), 3)
            out[1, 2] = torch.nan if calls == 6 else 0.0
            return out

        with pytest.raises(FloatingPointError, match=r"nan.* at step 4 of episode 1 "):
            evaluate(actor(mean), "Hopper-v4", episodes=3)

    def test_rows_that_run_no_episode_do_not_matter(self) -> None:
        def mean(observation: Tensor) -> Tensor:
            out = torch.zeros(len(observation), 3)
            out[2:] = torch.nan
            return out

        assert len(evaluate(actor(mean), "Hopper-v4", episodes=2).returns) == 2

    def test_episode_without_an_end(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """It stops where nothing sets a limit; a limit that is set is kept, however long."""
        monkeypatch.setattr(evaluation, "_ENDLESS", 50)
        gym.register("NoLimit-v0", entry_point=Endless)
        try:
            with pytest.raises(RuntimeError, match=r"episode 0 .*NoLimit-v0.*max_episode_steps"):
                evaluate(actor(lambda o: o[:, :1]), "NoLimit-v0", episodes=1)
            limited = evaluate(
                actor(lambda o: o[:, :1]),
                "NoLimit-v0",
                episodes=1,
                env_kwargs={"max_episode_steps": 60},
            )
        finally:
            del gym.registry["NoLimit-v0"]
        assert limited.lengths == [60]

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"episodes": 0}, "episodes=0"),
            ({"num_envs": 0}, "num_envs=0"),
            ({"seed": -1}, "seed=-1"),
            ({"reference_scores": (5.0, 5.0)}, "reference_scores"),
            ({"device": "meta"}, "policy is on cpu"),
        ],
    )
    def test_settings(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            evaluate(hopper_policy(), "Hopper-v4", **settings)

    def test_discrete_actions(self) -> None:
        with pytest.raises(ValueError, match=r"CartPole-v1 has the action space Discrete"):
            evaluate(GaussianPolicy(4, 1), "CartPole-v1")

    def test_dict_observation_asks_for_a_function(self) -> None:
        with pytest.raises(ValueError, match=r"FetchReach-v4 are Dict.*pass observation="):
            evaluate(GaussianPolicy(10, 4), "FetchReach-v4")
