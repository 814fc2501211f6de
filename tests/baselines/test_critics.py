"""The shared value networks: ensembles in one call, their start, targets and limit."""

from __future__ import annotations

import math
from copy import deepcopy
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictParams
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.objectives import IQLLoss, SoftUpdate

from baselines.critics import (
    TargetUpdate,
    qvalue_networks,
    return_limit,
    value_network,
    values,
)
from iwsft.policies import GaussianPolicy
from iwsft.trajectory import MASK, REWARD


def make_loss(hidden: tuple[int, ...] = (8, 8)) -> IQLLoss:
    return IQLLoss(
        GaussianPolicy(3, 2, hidden=hidden),
        qvalue_networks(3, 2, hidden),
        value_network(3, hidden),
    )


def make_inputs(*shape: int) -> TensorDict:
    generator = torch.Generator().manual_seed(0)
    entries = {
        "observation": torch.randn(*shape, 3, generator=generator),
        "action": torch.randn(*shape, 2, generator=generator),
    }
    return TensorDict(entries, batch_size=shape)


# In float64 the members are one batched product, in float32 each is a product of oneDNN.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 7), (0,)])
def test_values_are_those_of_each_network_alone(
    shape: tuple[int, ...], layer_norm: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    networks = qvalue_networks(3, 2, (8, 6), count=3, layer_norm=layer_norm)
    networks = [network.to(dtype) for network in networks]
    policy = GaussianPolicy(3, 2, hidden=(8,))
    loss = IQLLoss(policy, deepcopy(networks), value_network(3), num_qvalue_nets=3)
    params = loss.qvalue_network_params
    inputs = make_inputs(*shape).to(dtype)
    out = values(loss.qvalue_network, inputs, params)
    alone = [network(inputs.copy())["state_action_value"].squeeze(-1) for network in networks]
    assert out.shape == (3, *shape)
    torch.testing.assert_close(out, torch.stack(alone))
    by_vmap = torch.vmap(lambda p: _called(loss.qvalue_network, inputs, p), (0,))(params)
    torch.testing.assert_close(out, by_vmap)
    # And their gradients.
    weight = torch.randn(out.shape)
    gradients = torch.autograd.grad((weight * out).sum(), list(params.values(True, True)))
    true = torch.autograd.grad(
        (weight * torch.stack(alone)).sum(), [p for n in networks for p in n.parameters()]
    )
    for i, gradient in enumerate(gradients):
        torch.testing.assert_close(gradient, torch.stack(true[i :: len(gradients)]))


def _called(network: TensorDictModule, inputs: TensorDict, params: Any) -> torch.Tensor:
    with params.to_module(network):
        return network(inputs.copy())["state_action_value"].squeeze(-1)


def test_values_of_one_network() -> None:
    torch.manual_seed(0)
    loss, inputs = make_loss(), make_inputs(5)
    actual = values(loss.value_network, inputs, loss.value_network_params)
    with loss.value_network_params.to_module(loss.value_network):
        expected = loss.value_network(inputs)["state_value"]
    torch.testing.assert_close(actual, expected.squeeze(-1))


def test_another_network_is_refused() -> None:
    other = TensorDictModule(nn.Linear(3, 1), in_keys=["observation"], out_keys=["state_value"])
    params = TensorDictParams(TensorDict.from_module(other))
    with pytest.raises(TypeError, match=r"baselines\.critics is needed, not a Linear"):
        values(other, make_inputs(2), params)
    with pytest.raises(ValueError, match="sizes must be positive"):
        value_network(3, (8, 0))


def test_members_of_an_ensemble_start_apart_and_as_linear_layers_do() -> None:
    torch.manual_seed(0)
    networks = qvalue_networks(3, 2, (64, 32))
    expected = [[p.detach().clone() for p in n.parameters()] for n in networks]
    loss = IQLLoss(GaussianPolicy(3, 2, hidden=(8,)), networks, value_network(3))
    stacked = list(loss.qvalue_network_params.values(True, True))
    # Nothing is drawn anew when the loss stacks them.
    for i, parameter in enumerate(stacked):
        assert torch.equal(parameter, torch.stack([member[i] for member in expected]))
        assert not torch.equal(parameter[0], parameter[1])
    torch.manual_seed(0)
    layers = [nn.Linear(5, 64), nn.Linear(64, 32), nn.Linear(32, 1)]
    for layer, (weight, bias) in zip(
        layers, zip(expected[0][::2], expected[0][1::2], strict=True), strict=True
    ):
        assert torch.equal(layer.weight, weight) and torch.equal(layer.bias, bias)


def test_reset_keeps_the_scale_of_stacked_networks() -> None:
    torch.manual_seed(0)
    loss = make_loss((64, 32))
    old = loss.qvalue_network_params.clone()
    loss.reset_parameters_recursive()
    for key, new in loss.qvalue_network_params.items(True, True):
        assert not torch.equal(new, old[key])
        assert not torch.equal(new[0], new[1])
    weight = loss.qvalue_network_params["module", "layers", "1", "weight"]
    # 4096 draws: the largest is next to the bound.
    assert 0.99 < float(weight.detach().abs().max()) * math.sqrt(64) <= 1


def test_target_update_is_soft_update() -> None:
    torch.manual_seed(0)
    ours, theirs = make_loss(), make_loss()
    theirs.load_state_dict(ours.state_dict())
    updaters = TargetUpdate(ours, tau=0.1), SoftUpdate(theirs, tau=0.1)
    start = ours.target_qvalue_network_params.clone()
    for loss in (ours, theirs):
        with torch.no_grad():
            for parameter in loss.parameters():
                parameter.add_(1.0)
    for _ in range(2):
        for updater in updaters:
            updater.step()
    for key, target in ours.target_qvalue_network_params.items(True, True):
        torch.testing.assert_close(target, theirs.target_qvalue_network_params[key])
        # Twice a tenth of the way: 1 - 0.9^2.
        torch.testing.assert_close(target, start[key] + 0.19)
        assert not target.requires_grad


def test_limit_is_ten_times_any_discounted_return(trajectories: Any) -> None:
    gamma = 0.9
    rewards = trajectories[REWARD].squeeze(-1).double()
    ends = trajectories["next", "done"].squeeze(-1).nonzero().squeeze(-1).tolist()
    limit = return_limit(trajectories, gamma)
    start = 0
    for end in ends:
        for first in range(start, end + 1):
            discounts = gamma ** torch.arange(end + 1 - first, dtype=torch.float64)
            assert 10 * abs(float((discounts * rewards[first : end + 1]).sum())) < limit
        start = end + 1
    # The largest reward forever.
    forever = sum(float(rewards.abs().max()) * gamma**t for t in range(1000))
    assert limit == pytest.approx(10 * (1 + forever), rel=1e-5)


@pytest.mark.parametrize("reward", [math.nan, 1e6])
def test_masked_rewards_do_not_count(trajectories: TensorDict, reward: float) -> None:
    masked = trajectories.clone()
    masked[MASK] = torch.ones(len(masked), dtype=torch.bool)
    masked[MASK][2] = False
    masked[REWARD][2] = reward
    without = torch.cat([trajectories[:2], trajectories[3:]])
    assert return_limit(masked, 0.9) == return_limit(without, 0.9)


def test_network_keys() -> None:
    network = qvalue_networks(3, 2)[0]
    assert (network.in_keys, network.out_keys) == (
        ["observation", "action"],
        ["state_action_value"],
    )
    assert value_network(3)(make_inputs(4))["state_value"].shape == (4, 1)
