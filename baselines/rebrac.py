"""ReBRAC (Tarasov, Kurenkov, Nikulin and Kolesnikov 2023, arXiv 2305.09836)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from baselines import td3_bc
from baselines.critics import critic_learner, qvalue_networks, read_transitions, values
from baselines.learner import Learner
from baselines.normalization import NormalizedPolicy
from baselines.rewards import Rewards, transformed
from baselines.td3_bc import DelayedTD3BCLoss
from iwsft.samplers import TRANSITION
from iwsft.trajectory import ACTION, MASK, TERMINATED, Segments

NEXT_ACTION = ("next", ACTION)
# Dataset without its version -> published weights of the actor's and of the critics' penalty.
_PENALTIES = {
    "halfcheetah-random": (0.001, 0.1),
    "halfcheetah-medium": (0.001, 0.01),
    "halfcheetah-expert": (0.01, 0.01),
    "halfcheetah-medium-expert": (0.01, 0.1),
    "halfcheetah-medium-replay": (0.01, 0.001),
    "halfcheetah-full-replay": (0.001, 0.1),
    "hopper-random": (0.001, 0.01),
    "hopper-medium": (0.01, 0.01),
    "hopper-expert": (0.1, 0.1),
    "hopper-medium-expert": (0.1, 0.01),
    "hopper-medium-replay": (0.05, 0.5),
    "hopper-full-replay": (0.01, 0.01),
    "walker2d-random": (0.01, 0.0),
    "walker2d-medium": (0.05, 0.1),
    "walker2d-expert": (0.01, 0.5),
    "walker2d-medium-expert": (0.01, 0.01),
    "walker2d-medium-replay": (0.05, 0.01),
    "walker2d-full-replay": (0.01, 0.01),
    "antmaze-umaze": (0.003, 0.002),
    "antmaze-umaze-diverse": (0.003, 0.001),
    "antmaze-medium-play": (0.001, 0.0005),
    "antmaze-medium-diverse": (0.001, 0.0),
    "antmaze-large-play": (0.002, 0.001),
    "antmaze-large-diverse": (0.002, 0.002),
    "pen-human": (0.1, 0.5),
    "pen-cloned": (0.05, 0.5),
    "pen-expert": (0.01, 0.01),
    "door-human": (0.1, 0.1),
    "door-cloned": (0.01, 0.1),
    "door-expert": (0.05, 0.01),
    "hammer-human": (0.01, 0.5),
    "hammer-cloned": (0.1, 0.5),
    "hammer-expert": (0.01, 0.01),
    "relocate-human": (0.1, 0.01),
    "relocate-cloned": (0.1, 0.01),
    "relocate-expert": (0.05, 0.01),
}


@dataclass(frozen=True)
class Settings(td3_bc.Settings):
    """Settings of a run, those of TD3+BC and three more; the defaults are locomotion's.

    Args:
        actor_lr: Learning rate of Adam for the actor; ``lr`` is that of the critics.
        actor_penalty: beta_1, weight of the squared distance of the actor's action to the data's.
        critic_penalty: beta_2, weight of the squared distance of the target policy's next action
            to the data's, which is subtracted from the next state's value.
    """

    batch_size: int = 1024
    lr: float = 1e-3
    alpha: float = 1.0
    hidden: tuple[int, ...] = (256, 256, 256)
    rewards: Rewards = "as they are"
    actor_lr: float = 1e-3
    actor_penalty: float = 0.01
    critic_penalty: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.actor_penalty, self.critic_penalty) < 0:
            raise ValueError(f"{self}: actor_penalty and critic_penalty can't be negative")


class ReBRACLoss(DelayedTD3BCLoss):
    """TD3+BC's loss with a penalty in the critics' target, and min Q in the actor's loss.

    Batches have the data's next action under ``("next", "action")``.

    The penalties are those of :class:`Settings`, the other arguments those of ``TD3BCLoss``.
    """

    def __init__(
        self, *networks: Any, actor_penalty: float, critic_penalty: float, **options: Any
    ) -> None:
        super().__init__(*networks, **options)
        self.actor_penalty = actor_penalty
        self.critic_penalty = critic_penalty

    def next_value(self, tensordict: TensorDictBase, following: TensorDictBase) -> Tensor:
        """Return ``min Q'(s', a') - beta_2 |a' - a_data'|^2`` at the target's actions, ``[B]``."""
        distance = following.get(self.tensor_keys.action) - tensordict.get(NEXT_ACTION)
        penalty = self.critic_penalty * distance.square().sum(-1)
        return super().next_value(tensordict, following) - penalty

    def actor_value(self, inputs: TensorDictBase) -> Tensor:
        """Return min Q at the states and the actor's actions, ``[B]``."""
        return values(self.qvalue_network, inputs, self._cached_detach_qvalue_network_params).amin(
            0
        )

    def cloning_loss(self, action: Tensor, data: Tensor) -> Tensor:
        """Return ``beta_1 |pi(s) - a|^2``, mean over the batch."""
        return self.actor_penalty * (action - data).square().sum(-1).mean()


def published(dataset: str) -> tuple[Settings, str]:
    """Return the published settings for a dataset, and their source in words."""
    own = "CORL's configuration of ReBRAC (arXiv 2305.09836), by its authors"
    family, name = dataset.split("-")[0], dataset.rpartition("-v")[0]
    if name not in _PENALTIES:
        return Settings(), f"none published for {dataset}; {own}: the usual ones of locomotion"
    settings = Settings(actor_penalty=_PENALTIES[name][0], critic_penalty=_PENALTIES[name][1])
    if family == "antmaze":
        changes: dict[str, Any] = {"lr": 5e-5, "actor_lr": 3e-4, "gamma": 0.999}
        settings = replace(settings, batch_size=256, rewards="times 100", **changes)
    elif family not in ("halfcheetah", "hopper", "walker2d"):
        settings = replace(settings, batch_size=256, lr=3e-4, actor_lr=3e-4)
    return settings, own


def policy(observation_dim: int, action_dim: int, settings: Settings) -> NormalizedPolicy:
    """Return the deterministic policy, tanh of a ReLU network; observations stay as they are."""
    acting = td3_bc.policy(observation_dim, action_dim, settings)
    _start(acting, last=1e-3)
    return acting


def build(trajectories: TensorDictBase, settings: Settings, *, seed: int) -> Learner:
    """Return the parts of a training, see :class:`baselines.learner.Baseline`."""
    torch.manual_seed(seed)
    trajectories, sizes, device = read_transitions(trajectories)
    data = with_next_actions(transformed(trajectories, settings.rewards))
    acting = policy(*sizes, settings).to(device)
    critics = qvalue_networks(*sizes, settings.hidden, layer_norm=True)
    for critic in critics:
        _start(critic.to(device), last=3e-3)
    loss = ReBRACLoss(
        acting.actor,
        critics,
        actor_penalty=settings.actor_penalty,
        critic_penalty=settings.critic_penalty,
        **td3_bc.loss_options(settings),
    )
    return critic_learner(
        acting,
        loss,
        data,
        settings,
        seed=seed,
        rates={"actor_network": settings.actor_lr, "qvalue_network": settings.lr},
        updater=td3_bc.one_step_targets(loss, settings),
        keys=(*TRANSITION, NEXT_ACTION),
    )


def with_next_actions(trajectories: TensorDictBase) -> TensorDictBase:
    """Return a shallow copy with the action of the next step, under ``("next", "action")``.

    The last step of a trajectory has none. Where it terminates, no value follows either, and the
    entry is 0. Where it is cut off, the copy's mask leaves it out, as in the authors' code.
    """
    if TERMINATED not in trajectories.keys(True):
        raise KeyError(f"{TERMINATED!r} is missing in the trajectories")
    segments, action = Segments.of(trajectories), trajectories.get(ACTION)
    has_next = torch.zeros_like(segments.valid)
    has_next[:-1] = (segments.index[1:] == segments.index[:-1]) & segments.valid[1:]
    usable = segments.valid & (has_next | trajectories.get(TERMINATED).squeeze(-1))
    if not bool(usable.any()):
        raise ValueError("no step has a next action, and none terminates: use longer trajectories")
    out = trajectories.copy()
    out.set(NEXT_ACTION, torch.where(has_next.unsqueeze(-1), action.roll(-1, 0), 0))
    out.set(MASK, usable)
    return out


def _start(network: nn.Module, *, last: float) -> None:
    """Set hidden biases to 0.1, and the last layer uniformly within ``last``, as the authors do."""
    *hidden, final = [layer for layer in network.modules() if isinstance(layer, nn.Linear)]
    for layer in hidden:
        nn.init.constant_(layer.bias, 0.1)
    for parameter in (final.weight, final.bias):
        nn.init.uniform_(parameter, -last, last)
