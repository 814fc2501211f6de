"""Advantage-weighted actor-critic (Nair et al. 2020, arXiv 2006.09359)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, dispatch
from torch import Tensor
from torch.distributions import Distribution
from torchrl.modules import IndependentNormal
from torchrl.objectives.common import LossModule

from baselines.critics import (
    CriticSettings,
    critic_learner,
    qvalue_networks,
    read_transitions,
    values,
)
from baselines.learner import Learner
from baselines.normalization import Normalization, NormalizedPolicy, normalized
from baselines.rewards import Rewards, transformed
from iwsft.policies import GaussianPolicy
from iwsft.policy_loss import holding
from iwsft.update import NOISE


@dataclass(frozen=True)
class Settings(CriticSettings):
    """Settings of a run; the defaults are CORL's for locomotion.

    Args:
        lr: Learning rate of Adam, for all networks.
        temperature: lambda, the divisor of advantages.
        max_weight: Upper limit of the weight exp(advantage / lambda), which may be infinite.
        hidden: Units of the hidden layers of all networks.
        rewards: Change of the rewards, see :func:`baselines.rewards.transformed`.
    """

    unlimited = "max_weight"

    lr: float = 3e-4
    temperature: float = 1 / 3
    max_weight: float = 100.0
    hidden: tuple[int, ...] = (256, 256, 256)
    rewards: Rewards = "as they are"


class AWACLoss(LossModule):
    """AWAC: clipped double Q of the policy's own actions, and weighted likelihood of the data's.

    ``loss_qvalue = mean sum_e (Q_e(s, a) - r - gamma min_e Q'_e(s', a'))^2``, a' ~ pi(s'), Q' the
    targets, without the bootstrap where the episode terminated.
    ``loss_actor = - mean w log pi(a|s)``, ``w = min(exp(A / temperature), max_weight)``,
    ``A = min_e Q_e(s, a) - min_e Q_e(s, a'')``, a'' ~ pi(s): one draw for V(s) (the paper,
    Section 4). Weights and targets carry no gradient. Both losses are taken at the same parameters.

    Args:
        actor_network: A TorchRL ``ProbabilisticActor``.
        qvalue_network: E independently initialised networks of :mod:`baselines.critics`.
        gamma: Discount factor.
        temperature: lambda, the divisor of advantages.
        max_weight: Upper limit of the weight; infinity is the paper's equation.
        action_range: Range that the policy's actions are clamped to, as an environment does.
        reduction: ``"mean"``, ``"sum"``, or ``"none"``: both losses per transition, nothing else.

    Input keys: those of the networks (at ``next`` too), the action, ``("next", "reward")`` and
    ``("next", "terminated")``.

    Output: ``loss_actor``, ``loss_qvalue``, then detached scalars: ``entropy`` (mean of
    -log pi(a|s) over the data's actions), ``weight_mean``, ``pred_value`` (mean Q(s, a)).
    Actions come from the batch's entry ``noise``, the result of :meth:`draw_noise`, or else from
    torch's own generator, first a', then a''.
    """

    @dataclass
    class _AcceptedKeys:
        """Keys that ``set_keys`` can change; reward and termination are under ``next``."""

        action: NestedKey = "action"
        reward: NestedKey = "reward"
        terminated: NestedKey = "terminated"

    tensor_keys: _AcceptedKeys
    default_keys = _AcceptedKeys
    out_keys = ["loss_actor", "loss_qvalue", "entropy", "weight_mean", "pred_value"]

    actor_network: ProbabilisticTensorDictSequential
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    qvalue_network: TensorDictModule
    qvalue_network_params: TensorDictParams
    target_qvalue_network_params: TensorDictParams

    def __init__(
        self,
        actor_network: ProbabilisticTensorDictSequential,
        qvalue_network: Sequence[TensorDictModule],
        *,
        gamma: float = 0.99,
        temperature: float = 1.0,
        max_weight: float = 100.0,
        action_range: tuple[float, float] = (-1.0, 1.0),
        reduction: Literal["none", "mean", "sum"] | None = None,
    ) -> None:
        reduction = "mean" if reduction is None else reduction
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(f"reduction must be 'none', 'mean' or 'sum', not {reduction!r}")
        if not temperature > 0 or not max_weight > 0:
            raise ValueError(
                f"temperature={temperature} and max_weight={max_weight} must be positive"
            )
        super().__init__()
        self.gamma = gamma
        self.temperature = temperature
        self.max_weight = max_weight
        self.action_range = action_range
        self.reduction = reduction
        self.convert_to_functional(actor_network, "actor_network")
        self.convert_to_functional(
            list(qvalue_network), "qvalue_network", len(qvalue_network), create_target_params=True
        )
        self.set_keys()

    def _forward_value_estimator_keys(self, **kwargs: NestedKey) -> None:
        """Set the keys that a call needs, in the order of a call without TensorDict."""
        action = self.tensor_keys.action
        read = [*self.actor_network.in_keys, *self.qvalue_network.in_keys]
        states = [key for key in dict.fromkeys(read) if key != action]
        after = [*states, self.tensor_keys.reward, self.tensor_keys.terminated]
        self.in_keys = [*states, action, *map(_next, after)]

    def draw_noise(
        self, batch: TensorDictBase, generator: torch.Generator | None
    ) -> TensorDict | None:
        """Draw standard normal noise for a' and a''; None unless the policy is a plain Normal."""
        if self.actor_network[-1].distribution_class is not IndependentNormal:
            return None
        action = batch.get(self.tensor_keys.action)
        drawn = {
            name: torch.empty_like(action).normal_(generator=generator)
            for name in ("following", "here")
        }
        return TensorDict(drawn, batch.batch_size)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return both losses and the diagnostics of a batch, see the class."""
        keys = self.tensor_keys
        following, noise = tensordict.get("next"), tensordict.get(NOISE, default={})
        with holding(self.actor_network_params, self.actor_network):
            with torch.no_grad():
                next_action = self._draw(self._dist(following), noise.get("following"))
            dist = self._dist(tensordict)
        log_prob = dist.log_prob(tensordict.get(keys.action))
        qvalues = values(self.qvalue_network, tensordict, self.qvalue_network_params)

        with torch.no_grad():
            bootstrap = self._least(following, next_action, self.target_qvalue_network_params)
            terminated = tensordict.get(_next(keys.terminated)).squeeze(-1)
            reward = tensordict.get(_next(keys.reward)).squeeze(-1)
            target = reward + self.gamma * torch.where(terminated, 0.0, bootstrap)
            value = self._least(
                tensordict, self._draw(dist, noise.get("here")), self.qvalue_network_params
            )
            advantage = qvalues.amin(0) - value
            weight = (advantage / self.temperature).exp().clamp_max(self.max_weight)

        out = {
            "loss_actor": self._reduce_loss(-weight * log_prob, tensordict),
            "loss_qvalue": self._reduce_loss((qvalues - target).square().sum(0), tensordict),
        }
        if self.reduction == "none":
            result = TensorDict(out, tensordict.batch_size)
        else:
            out["entropy"] = -log_prob.detach().mean()
            out["weight_mean"] = weight.mean()
            out["pred_value"] = qvalues.detach().mean()
            result = TensorDict(out)
        self._clear_weakrefs(
            tensordict,
            result,
            "actor_network_params",
            "qvalue_network_params",
            "target_qvalue_network_params",
        )
        return result

    def _dist(self, batch: TensorDictBase) -> Distribution:
        return self.actor_network.get_dist(batch.select(*self.actor_network.in_keys))

    def _draw(self, dist: Distribution, noise: Tensor | None) -> Tensor:
        if noise is None:
            return dist.sample().clamp(*self.action_range)
        return (dist.mean + noise * dist.stddev).clamp(*self.action_range)

    def _least(self, batch: TensorDictBase, action: Tensor, params: TensorDictParams) -> Tensor:
        """Return the least Q of the ensemble at given actions ``[B]``."""
        read = [key for key in self.qvalue_network.in_keys if key != self.tensor_keys.action]
        inputs = batch.select(*read).set(self.tensor_keys.action, action)
        return values(self.qvalue_network, inputs, params).amin(0)


def _next(key: NestedKey) -> NestedKey:
    return ("next", key) if isinstance(key, str) else ("next", *key)


def published(dataset: str) -> tuple[Settings, str]:
    """Return the settings of CORL's runs of AWAC for a dataset, and their source in words.

    CORL published both settings and scores on D4RL. Its weights are clipped at 100; the paper's are
    not clipped.
    """
    own = "CORL's configuration of AWAC (arXiv 2006.09359)"
    family = dataset.split("-")[0]
    if family in ("halfcheetah", "hopper", "walker2d"):
        return Settings(), f"{own}: locomotion"
    if family == "antmaze":
        return replace(Settings(), temperature=0.1, rewards="minus one"), f"{own}: antmaze"
    if family in ("pen", "door", "hammer", "relocate"):
        return replace(Settings(), temperature=0.1), f"{own}: Adroit"
    return Settings(), f"none published for {dataset}; {own}: locomotion"


def policy(observation_dim: int, action_dim: int, settings: Settings) -> NormalizedPolicy:
    """Return the Gaussian policy on normalised observations.

    Its mean is the tanh of the last layer, and its log-std is at least -5. CORL's mean is the last
    layer itself, and its log-std is at least -20.
    """
    actor = GaussianPolicy(observation_dim, action_dim, hidden=settings.hidden)
    return NormalizedPolicy(Normalization(observation_dim), actor)


def build(trajectories: TensorDictBase, settings: Settings, *, seed: int) -> Learner:
    """Return the parts of a training, see :class:`baselines.learner.Baseline`."""
    torch.manual_seed(seed)
    trajectories, sizes, device = read_transitions(trajectories)
    acting = policy(*sizes, settings)
    acting.normalization = Normalization.of(trajectories)
    data = normalized(transformed(trajectories, settings.rewards), acting.normalization)
    loss = AWACLoss(
        acting.to(device).actor,
        [network.to(device) for network in qvalue_networks(*sizes, settings.hidden)],
        gamma=settings.gamma,
        temperature=settings.temperature,
        max_weight=settings.max_weight,
    )
    return critic_learner(acting, loss, data, settings, seed=seed, rates={"": settings.lr})
