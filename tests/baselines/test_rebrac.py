"""ReBRAC's own: the data's next action, the start of its networks, published settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import nn

from baselines import rebrac
from iwsft.trajectory import ACTION, MASK, OBSERVATION, TERMINATED, TRUNCATED

MakeTrajectories = Callable[..., TensorDict]
SMALL = rebrac.Settings(steps=8, batch_size=500, hidden=(16, 16))


class TestNextActions:
    def test_they_are_of_the_next_step_and_cut_off_steps_are_left_out(
        self, make_trajectories: MakeTrajectories
    ) -> None:
        data = make_trajectories()
        sampler = rebrac.build(data, SMALL, seed=0).sampler
        batch = sampler.sample()
        rows = (batch[OBSERVATION][:, None] == data[OBSERVATION]).all(-1)
        assert bool((rows.sum(1) == 1).all())
        steps = rows.int().argmax(1)
        assert set(steps.tolist()) == set((~data[TRUNCATED]).squeeze(-1).nonzero()[:, 0].tolist())
        for step, action in zip(steps.tolist(), batch["next", "action"], strict=True):
            last = bool(data[TERMINATED][step])
            expected = torch.zeros(2) if last else data[ACTION][step + 1]
            assert torch.equal(action, expected)

    def test_a_masked_step_is_no_next_one(self, make_trajectories: MakeTrajectories) -> None:
        data = make_trajectories((3, 3))
        data[MASK] = torch.tensor([True, True, False, True, True, True])
        data[ACTION][2] = torch.nan
        copied = rebrac.with_next_actions(data)
        assert copied[MASK].tolist() == [True, False, False, True, True, False]
        assert copied["next", "action"].isfinite().all()

    def test_without_any_it_says_so(self, make_trajectories: MakeTrajectories) -> None:
        data = make_trajectories((1, 1))
        with pytest.raises(ValueError, match="no step has a next action"):
            rebrac.build(data[1:], SMALL, seed=0)


def test_networks_start_as_the_authors_do(make_trajectories: MakeTrajectories) -> None:
    learner = rebrac.build(make_trajectories(), SMALL, seed=0)
    actor = [x for x in learner.policy.modules() if isinstance(x, nn.Linear)]
    assert all(bool((layer.bias == 0.1).all()) for layer in actor[:-1])
    for last in (actor[-1].weight, actor[-1].bias):
        assert 0 < last.abs().max() <= 1e-3
    critics = learner.loss.qvalue_network_params["module", "layers"]
    assert bool((critics["0", "bias"] == 0.1).all()) and bool((critics["1", "scale"] == 1).all())
    assert 0 < critics["2", "weight"].abs().max() <= 3e-3
    assert not torch.equal(*critics["0", "weight"])


@pytest.mark.parametrize(
    ("dataset", "changes"),
    [
        ("hopper-medium-replay-v2", {"actor_penalty": 0.05, "critic_penalty": 0.5}),
        (
            "door-human-v1",
            {
                "batch_size": 256,
                "lr": 3e-4,
                "actor_lr": 3e-4,
                "actor_penalty": 0.1,
                "critic_penalty": 0.1,
            },
        ),
        (
            "antmaze-umaze-v2",
            {
                "batch_size": 256,
                "lr": 5e-5,
                "actor_lr": 3e-4,
                "gamma": 0.999,
                "rewards": "times 100",
                "actor_penalty": 0.003,
                "critic_penalty": 0.002,
            },
        ),
        ("my-own", {}),
    ],
)
def test_published_settings(dataset: str, changes: dict[str, Any]) -> None:
    """The numbers of the configurations, written down again."""
    settings, source = rebrac.published(dataset)
    locomotion = rebrac.Settings(
        steps=1_000_000,
        batch_size=1024,
        lr=1e-3,
        actor_lr=1e-3,
        gamma=0.99,
        tau=0.005,
        alpha=1.0,
        policy_noise=0.2,
        noise_clip=0.5,
        policy_delay=2,
        hidden=(256, 256, 256),
        rewards="as they are",
        actor_penalty=0.01,
        critic_penalty=0.01,
    )
    assert settings == replace(locomotion, **changes)
    assert "2305.09836" in source and ("none published" in source) == (dataset == "my-own")


@pytest.mark.parametrize("name", ["actor_penalty", "critic_penalty"])
def test_a_negative_penalty_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}.* can't be negative"):
        rebrac.Settings(**{name: -0.1})
