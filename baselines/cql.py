"""Conservative Q-learning (Kumar, Zhou, Tucker and Levine 2020, arXiv 2006.04779)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import ProbabilisticTensorDictSequential, TensorDictModule, dispatch
from torch import Tensor, nn
from torchrl.objectives import CQLLoss, ValueEstimators
from torchrl.objectives.utils import distance_loss

from baselines.critics import (
    CopyableLoss,
    CriticSettings,
    critic_learner,
    qvalue_networks,
    read_transitions,
    values,
)
from baselines.learner import Learner
from baselines.normalization import Normalization, NormalizedPolicy, normalized
from iwsft.policies import GaussianPolicy
from iwsft.policy_loss import holding
from iwsft.trajectory import REWARD
from iwsft.update import NOISE

# Upper limit of the penalty's multiplier, as in the authors' code.
_MAX_MULTIPLIER = 1e6
# Rows that the critics take at a time on a CPU: their activations stay in its cache, which saves
# 8 % of an update.
_CACHED_ROWS = 1024


@dataclass(frozen=True)
class Settings(CriticSettings):
    """Settings of a run; the defaults are the published ones for locomotion.

    Args:
        actor_lr: Learning rate of Adam for the actor and for the entropy's temperature.
        critic_lr: Learning rate of Adam for the critics and for the penalty's multiplier.
        min_q_weight: alpha, the weight of the conservative penalty.
        actions: Number of actions per state from each of three distributions: uniform, the policy
            at the state, the policy at the next state.
        lagrange_threshold: Threshold of a learned multiplier of the penalty, which grows while the
            penalty is above it (the paper's tau); None for no multiplier.
        least_gap: Lower limit of a state's penalty, before the weight; None for no limit.
        max_q_backup: Whether the bootstrap is the best of ``actions`` draws, not one draw.
        actor_hidden: Units of the hidden layers of the actor.
        critic_hidden: Units of the hidden layers of the critics.
        normalize: Whether states are scaled to mean 0 and standard deviation 1.
        reward_scale: Factor of the rewards.
        reward_shift: Number added to the rewards after that.
    """

    actor_lr: float = 3e-5
    critic_lr: float = 3e-4
    min_q_weight: float = 10.0
    actions: int = 10
    lagrange_threshold: float | None = None
    least_gap: float | None = None
    max_q_backup: bool = False
    actor_hidden: tuple[int, ...] = (256, 256, 256)
    critic_hidden: tuple[int, ...] = (256, 256, 256)
    normalize: bool = True
    reward_scale: float = 1.0
    reward_shift: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.actions < 1 or not self.min_q_weight >= 0 or not self.reward_scale > 0:
            problem = "actions must be at least 1, min_q_weight not negative, reward_scale positive"
            raise ValueError(f"{self}: {problem}")


class ConservativeLoss(CopyableLoss, CQLLoss):
    """TorchRL's ``CQLLoss`` with the penalty and the sum of losses of the paper.

    Arguments, keys and parameters are TorchRL's. Where 0.14.1 departs from the paper and its
    code, this loss follows them:

    - the log-sum-exp is over all ``3 num_random`` actions of a state (TorchRL: over triples, then
      a mean), each divided by the density that it was drawn from;
    - actions drawn at the next state are valued at the state itself (TorchRL: at the next state);
    - the multiplier scales the penalty (TorchRL never applies it), and its own loss gives the
      critics no gradient (TorchRL's gives them the penalty's with the sign turned);
    - the actor's cloning loss is left out of the sum: the published runs clone for 0 updates.

    The critics run once on the data's and the drawn actions together, the actor once at the
    states and once at the next ones; nothing is written into the batch (no priorities). The
    critics are those of :mod:`baselines.critics`, actions are in [-1, 1].

    Actions come from the batch's entry ``noise``, the result of :meth:`draw_noise`, or else from
    torch's own generator.

    The actor is a :class:`~iwsft.GaussianPolicy` with ``squash``; ``lagrange_threshold`` and
    ``least_gap`` are those of :class:`Settings`, and take the place of ``with_lagrange``.
    """

    SUPPORTED_VALUE_ESTIMATORS = (ValueEstimators.TD0,)

    def __init__(
        self,
        actor: ProbabilisticTensorDictSequential,
        critics: list[TensorDictModule],
        *,
        lagrange_threshold: float | None = None,
        least_gap: float | None = None,
        **options: object,
    ) -> None:
        super().__init__(actor, critics, **options)
        self.lagrange_threshold = lagrange_threshold
        self.least_gap = least_gap
        if lagrange_threshold is not None:
            start = torch.zeros_like(self.log_alpha.detach())
            self.log_multiplier = nn.Parameter(start)

    @property
    def out_keys(self) -> list[str]:
        """The keys of the losses, then those of detached numbers for the log."""
        losses = ["loss_actor", "loss_qvalue", "loss_cql", "loss_alpha"]
        numbers = ["alpha", "entropy", "pred_value", "target_value", "cql_gap"]
        if self.lagrange_threshold is not None:
            losses.append("loss_multiplier")
            numbers.append("multiplier")
        return losses + numbers

    @property
    def _alpha(self) -> Tensor:
        # TorchRL's reads ``data``, which a function transform does not allow.
        if self.min_log_alpha is None and self.max_log_alpha is None:
            alpha: Tensor = self.log_alpha.detach().exp()
        else:
            alpha = super()._alpha
        return alpha

    def draw_noise(self, batch: TensorDictBase, generator: torch.Generator | None) -> TensorDict:
        """Draw the noise of all actions."""
        action, n = batch.get(self.tensor_keys.action), self.num_random
        counts = {"mine": 1, "here": n, "after": n if self.max_q_backup else 1, "there": n}
        drawn = {
            name: action.new_empty(count, *action.shape).normal_(generator=generator)
            for name, count in counts.items()
        }
        drawn["uniform"] = action.new_empty(n, *action.shape).uniform_(-1, 1, generator=generator)
        # States first, as in every entry of a batch.
        return TensorDict({name: x.movedim(0, 1) for name, x in drawn.items()}, batch.batch_size)

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Return all losses at the same parameters, as in the authors' code."""
        drawn = tensordict.get(NOISE, default=None)
        drawn = self.draw_noise(tensordict, None) if drawn is None else drawn
        noise = {name: x.movedim(1, 0) for name, x in drawn.items()}
        policy = self._policy(tensordict)
        mine, log_prob = (x.squeeze(0) for x in policy(noise["mine"]))
        with torch.no_grad():
            here = policy(noise["here"])
            next_policy = self._policy(tensordict.get("next"))
            target = self._target(tensordict, *next_policy(noise["after"]))
            there = next_policy(noise["there"])
        q_data, gap = self._q_and_gap(tensordict, noise["uniform"], here, there)

        alpha = self._alpha
        q_mine = self._values(tensordict, mine.unsqueeze(0), self._cached_detach_qvalue_params)
        loss_q = distance_loss(q_data, target.expand_as(q_data), self.loss_function).sum(0)
        excess = self.min_q_weight * gap
        losses = {
            "loss_actor": alpha * log_prob - q_mine.amin(0).squeeze(0),
            "loss_qvalue": loss_q,
            "loss_cql": excess.sum(0),
            "loss_alpha": -self.log_alpha * (log_prob.detach() + self.target_entropy),
        }
        diagnostics = {
            "alpha": alpha,
            "entropy": -log_prob.detach().mean(),
            "pred_value": q_data.detach().mean(),
            "target_value": target.mean(),
            "cql_gap": gap.detach().mean(),
        }
        if self.lagrange_threshold is not None:
            excess = excess - self.lagrange_threshold
            multiplier = self.log_multiplier.exp().clamp_max(_MAX_MULTIPLIER)
            losses["loss_cql"] = (multiplier.detach() * excess).sum(0)
            losses["loss_multiplier"] = -multiplier * excess.detach().mean(0)
            diagnostics["multiplier"] = multiplier.detach()
        reduced = {name: self._reduce_loss(loss, tensordict) for name, loss in losses.items()}
        if self.reduction == "none":
            return TensorDict(reduced, tensordict.batch_size)
        return TensorDict(reduced | diagnostics)

    def _policy(self, tensordict: TensorDictBase) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        """Return the function from noise to actions and their log-density."""
        actor, states = self.actor_network, tensordict.select(*self.actor_network.in_keys)
        with holding(self.actor_network_params, actor):
            params = actor.get_dist_params(states)
        from_noise = actor[-1].distribution_class.from_noise
        return partial(from_noise, params.get("loc"), params.get("scale"))

    def _target(self, tensordict: TensorDictBase, action: Tensor, log_prob: Tensor) -> Tensor:
        """Return r + gamma min Q'(s', a') ``[B]``; with ``max_q_backup`` each Q' at its best."""
        following = tensordict.get("next")
        value = self._values(following, action, self.target_qvalue_network_params)
        value = value.amax(1).amin(0)
        if not self.deterministic_backup and not self.max_q_backup:
            value = value - self._alpha * log_prob.squeeze(0)
        return self.value_estimator.value_estimate(
            tensordict, next_value=value.unsqueeze(-1)
        ).squeeze(-1)

    def _q_and_gap(
        self,
        tensordict: TensorDictBase,
        uniform: Tensor,
        here: tuple[Tensor, Tensor],
        there: tuple[Tensor, Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Return Q(s, a) of the data and the penalty of Eq. 4, ``[2, B]`` each.

        The log-sum-exp is the importance-sampled estimate of the paper, without the constant
        ``log(3 n)``: ``log sum_i exp Q(s, a_i) / density(a_i) - Q(s, a)``.
        """
        data = tensordict.get(self.tensor_keys.action)
        actions = torch.cat([data.unsqueeze(0), uniform, there[0], here[0]])
        q = self._values(tensordict, actions, self.qvalue_network_params)
        log_uniform = torch.full_like(here[1], -data.shape[-1] * math.log(2))
        log_density = torch.cat([log_uniform, there[1], here[1]])
        q_data, q_drawn = q[:, 0], q[:, 1:]
        spread = torch.logsumexp((q_drawn - log_density) / self.temperature, 1) * self.temperature
        gap = spread - q_data
        return q_data, gap if self.least_gap is None else gap.clamp_min(self.least_gap)

    def _values(
        self, tensordict: TensorDictBase, actions: Tensor, params: TensorDictBase
    ) -> Tensor:
        """Return Q of actions ``[n, B, act]`` at the states of a batch ``[B]``: ``[2, n, B]``."""
        states = tensordict.select(*self.qvalue_network.in_keys, strict=False)
        on_cpu = actions.device.type == "cpu"
        size = max(1, _CACHED_ROWS // len(states)) if on_cpu else len(actions)
        parts = []
        for part in actions.split(size):
            inputs = states.expand(len(part), *states.shape).clone(False)
            inputs.set(self.tensor_keys.action, part)
            parts.append(values(self.qvalue_network, inputs, params))
        return torch.cat(parts, 1)


def published(dataset: str) -> tuple[Settings, str]:
    """Return the published settings for a dataset, and their source in words."""
    family = dataset.split("-")[0]
    if family in ("halfcheetah", "hopper", "walker2d"):
        return Settings(), "CORL's D4RL locomotion configuration"
    if family == "antmaze":
        antmaze = replace(
            Settings(),
            actor_lr=1e-4,
            min_q_weight=5.0,
            # CORL's threshold 0.8 is for the gap before the weight of 5; the paper's is for the gap
            # after it.
            lagrange_threshold=4.0,
            least_gap=-200.0,
            max_q_backup=True,
            critic_hidden=(256,) * 5,
            normalize=False,
            reward_scale=10.0,
            reward_shift=-5.0,
        )
        return antmaze, "CORL's antmaze-v2 configuration"
    if family in ("pen", "door", "hammer", "relocate"):
        adroit = replace(Settings(), actor_lr=1e-4, min_q_weight=1.0)
        return adroit, "CORL's Adroit configuration"
    if family == "kitchen":
        kitchen = replace(Settings(), lagrange_threshold=5.0, normalize=False)
        return kitchen, "the example for kitchen in the CQL authors' code; 1M updates"
    return Settings(), f"none published for {dataset}; locomotion's: CORL's D4RL configuration"


def policy(observation_dim: int, action_dim: int, settings: Settings) -> NormalizedPolicy:
    """Return the tanh-Gaussian policy with a log-std for each state; without draws its mean acts.

    As in CORL, log-std is in [-20, 2] and starts around -1, and the last layer starts near 0.
    """
    actor = GaussianPolicy(
        observation_dim,
        action_dim,
        hidden=settings.actor_hidden,
        squash=True,
        state_dependent_std=True,
        log_std_bounds=(-20.0, 2.0),
        log_std_init=-1.0,
    )
    last = [layer for layer in actor.modules() if isinstance(layer, nn.Linear)][-1]
    nn.init.xavier_uniform_(last.weight, gain=0.01)
    nn.init.zeros_(last.bias)
    return NormalizedPolicy(Normalization(observation_dim), actor)


def build(trajectories: TensorDictBase, settings: Settings, *, seed: int) -> Learner:
    """Return the parts of a training, see :class:`baselines.learner.Baseline`."""
    torch.manual_seed(seed)
    trajectories, sizes, device = read_transitions(trajectories)
    acting = policy(*sizes, settings).to(device)
    if settings.normalize:
        acting.normalization = Normalization.of(trajectories)
    data = normalized(trajectories, acting.normalization)
    data.set(REWARD, settings.reward_scale * data.get(REWARD) + settings.reward_shift)
    loss = ConservativeLoss(
        acting.actor,
        [_start(critic).to(device) for critic in qvalue_networks(*sizes, settings.critic_hidden)],
        lagrange_threshold=settings.lagrange_threshold,
        least_gap=settings.least_gap,
        loss_function="l2",
        target_entropy=-float(sizes[1]),
        min_q_weight=settings.min_q_weight,
        max_q_backup=settings.max_q_backup,
        num_random=settings.actions,
    )
    loss.make_value_estimator(ValueEstimators.TD0, gamma=settings.gamma, device=device)
    rates = {
        "actor_network": settings.actor_lr,
        "log_alpha": settings.actor_lr,
        "qvalue_network": settings.critic_lr,
    }
    if settings.lagrange_threshold is not None:
        rates["log_multiplier"] = settings.critic_lr
    return critic_learner(acting, loss, data, settings, seed=seed, rates=rates)


def _start(critic: TensorDictModule) -> TensorDictModule:
    """Set orthogonal weights, a last layer near 0, and biases 0, as in CORL."""
    layers = [layer for layer in critic.modules() if isinstance(layer, nn.Linear)]
    for layer in layers:
        nn.init.orthogonal_(layer.weight, gain=0.01 if layer is layers[-1] else math.sqrt(2))
        nn.init.zeros_(layer.bias)
    return critic
