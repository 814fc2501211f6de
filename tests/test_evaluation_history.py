"""Policies with a memory: the episode starts and rewards that ``evaluate`` gives them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase

from iwsft.evaluation import episode_seeds, evaluate


class Bank(gym.Env[np.ndarray, np.ndarray]):
    """Lasts as many steps as its seed draws; pays the action plus interest on the step."""

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Box(-100.0, 100.0, (1,), np.float32)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.ends = int(self.np_random.integers(1, 20))
        self.at = 0
        self.kind = float(self.np_random.uniform())
        return np.array([self.kind, self.at], np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.at += 1
        reward = float(action[0]) + self.kind * self.at
        over = self.at == self.ends
        return np.array([self.kind, self.at], np.float32), reward, over, False, {}


@pytest.fixture
def bank() -> Iterator[str]:
    gym.register("Bank-v0", entry_point=Bank)
    yield "Bank-v0"
    del gym.registry["Bank-v0"]


class Remembering(TensorDictModuleBase):
    """action = 0.1 * (first number of the episode) - 0.05 * (rewards so far) + 0.02 * steps."""

    def __init__(self) -> None:
        super().__init__()
        self.in_keys = ["observation", "is_init", "reward"]
        self.out_keys = ["action"]
        self.heights: list[int] = []
        self.memory = torch.zeros(0, 3)

    def forward(self, batch: TensorDictBase) -> TensorDictBase:
        first, reward = batch["is_init"], batch["reward"]
        count = len(batch)
        self.heights.append(count)
        assert first.shape == reward.shape == (count, 1)
        assert (first.dtype, reward.dtype) == (torch.bool, torch.float32)
        assert not reward[first].any()
        if len(self.memory) != count:
            assert bool(first.all())
            self.memory = torch.zeros(count, 3)
        start = torch.cat([batch["observation"][:, :1], torch.zeros(count, 2)], 1)
        told = torch.cat([torch.zeros(count, 1), reward, torch.ones(count, 1)], 1)
        self.memory = torch.where(first, start, self.memory + told)
        weights = torch.tensor([0.1, -0.05, 0.02])
        return batch.set("action", (self.memory * weights).sum(1, keepdim=True))


def plain_returns(seeds: list[int]) -> list[float]:
    """The same policy as a plain loop over single episodes."""
    out = []
    for seed in seeds:
        env = Bank()
        observation, _ = env.reset(seed=seed)
        kind, total, steps, over = float(observation[0]), 0.0, 0, False
        while not over:
            action = np.array([0.1 * kind - 0.05 * total + 0.02 * steps])
            _, reward, over, _, _ = env.step(action)
            total, steps = total + reward, steps + 1
        out.append(total)
    return out


@pytest.mark.parametrize("num_envs", [1, 3, 32, 40])
def test_equals_a_plain_loop_with_a_memory(bank: str, num_envs: int) -> None:
    result = evaluate(Remembering(), bank, episodes=50, seed=2, num_envs=num_envs)
    assert result.returns == pytest.approx(plain_returns(episode_seeds(2, 50)), rel=1e-5)


def test_nothing_is_left_for_the_next_evaluation(bank: str) -> None:
    policy = Remembering()
    first = evaluate(policy, bank, episodes=20, num_envs=7)
    evaluate(policy, bank, episodes=5, seed=1, num_envs=40)
    policy.memory += 100.0
    assert evaluate(policy, bank, episodes=20, num_envs=3).returns == first.returns


def test_rows_keep_their_number_and_idle_rows_always_begin(bank: str) -> None:
    class Watching(Remembering):
        def forward(self, batch: TensorDictBase) -> TensorDictBase:
            seen.append(batch["is_init"][:, 0].tolist())
            return super().forward(batch)

    seen: list[list[bool]] = []
    policy = Watching()
    lengths = evaluate(policy, bank, episodes=5, seed=4, num_envs=2).lengths
    assert set(policy.heights) == {32}
    # The size check, then two rows that take the episodes in turn as they end.
    assert all(seen[0])
    starts: dict[int, list[int]] = {0: [], 1: []}
    free = [0, 0]
    for length in lengths:
        row = int(free[1] < free[0])
        starts[row].append(free[row])
        free[row] += length
    for step, first in enumerate(seen[1:]):
        for row in (0, 1):
            assert first[row] == (step in starts[row] or step >= free[row])
        assert all(first[2:])


def test_inputs_that_a_policy_keeps_do_not_change(bank: str) -> None:
    class Keeping(Remembering):
        def forward(self, batch: TensorDictBase) -> TensorDictBase:
            kept.append((batch["observation"], batch["observation"].clone()))
            return super().forward(batch)

    kept: list[tuple[torch.Tensor, torch.Tensor]] = []
    evaluate(Keeping(), bank, episodes=3)
    assert all(torch.equal(now, then) for now, then in kept)


def test_other_keys_are_refused_by_name(bank: str) -> None:
    policy = Remembering()
    policy.in_keys = ["observation", "is_init", "done"]
    with pytest.raises(ValueError, match=r"reads \['done'\].*observation.*is_init.*reward"):
        evaluate(policy, bank)
