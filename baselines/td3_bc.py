"""TD3+BC (Fujimoto and Gu 2021, arXiv 2106.06860)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor, nn
from torchrl.objectives import TD3BCLoss, ValueEstimators
from torchrl.objectives.utils import _cache_values, distance_loss

from baselines.critics import (
    CopyableLoss,
    CriticSettings,
    TargetUpdate,
    critic_learner,
    qvalue_networks,
    read_transitions,
    values,
)
from baselines.learner import Learner
from baselines.normalization import Normalization, NormalizedPolicy, normalized
from baselines.rewards import Rewards, transformed
from iwsft.policies.linear import mlp
from iwsft.trajectory import ACTION, OBSERVATION
from iwsft.update import NOISE


@dataclass(frozen=True)
class Settings(CriticSettings):
    """Settings of a run; the defaults are the published ones for locomotion.

    Args:
        lr: Learning rate of Adam, for all networks.
        alpha: Weight of Q against behaviour cloning, divided by the batch's mean ``|Q|``.
        policy_noise: Standard deviation of the noise on the target policy's actions.
        noise_clip: Bound of that noise.
        policy_delay: Number of updates for each move of the actor and of all targets.
        hidden: Units of the hidden layers of all networks.
        rewards: Change of the rewards, see :func:`baselines.rewards.transformed`.
    """

    lr: float = 3e-4
    alpha: float = 2.5
    policy_noise: float = 0.2
    noise_clip: float = 0.5
    policy_delay: int = 2
    hidden: tuple[int, ...] = (256, 256)
    rewards: Rewards = "as they are"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.policy_delay < 1 or min(self.alpha, self.policy_noise, self.noise_clip) < 0:
            problem = "policy_delay must be at least 1, alpha and the noise not negative"
            raise ValueError(f"{self}: {problem}")


class DelayedTD3BCLoss(CopyableLoss, TD3BCLoss):
    """TorchRL's ``TD3BCLoss``; a call leaves out the actor's loss when it is not due.

    Arguments, keys, parameters, noise and values are TorchRL's; ``loss_function="l2"`` is the
    paper's. The targets' noise is the batch's entry ``noise``, the result of :meth:`draw_noise`, or
    else it is drawn from torch's own generator, whether the actor is due or not. All Q-networks,
    which must be of :mod:`baselines.critics`, run in one call; the actor's loss
    evaluates only the first. Nothing is written into the batch (no priorities).

    Both losses are taken at the same parameters; the authors' code updates the critics first.

    Attributes:
        phase: Whether the actor is due: the next call returns its loss. :class:`DelayedUpdate` sets
            it, and :func:`iwsft.training.fit` captures a CUDA graph for each value.
    """

    SUPPORTED_VALUE_ESTIMATORS = (ValueEstimators.TD0,)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.phase = True

    def draw_noise(
        self, batch: TensorDictBase, generator: torch.Generator | None
    ) -> TensorDictBase:
        """Draw standard normal noise for the actions of the target policy."""
        noise = torch.empty_like(batch.get(self.tensor_keys.action)).normal_(generator=generator)
        return TensorDict({"action": noise}, batch.batch_size)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the loss of the critics, and that of the actor (Eq. 3 and 5) if it is due."""
        loss, seen = self.qvalue_loss(tensordict)
        out = {"loss_qvalue": loss, **seen}
        if self.phase:
            loss, seen = self.actor_loss(tensordict)
            out |= {"loss_actor": loss, **seen}
        return TensorDict(out)

    def qvalue_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the squared error of each Q to r + gamma min Q' at the target's noisy action."""
        keys = self.tensor_keys
        action = tensordict.get(keys.action)
        noise = tensordict.get((NOISE, "action"), default=None)
        noise = torch.randn_like(action) if noise is None else noise
        noise = (noise * self.policy_noise).clamp(-self.noise_clip, self.noise_clip)
        with torch.no_grad():
            following = tensordict.get("next").select(*self.actor_network.in_keys)
            self._cached_target_actor(following)
            noisy = following.get(keys.action) + noise
            following.set(keys.action, noisy.clamp(self.min_action, self.max_action))
            next_value = self.next_value(tensordict, following)
            target = self.value_estimator.value_estimate(
                tensordict, next_value=next_value.unsqueeze(-1)
            ).squeeze(-1)
        predicted = values(self.qvalue_network, tensordict, self.qvalue_network_params)
        each = distance_loss(predicted, target.expand_as(predicted), self.loss_function).sum(0)
        return self._reduce_loss(each, tensordict=tensordict), {
            "pred_value": predicted.detach(),
            "next_state_value": next_value,
            "target_value": target,
        }

    def next_value(self, tensordict: TensorDictBase, following: TensorDictBase) -> Tensor:
        """Return min Q' at the next states and the target's actions, ``[B]``."""
        return values(self.qvalue_network, following, self.target_qvalue_network_params).amin(0)

    def actor_value(self, inputs: TensorDictBase) -> Tensor:
        """Return Q_1 at the states and the actor's actions, ``[B]``."""
        return values(self.qvalue_network, inputs, self._cached_first_qvalue_params)

    def cloning_loss(self, action: Tensor, data: Tensor) -> Tensor:
        """Return ``(pi(s) - a)^2``, mean over batch and features."""
        return nn.functional.mse_loss(action, data)

    def actor_loss(self, tensordict: TensorDictBase) -> tuple[Tensor, dict[str, Tensor]]:
        """Return ``-lambda Q_1(s, pi(s)) + (pi(s) - a)^2``, lambda = ``alpha / mean |Q_1|``."""
        keys = self.tensor_keys
        inputs = tensordict.select(*self.actor_network.in_keys)
        self._cached_actor(inputs)
        value = self.actor_value(inputs)
        cloning = self.cloning_loss(inputs.get(keys.action), tensordict.get(keys.action))
        weight = self.alpha / value.detach().abs().mean()
        loss = self._reduce_loss(-weight * value + cloning, tensordict=tensordict)
        return loss, {
            "state_action_value_actor": value.detach(),
            "bc_loss": cloning.detach(),
            "lmbd": weight,
        }

    # Networks that keep their parameters: swapping them in and out at each call takes a tenth of an
    # update. The cache is TorchRL's, which empties it when the loss moves to another device.
    @property
    @_cache_values
    def _cached_actor(self) -> nn.Module:
        return self.get_stateful_net("actor_network")

    @property
    @_cache_values
    def _cached_first_qvalue_params(self) -> TensorDictBase:
        return self.qvalue_network_params.detach()[0]

    @property
    @_cache_values
    def _cached_target_actor(self) -> nn.Module:
        network = self.get_stateful_net("actor_network")
        self.target_actor_network_params.to_module(
            network, return_swap=False, preserve_module_state=False
        )
        return network


class DelayedUpdate(TargetUpdate):
    """Targets follow at every ``every``-th update, the one in which the actor is due.

    With ``every=2`` it is the 2nd, 4th, ... update. The loss's ``phase`` is set before each.
    """

    def __init__(self, loss: DelayedTD3BCLoss, *, tau: float, every: int) -> None:
        super().__init__(loss, tau=tau)
        self.every = every
        self.counter = 0
        self._announce()

    def step(self) -> None:
        """Count an update, and let the targets follow if they are due."""
        self.counter += 1
        if self.counter % self.every == 0:
            super().step()
        self._announce()

    def load_state_dict(self, state_dict: Any) -> None:
        """Restore the number of updates so far."""
        super().load_state_dict(state_dict)
        self._announce()

    def _announce(self) -> None:
        self.loss_module.phase = (self.counter + 1) % self.every == 0


def published(dataset: str) -> tuple[Settings, str]:
    """Return the published settings for a dataset, and their source in words."""
    own = "TD3+BC paper (arXiv 2106.06860): the same for all locomotion datasets"
    family = dataset.split("-")[0]
    if family in ("halfcheetah", "hopper", "walker2d"):
        return Settings(), own
    if family == "antmaze":
        return (
            replace(Settings(), rewards="minus one"),
            "CORL's antmaze configuration: the TD3+BC paper's settings, rewards less one",
        )
    if family in ("pen", "door", "hammer", "relocate"):
        return Settings(), "CORL's Adroit configuration: the TD3+BC paper's settings"
    return Settings(), f"none published for {dataset}; locomotion's: {own}"


def policy(observation_dim: int, action_dim: int, settings: Settings) -> NormalizedPolicy:
    """Return the deterministic policy, tanh of a ReLU network, on normalised observations."""
    network = nn.Sequential(mlp(observation_dim, action_dim, settings.hidden), nn.Tanh())
    actor = TensorDictModule(network, in_keys=[OBSERVATION], out_keys=[ACTION])
    return NormalizedPolicy(Normalization(observation_dim), actor)


def build(trajectories: TensorDictBase, settings: Settings, *, seed: int) -> Learner:
    """Return the parts of a training, see :class:`baselines.learner.Baseline`."""
    torch.manual_seed(seed)
    trajectories, sizes, device = read_transitions(trajectories)
    acting = policy(*sizes, settings)
    acting.normalization = Normalization.of(trajectories)
    data = normalized(transformed(trajectories, settings.rewards), acting.normalization)
    critics = [critic.to(device) for critic in qvalue_networks(*sizes, settings.hidden)]
    loss = DelayedTD3BCLoss(acting.to(device).actor, critics, **loss_options(settings))
    updater = one_step_targets(loss, settings)
    rates = {"": settings.lr}
    return critic_learner(acting, loss, data, settings, seed=seed, rates=rates, updater=updater)


def loss_options(settings: Settings) -> dict[str, Any]:
    """Return the arguments of :class:`DelayedTD3BCLoss` after its networks."""
    numbers = {name: getattr(settings, name) for name in ("policy_noise", "noise_clip", "alpha")}
    return {"bounds": (-1.0, 1.0), "loss_function": "l2", **numbers}


def one_step_targets(loss: DelayedTD3BCLoss, settings: Settings) -> DelayedUpdate:
    """Give a loss its one-step targets; return the updater that moves them."""
    device = next(loss.parameters()).device
    loss.make_value_estimator(ValueEstimators.TD0, gamma=settings.gamma, device=device)
    return DelayedUpdate(loss, tau=settings.tau, every=settings.policy_delay)
