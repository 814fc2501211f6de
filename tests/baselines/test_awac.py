"""AWAC against its equations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDictBase

from baselines import awac
from baselines.awac import AWACLoss
from baselines.critics import TargetUpdate, qvalue_networks
from iwsft.policies import GaussianPolicy

GAMMA = 0.9


def make_loss(**settings: Any) -> AWACLoss:
    """Targets unlike the networks; a policy so narrow that its draws are its means."""
    torch.manual_seed(0)
    policy = GaussianPolicy(
        3,
        2,
        hidden=(8, 8),
        log_std_bounds=(-20.0, 2.0),
        log_std_init=settings.pop("log_std", -20.0),
    )
    loss = AWACLoss(policy, qvalue_networks(3, 2, (8, 8)), gamma=GAMMA, **settings)
    TargetUpdate(loss, tau=0.1)
    with torch.no_grad():
        for target in loss.target_qvalue_network_params.values(True, True):
            target.mul_(1.5)
    return loss


@torch.no_grad()
def mean_action(loss: AWACLoss, batch: TensorDictBase) -> torch.Tensor:
    with loss.actor_network_params.to_module(loss.actor_network):
        return loss.actor_network.get_dist(batch.copy()).mean


@torch.no_grad()
def log_prob(loss: AWACLoss, batch: TensorDictBase) -> torch.Tensor:
    with loss.actor_network_params.to_module(loss.actor_network):
        return loss.actor_network.log_prob(batch.copy())


@torch.no_grad()
def q_of(loss: AWACLoss, batch: TensorDictBase, action: torch.Tensor, params: Any) -> Any:
    """``[2, B]``, each network by itself."""
    out = []
    for member in range(2):
        with params[member].to_module(loss.qvalue_network):
            inputs = batch.copy().set("action", action)
            out.append(loss.qvalue_network(inputs)["state_action_value"].squeeze(-1))
    return torch.stack(out)


def test_losses_are_those_of_the_equations(trajectories: Any) -> None:
    loss = make_loss(temperature=0.5, reduction="none")
    actual = loss(trajectories)
    following, action = trajectories["next"], trajectories["action"]
    after = q_of(
        loss, following, mean_action(loss, following), loss.target_qvalue_network_params
    ).amin(0)
    goes_on = ~trajectories["next", "terminated"].squeeze(-1)
    target = trajectories["next", "reward"].squeeze(-1) + GAMMA * goes_on * after
    q = q_of(loss, trajectories, action, loss.qvalue_network_params)
    torch.testing.assert_close(
        actual["loss_qvalue"], ((q - target) ** 2).sum(0), rtol=1e-4, atol=1e-5
    )
    own = q_of(loss, trajectories, mean_action(loss, trajectories), loss.qvalue_network_params)
    weight = ((q.amin(0) - own.amin(0)) / 0.5).exp()
    expected = -weight * log_prob(loss, trajectories)
    torch.testing.assert_close(actual["loss_actor"], expected, rtol=1e-4, atol=1e-5)


def test_value_is_one_draw_of_the_policy(trajectories: Any) -> None:
    loss = make_loss(log_std=0.0, temperature=1.0, reduction="none")
    torch.manual_seed(3)
    first = loss(trajectories)
    torch.manual_seed(3)
    again = loss(trajectories)
    for name in ("loss_actor", "loss_qvalue"):
        assert torch.equal(first[name], again[name])
        assert not torch.equal(first[name], loss(trajectories)[name])


def test_actions_are_clamped(trajectories: Any) -> None:
    # So wide a policy that every draw is at an edge.
    loss = make_loss(log_std=2.0, action_range=(-1e-6, 1e-6), reduction="none", temperature=1.0)
    actual = loss(trajectories)["loss_actor"]
    nothing = torch.zeros_like(trajectories["action"])
    q = q_of(loss, trajectories, trajectories["action"], loss.qvalue_network_params).amin(0)
    v = q_of(loss, trajectories, nothing, loss.qvalue_network_params).amin(0)
    expected = -(q - v).exp() * log_prob(loss, trajectories)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_weight_is_clipped(trajectories: Any) -> None:
    loss = make_loss(temperature=1e-6, max_weight=7.0, reduction="none", log_std=0.0)
    weight = loss(trajectories)["loss_actor"] / -log_prob(loss, trajectories)
    assert float(weight.detach().max()) == pytest.approx(7.0)
    mean = make_loss(temperature=1e-6, max_weight=7.0, log_std=0.0)(trajectories)["weight_mean"]
    assert 0 < float(mean) < 7
    with pytest.raises(ValueError, match="temperature=0"):
        make_loss(temperature=0.0)
    with pytest.raises(ValueError, match="max_weight=-1"):
        make_loss(max_weight=-1.0)


def test_entropy(trajectories: Any) -> None:
    loss = make_loss()
    expected = -log_prob(loss, trajectories).mean()
    torch.testing.assert_close(loss(trajectories)["entropy"], expected)


def test_published_settings() -> None:
    locomotion, source = awac.published("walker2d-medium-v2")
    assert "CORL" in source and "none published" not in source
    assert locomotion == awac.Settings(
        steps=1_000_000,
        batch_size=256,
        lr=3e-4,
        gamma=0.99,
        tau=0.005,
        temperature=1 / 3,
        max_weight=100.0,
        hidden=(256, 256, 256),
        rewards="as they are",
    )
    maze, _ = awac.published("antmaze-umaze-v0")
    assert (maze.temperature, maze.rewards) == (0.1, "minus one")
    hand, _ = awac.published("door-human-v1")
    assert (hand.temperature, hand.rewards) == (0.1, "as they are")
    for name in ("kitchen-mixed-v0", "my-robot"):
        assert f"none published for {name}" in awac.published(name)[1]
