"""From the same weights and the same steps, d3rlpy's losses and gradients against ours.

d3rlpy normalises, scales and clips with its own code, on the data as they are.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

import baselines
from baselines.awac import AWACLoss
from baselines.td3_bc import DelayedTD3BCLoss
from benchmarks import peer
from iwsft import datasets
from iwsft.trajectory import ACTION, NEXT_OBSERVATION, OBSERVATION, REWARD, TERMINATED

try:
    d3rlpy = peer.import_d3rlpy()
except ImportError:
    d3rlpy = None
pytestmark = pytest.mark.skipif(d3rlpy is None, reason=f"d3rlpy is not installed: {peer.INSTALL}")
# Steps compared; episodes of the data end among them.
STEPS = 96


Of = Callable[[Tensor], Tensor]
Pairs = list[tuple[Tensor, Tensor]]


def itself(parameter: Tensor) -> Tensor:
    return parameter


def gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


class Pair:
    """A learner of ours and one of d3rlpy with its weights, and the first steps of the data."""

    def __init__(self, algo: str, file: Path, **changes: Any) -> None:
        trajectories = datasets.load(str(file)).trajectories
        module = baselines.algorithm(algo)
        settings, _ = module.published("hopper-medium-v2")
        self.settings = dataclasses.replace(settings, **changes)
        self.ours = module.build(trajectories, self.settings, seed=0)
        data = peer.d3rlpy_data(algo, trajectories)
        self.theirs = peer.create_learner(peer.d3rlpy_config(algo, self.settings), 11, 3, seed=1)
        d3rlpy.algos.utility.build_scalers_with_transition_picker(self.theirs, data)
        picked = [data.transition_picker(*data.buffer[i]) for i in range(STEPS)]
        self.their_batch = d3rlpy.TorchMiniBatch.from_batch(
            d3rlpy.dataset.TransitionMiniBatch.from_transitions(picked),
            gamma=self.settings.gamma,
            compute_returns_to_go=False,
            device="cpu:0",
            observation_scaler=self.theirs.observation_scaler,
            reward_scaler=self.theirs.reward_scaler,
        )
        self.batch: TensorDictBase = self.ours.sampler.trajectories[:STEPS].copy()
        self.impl = self.theirs.impl
        self._share_weights()

    def _share_weights(self) -> None:
        """Random weights in ours, large enough to matter, and the same in d3rlpy's and targets."""
        loss, modules = self.ours.loss, self.impl.modules
        networks = [("qvalue", modules.targ_q_funcs, modules.q_funcs)]
        if hasattr(modules, "targ_policy"):
            networks.append(("actor", modules.targ_policy, modules.policy))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in loss.parameters():
                if parameter.ndim:  # the temperature starts alike
                    parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            for mine, their in [*self.critics(), *self.actor(), *self.value()]:
                their.copy_(mine)
            for name, target, source in networks:
                params = getattr(loss, f"{name}_network_params")
                getattr(loss, f"target_{name}_network_params").copy_(params.data)
                target.load_state_dict(source.state_dict())

    def critics(self, of: Of = itself) -> Pairs:
        """(Ours, theirs): weights and biases of all Q-networks; ours is a row of stacked ones."""
        stacked = ordered(self.ours.loss.qvalue_network_params)
        return [
            (of(mine)[e], of(their))
            for e, network in enumerate(self.impl.modules.q_funcs)
            for mine, their in zip(stacked, linear(network), strict=True)
        ]

    def actor(self, of: Of = itself) -> Pairs:
        """(Ours, theirs): weights and biases of the actor's layers."""
        mine = [of(part) for part in linear(self.ours.policy)]
        their = [of(part) for part in linear(self.impl.modules.policy)]
        if len(mine) + 2 == len(their):
            # One head of both mean and log-std here, a layer for each there.
            weight, bias = mine[-2:]
            mine = [*mine[:-2], weight[:3], bias[:3], weight[3:], bias[3:]]
        return list(zip(mine, their, strict=True))

    def value(self, of: Of = itself) -> Pairs:
        """(Ours, theirs): weights and biases of V."""
        if not hasattr(self.impl.modules, "value_func"):
            return []
        mine = ordered(self.ours.loss.value_network_params)
        their = linear(self.impl.modules.value_func)
        return [(of(one), of(other)) for one, other in zip(mine, their, strict=True)]

    def call(self) -> TensorDict:
        """Our losses, with the gradients of their sum."""
        out = self.ours.loss(self.batch)
        torch.stack(
            [value for name, value in out.items() if name.startswith("loss")]
        ).sum().backward()
        return out


def ordered(params: Any) -> list[Tensor]:
    """Weight, bias, weight, bias, ... of a network of baselines.critics."""
    layers = params.get(("module", "layers"))
    return [
        layers.get((str(i), name)) for i in range(len(layers.keys())) for name in ("weight", "bias")
    ]


def linear(module: nn.Module) -> list[Tensor]:
    return [
        part
        for layer in module.modules()
        if isinstance(layer, nn.Linear)
        for part in (layer.weight, layer.bias)
    ]


def close(pairs: Pairs) -> None:
    """Equal gradients, to the rounding of sums in float32."""
    assert pairs
    for mine, their in pairs:
        assert mine.abs().max() > 0
        torch.testing.assert_close(mine, their, rtol=1e-4, atol=1e-5 * float(their.abs().max()))


@pytest.mark.parametrize("algo", ["iql", "td3-bc", "awac", "cql"])
def test_both_see_the_same_batch(algo: str, tiny_dataset: Path) -> None:
    """Normalised observations, scaled rewards, clipped actions, terminations."""
    changes = {"reward_scale": 3.0, "reward_shift": -2.0} if algo == "cql" else {}
    if algo in ("awac", "td3-bc"):
        changes["rewards"] = "minus one"
    pair = Pair(algo, tiny_dataset, **changes)
    ours, theirs = pair.batch, pair.their_batch
    ended = ours.get(TERMINATED)
    assert 0 < ended.sum() < STEPS
    for key, their in (
        (OBSERVATION, theirs.observations),
        (ACTION, theirs.actions),
        (REWARD, theirs.rewards),
        (TERMINATED, theirs.terminals),
    ):
        torch.testing.assert_close(ours.get(key).float(), their, rtol=1e-5, atol=1e-5)
    running = ~ended.squeeze(-1)
    torch.testing.assert_close(
        ours.get(NEXT_OBSERVATION)[running],
        theirs.next_observations[running],
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("rewards", ["return range", "minus one"])
def test_iql(rewards: str, tiny_dataset: Path) -> None:
    pair = Pair("iql", tiny_dataset, rewards=rewards)
    log_std = pair.ours.policy.get_parameter("module.0.module.log_std")
    their_log_std = pair.impl.modules.policy._logstd
    with torch.no_grad():
        log_std.copy_(torch.tensor([-1.0, 0.3, -2.0]))
        # d3rlpy's lies between -5 and 2 by a sigmoid.
        their_log_std.copy_(torch.logit((log_std + 5) / 7))
    out = pair.call()
    critic = pair.impl.compute_critic_grad(pair.their_batch)
    actor = pair.impl.compute_actor_grad(pair.their_batch)
    for mine, their in (
        ("loss_qvalue", critic.q_loss),
        ("loss_value", critic.v_loss),
        ("loss_actor", actor.actor_loss),
    ):
        torch.testing.assert_close(out[mine], their, rtol=1e-5, atol=1e-6)
    close(pair.critics(gradient))
    close(pair.value(gradient))
    close(pair.actor(gradient))
    share = torch.sigmoid(their_log_std)
    close([(log_std.grad * (7 * share * (1 - share))[0], their_log_std.grad[0])])


def test_td3_bc(tiny_dataset: Path) -> None:
    pair = Pair("td3-bc", tiny_dataset)
    pair.ours.loss.phase = True
    # Both draw the noise of the target's actions first, and nothing else.
    torch.manual_seed(5)
    out = pair.call()
    torch.manual_seed(5)
    critic = pair.impl.compute_critic_grad(pair.their_batch)
    torch.testing.assert_close(out["loss_qvalue"], critic.critic_loss, rtol=1e-5, atol=1e-6)
    close(pair.critics(gradient))
    actor = pair.impl.compute_actor_grad(pair.their_batch)
    torch.testing.assert_close(out["loss_actor"], actor.actor_loss, rtol=1e-5, atol=1e-6)
    close(pair.actor(gradient))


def test_fifty_updates_of_td3_bc(tiny_dataset: Path) -> None:
    """The same course, targets included, from the same weights, batches and noise.

    In d3rlpy's order: the actor's loss is taken at the critics that have just moved.
    """
    pair = Pair("td3-bc", tiny_dataset)
    loss, updater = pair.ours.loss, pair.ours.updater
    assert isinstance(loss, DelayedTD3BCLoss) and updater is not None
    optimizer = torch.optim.Adam(loss.parameters(), lr=pair.settings.lr)
    start = [mine.detach().clone() for mine, _ in pair.actor()]

    def move(value: Tensor) -> None:
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    for update in range(1, 51):
        torch.manual_seed(update)
        move(loss.qvalue_loss(pair.batch)[0])
        if loss.phase:
            move(loss.actor_loss(pair.batch)[0])
        updater.step()
        torch.manual_seed(update)
        # d3rlpy counts from 0 and moves its actor at even counts.
        pair.impl.update(pair.their_batch, grad_step=update)
    for mine, their in [*pair.critics(), *pair.actor()]:
        torch.testing.assert_close(mine, their, rtol=0, atol=1e-5)
    targets = ordered(loss.target_qvalue_network_params)
    for e, network in enumerate(pair.impl.modules.targ_q_funcs):
        for mine, their in zip(targets, linear(network), strict=True):
            torch.testing.assert_close(mine[e], their, rtol=0, atol=1e-5)
    moved = max(
        float((now.detach() - old).abs().max())
        for (now, _), old in zip(pair.actor(), start, strict=True)
    )
    assert moved > 2e-3


def test_awac(tiny_dataset: Path) -> None:
    """Without spread in the policy there are no draws to differ in, and no clip here.

    d3rlpy's weights are a softmax over the batch: ours except for a factor.
    """
    pair = Pair("awac", tiny_dataset, max_weight=math.inf)
    loss = pair.ours.loss
    assert isinstance(loss, AWACLoss)
    log_std = pair.ours.policy.get_parameter("actor.module.0.module.log_std")
    with torch.no_grad():
        log_std.fill_(-5.0)
        # Between -6 and 0 by a sigmoid.
        pair.impl.modules.policy._logstd.copy_(torch.logit((log_std + 6) / 6))
    out = pair.call()
    critic = pair.impl.compute_critic_grad(pair.their_batch)
    torch.testing.assert_close(out["loss_qvalue"], critic.critic_loss, rtol=0.01, atol=0)
    pair.impl.compute_actor_grad(pair.their_batch)
    pairs = pair.actor(gradient)
    mine, their = (torch.cat([each[side].flatten() for each in pairs]) for side in (0, 1))
    assert torch.cosine_similarity(mine, their, dim=0) > 0.999
    # d3rlpy sums over the batch what ours averages.
    assert float(their.norm() / mine.norm()) == pytest.approx(
        STEPS / float(out["weight_mean"]), rel=0.02
    )


def test_cql_penalty(tiny_dataset: Path) -> None:
    """Over many draws, of which both take their own: they spread by 0.3 % from seed to seed."""
    pair = Pair("cql", tiny_dataset, actions=400)
    with torch.no_grad():
        # Our log-std has this offset.
        pair.impl.modules.policy._logstd.bias.add_(-1.0)
    torch.manual_seed(6)
    out = pair.call()
    torch.manual_seed(7)
    batch = pair.their_batch
    penalty = pair.impl._compute_conservative_loss(
        batch.observations, batch.actions, batch.next_observations, batch.returns_to_go
    ).sum()
    torch.testing.assert_close(out["loss_cql"], penalty, rtol=0.01, atol=0)


def test_cql_actor_and_temperature(tiny_dataset: Path) -> None:
    # d3rlpy moves the temperature before it takes the actor's loss: here, by next to nothing.
    pair = Pair("cql", tiny_dataset, actor_lr=1e-9)
    with torch.no_grad():
        pair.impl.modules.policy._logstd.bias.add_(-1.0)
    # Both draw the actor's actions first.
    torch.manual_seed(5)
    out = pair.call()
    torch.manual_seed(5)
    actor = pair.impl.compute_actor_grad(pair.their_batch)
    torch.testing.assert_close(out["loss_actor"], actor.actor_loss, rtol=1e-5, atol=1e-6)
    close(pair.actor(gradient))
    # The actor's loss has left a gradient there too, which d3rlpy drops before it is used.
    torch.manual_seed(5)
    drawn = d3rlpy.models.torch.build_squashed_gaussian_distribution(
        pair.impl.modules.policy(pair.their_batch.observations)
    )
    pair.impl.update_temp(drawn.sample_with_log_prob()[1])
    (temperature,) = pair.impl.modules.log_temp.parameters()
    close([(pair.ours.loss.log_alpha.grad.reshape(1, 1), temperature.grad)])


def test_cql_bootstrap(tiny_dataset: Path) -> None:
    """Without spread in the policy, a draw is the mode from which d3rlpy bootstraps."""
    pair = Pair("cql", tiny_dataset)
    with torch.no_grad():
        weight, bias = linear(pair.ours.policy)[-2:]
        their = pair.impl.modules.policy._logstd
        for part, level in ((weight[3:], 0.0), (bias[3:], -19.0)):
            part.fill_(level)
        their.weight.fill_(0.0)
        their.bias.fill_(-20.0)
    out = pair.call()
    critic = pair.impl.compute_critic_grad(pair.their_batch)
    bootstrapped = critic.critic_loss - critic.conservative_loss
    torch.testing.assert_close(out["loss_qvalue"], bootstrapped, rtol=1e-3, atol=1e-3)
