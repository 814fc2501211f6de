"""The decision transformer at work: its memory and its target return."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from dt_cases import SMALL
from tensordict import TensorDict

from baselines import dt
from iwsft.evaluation import evaluate
from iwsft.trajectory import from_steps


@pytest.fixture
def recorded() -> Iterator[list[list[tuple[np.ndarray, np.ndarray, float]]]]:
    """HalfCheetah that keeps (observation, action, reward) of every step of every episode."""
    episodes: list[list[tuple[np.ndarray, np.ndarray, float]]] = []

    class Recorded(gym.Wrapper):  # type: ignore[type-arg]
        def reset(self, **kwargs: Any) -> Any:
            self.last, info = self.env.reset(**kwargs)
            self.steps: list[tuple[np.ndarray, np.ndarray, float]] = []
            episodes.append(self.steps)
            return self.last, info

        def step(self, action: Any) -> Any:
            following, reward, *rest = self.env.step(action)
            self.steps.append((self.last, action, float(reward)))
            self.last = following
            return following, reward, *rest

    gym.register(
        "Recorded-v0",
        entry_point=lambda: Recorded(
            gym.make("HalfCheetah-v4", max_episode_steps=90, disable_env_checker=True)
        ),
    )
    yield episodes
    del gym.registry["Recorded-v0"]


def cheetah() -> dt.DTPolicy:
    torch.manual_seed(0)
    settings = dataclasses.replace(SMALL, context=8, target_return=20.0, return_scale=10.0)
    policy = dt.policy(17, 6, settings)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return policy


class TestActing:
    @pytest.mark.filterwarnings("ignore:.*out of date:DeprecationWarning")
    def test_actions_are_those_of_the_true_history(self, recorded: list[Any]) -> None:
        policy = cheetah()
        evaluate(policy, "Recorded-v0", episodes=5, num_envs=2)
        episodes = [episode for episode in recorded if episode]  # the size check resets once
        assert [len(episode) for episode in episodes] == [90] * 5
        for episode in episodes:
            columns = zip(*episode, strict=True)
            observation, action, reward = (
                torch.from_numpy(np.stack(column)).float() for column in columns
            )
            return_to_go = 20.0 - torch.cat([torch.zeros(1), reward.cumsum(0)[:-1]])
            for t in range(90):
                since = max(0, t - 7)
                with torch.no_grad():
                    expected = policy.network.eval()(
                        observation[None, since : t + 1],
                        # Not the action that is asked for.
                        torch.cat([action[since:t], torch.zeros(1, 6)])[None],
                        return_to_go[None, since : t + 1, None],
                    )[0, -1]
                torch.testing.assert_close(action[t], expected, rtol=0, atol=2e-5)

    def test_neighbours_and_earlier_evaluations_change_nothing(self) -> None:
        policy = cheetah()
        policy.train()  # evaluate turns dropout off
        few = {"max_episode_steps": 40}
        results = [
            evaluate(policy, "HalfCheetah-v4", episodes=6, num_envs=n, env_kwargs=few).returns
            for n in (1, 4, 6)
        ]
        assert results[0] == results[1] == results[2]
        fewer = evaluate(policy, "HalfCheetah-v4", episodes=2, env_kwargs=few).returns
        assert fewer == results[0][:2]

    def test_no_target_return(self) -> None:
        policy = dt.policy(17, 6, dataclasses.replace(SMALL, target_return=None))
        with pytest.raises(ValueError, match="no target return: set target_return"):
            evaluate(policy, "HalfCheetah-v4", episodes=1)

    def test_history_of_other_rows(self) -> None:
        policy = cheetah()

        def step(rows: int, first: bool) -> None:
            policy(
                TensorDict(
                    {
                        "observation": torch.zeros(rows, 17),
                        "is_init": torch.full((rows, 1), first),
                        "reward": torch.zeros(rows, 1),
                    },
                    [rows],
                )
            )

        step(3, True)
        step(3, False)
        with pytest.raises(ValueError, match="history of 3 rows, not of 4"):
            step(4, False)


class Wish(gym.Env[np.ndarray, np.ndarray]):
    """Four steps; each pays 1 + action. The observation is the share of steps that is left."""

    observation_space = gym.spaces.Box(0.0, 1.0, (1,), np.float32)
    action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = 4
        return np.array([1.0], np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        following = np.array([self.left / 4], np.float32)
        return following, 1 + float(action[0]), self.left == 0, False, {}


def test_reaches_its_target_return() -> None:
    """Trajectories of one action each, from poor to good: the action is what the return tells."""
    levels = torch.tensor([-0.9, -0.6, -0.3, 0.0, 0.3, 0.6, 0.9])
    action = levels.repeat_interleave(4).repeat(30)[:, None]
    trajectories = from_steps(
        {
            "observation": torch.tensor([1, 0.75, 0.5, 0.25]).repeat(210)[:, None],
            "action": action,
            ("next", "reward"): 1 + action,
        },
        torch.arange(210).repeat_interleave(4),
    )
    settings = dt.Settings(
        steps=400, lr=2e-3, context=4, layers=1, width=32, dropout=0.0, batch_size=64
    )
    learner = dt.build(trajectories, settings, seed=0)
    learner.fit()
    gym.register("Wish-v0", entry_point=Wish)
    try:
        # The default is the best return of the data. Levels are 1.2 apart: nearer to the
        # one asked for than to the next.
        best = evaluate(learner.policy, "Wish-v0", episodes=1).returns[0]
        assert best == pytest.approx(4 * 1.9, abs=0.6)
        for wanted in (4 * 0.4, 4 * 1.0, 4 * 1.6):
            learner.policy.target_return.fill_(wanted)
            got = evaluate(learner.policy, "Wish-v0", episodes=1).returns[0]
            assert got == pytest.approx(wanted, abs=0.6)
    finally:
        del gym.registry["Wish-v0"]
