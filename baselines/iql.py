"""Implicit Q-learning (Kostrikov, Nair and Levine 2021, arXiv 2110.06169)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import dispatch
from torch import nn
from torchrl.modules import MLP
from torchrl.objectives import IQLLoss, ValueEstimators
from torchrl.objectives.utils import distance_loss

from baselines.critics import (
    CopyableLoss,
    CriticSettings,
    critic_learner,
    qvalue_networks,
    read_transitions,
    value_network,
    values,
)
from baselines.learner import Learner
from baselines.rewards import Rewards, clipped_actions, transformed
from iwsft.policies import GaussianPolicy
from iwsft.policy_loss import holding

# Upper limit of the weight in the actor's loss, in TorchRL and in the authors' code.
MAX_WEIGHT = 100.0


@dataclass(frozen=True)
class Settings(CriticSettings):
    """Settings of a run; the defaults are the published ones for locomotion.

    Args:
        lr: Learning rate of Adam, for all networks; the actor's falls to 0 along a cosine.
        expectile: Expectile of Q over the data's actions that V estimates; 0.5 is the mean.
        temperature: beta, the factor of advantages (an inverse temperature).
        hidden: Units of the hidden layers of all networks.
        dropout: Share of the policy's hidden units that an update leaves out.
        rewards: Change of the rewards, see :func:`baselines.rewards.transformed`.
    """

    lr: float = 3e-4
    expectile: float = 0.7
    temperature: float = 3.0
    hidden: tuple[int, ...] = (256, 256)
    dropout: float = 0.0
    rewards: Rewards = "return range"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.expectile < 1 or not 0 <= self.dropout < 1 or not self.temperature >= 0:
            raise ValueError(
                f"{self}: expectile must be in (0, 1), dropout in [0, 1), temperature not negative"
            )


class SharedIQLLoss(CopyableLoss, IQLLoss):
    """TorchRL's ``IQLLoss`` in less time: its three losses share their networks' outputs.

    Arguments, keys, parameters and values are TorchRL's; ``loss_function="l2"`` is the paper's.
    min Q of the targets and V(s), which two losses need, are computed once, and all Q-networks run
    in one call. So both critics must be networks of :mod:`baselines.critics`. The output also has
    ``pred_value``, the mean Q(s, a). Nothing is written into the batch (no priorities).

    All losses are taken at the same parameters; the authors' code moves V first.
    """

    out_keys = [*IQLLoss.out_keys, "pred_value"]
    SUPPORTED_VALUE_ESTIMATORS = (ValueEstimators.TD0,)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return the losses of actor (Eq. 7), Q (Eq. 6) and V (Eq. 5), the entropy and mean Q."""
        value = values(self.value_network, tensordict, self.value_network_params)
        qvalues = values(self.qvalue_network, tensordict, self.qvalue_network_params)
        with torch.no_grad():
            targets = values(self.qvalue_network, tensordict, self.target_qvalue_network_params)
            following = values(
                self.value_network, tensordict.get("next"), self.value_network_params
            )
            terminated = tensordict.get(("next", self.tensor_keys.terminated)).squeeze(-1)
            reward = tensordict.get(("next", self.tensor_keys.reward)).squeeze(-1)
            bootstrap = torch.where(terminated, 0.0, following)
            target = reward + self.value_estimator.gamma * bootstrap
        with holding(self.actor_network_params, self.actor_network):
            dist = self.actor_network.get_dist(tensordict.select(*self.actor_network.in_keys))
        log_prob = dist.log_prob(tensordict.get(self.tensor_keys.action))

        advantage = targets.amin(0) - value
        weight = (advantage.detach() * self.temperature).exp().clamp_max(MAX_WEIGHT)
        distance = distance_loss(qvalues, target.expand_as(qvalues), self.loss_function)
        out = {
            "loss_actor": self._reduce_loss(-weight * log_prob, tensordict),
            "loss_qvalue": self._reduce_loss(distance.sum(0), tensordict),
            "loss_value": self._reduce_loss(
                self.loss_value_diff(advantage, self.expectile), tensordict
            ),
        }
        scalars = {"entropy": -log_prob.detach().mean(), "pred_value": qvalues.detach().mean()}
        if self.reduction == "none":
            result = TensorDict(out, tensordict.batch_size)
            if self.scalar_output_mode == "non_tensor":
                for name, value in scalars.items():
                    result.set_non_tensor(name, value)
            return result
        return TensorDict(out | scalars)


def published(dataset: str) -> tuple[Settings, str]:
    """Return the published settings for a dataset, and their source in words."""
    own = "IQL paper (arXiv 2110.06169) and its authors' code"
    family = dataset.split("-")[0]
    if family in ("halfcheetah", "hopper", "walker2d"):
        return Settings(), f"{own}: locomotion"
    if family == "antmaze":
        settings = replace(Settings(), expectile=0.9, temperature=10.0, rewards="minus one")
        return settings, f"{own}: antmaze"
    if family in ("kitchen", "pen", "door", "hammer", "relocate"):
        settings = replace(Settings(), temperature=0.5, dropout=0.1, rewards="as they are")
        return settings, f"{own}: kitchen and Adroit"
    settings = replace(Settings(), rewards="as they are")
    return settings, f"none published for {dataset}; {own}: locomotion, rewards as they are"


def policy(observation_dim: int, action_dim: int, settings: Settings) -> GaussianPolicy:
    """Return the Gaussian policy: tanh mean, and a free log-std in [-5, 2].

    Its layers start as torch's do; the authors' start orthogonal.
    """
    gaussian = GaussianPolicy(observation_dim, action_dim, hidden=settings.hidden)
    if settings.dropout:
        (net,) = [part for part in gaussian.modules() if isinstance(part, MLP)]
        hidden = [i for i, part in enumerate(net) if isinstance(part, nn.ReLU)]
        for i in reversed(hidden):
            net.insert(i + 1, nn.Dropout(settings.dropout))
    return gaussian


def build(trajectories: TensorDictBase, settings: Settings, *, seed: int) -> Learner:
    """Return the parts of a training, see :class:`baselines.learner.Baseline`."""
    torch.manual_seed(seed)
    trajectories, sizes, device = read_transitions(trajectories)
    data = clipped_actions(transformed(trajectories, settings.rewards))
    actor = policy(*sizes, settings).to(device)
    loss = SharedIQLLoss(
        actor,
        [network.to(device) for network in qvalue_networks(*sizes, settings.hidden)],
        value_network(sizes[0], settings.hidden).to(device),
        loss_function="l2",
        temperature=settings.temperature,
        expectile=settings.expectile,
    )
    loss.make_value_estimator(ValueEstimators.TD0, gamma=settings.gamma, device=device)
    names = ("actor_network", "qvalue_network", "value_network")
    return critic_learner(
        actor,
        loss,
        data,
        settings,
        seed=seed,
        rates=dict.fromkeys(names, settings.lr),
        cosine=("actor_network",),
    )
