"""CQL in plain torch, from the paper's equations (arXiv 2006.04779), one network at a time."""

from __future__ import annotations

import math
from copy import deepcopy

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.nn import functional

from baselines.cql import Settings
from baselines.learner import Learner
from iwsft.trajectory import ACTION, NEXT_OBSERVATION, OBSERVATION, REWARD, TERMINATED
from tests.oracles.networks import follow, leaves, mlp


class PlainCQL:
    """CQL(H) on soft actor-critic, all losses at the same parameters.

    Args:
        learner: The learner whose weights the networks take.
        settings: Settings of the learner.
    """

    def __init__(self, learner: Learner, settings: Settings) -> None:
        loss = learner.loss
        self.actor = mlp(leaves(loss.actor_network_params))
        self.q1 = mlp(leaves(loss.qvalue_network_params, 0))
        self.q2 = mlp(leaves(loss.qvalue_network_params, 1))
        self.target1, self.target2 = deepcopy(self.q1), deepcopy(self.q2)
        self.networks = {
            "actor_network": [self.actor],
            "qvalue_network": [self.q1, self.q2],
            "target_qvalue_network": [self.target1, self.target2],
        }
        self.settings = settings
        self.log_alpha = nn.Parameter(torch.zeros((), device=loss.log_alpha.device))
        self.log_multiplier = nn.Parameter(torch.zeros((), device=loss.log_alpha.device))
        actor_lr, critic_lr = settings.actor_lr, settings.critic_lr
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=actor_lr)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], lr=actor_lr)
        both = [*self.q1.parameters(), *self.q2.parameters()]
        self.q_optimizer = torch.optim.Adam(both, lr=critic_lr)
        self.multiplier_optimizer = torch.optim.Adam([self.log_multiplier], lr=critic_lr)

    def draw(self, states: Tensor, n: int) -> tuple[Tensor, Tensor]:
        """Return ``n`` actions per state ``[n * B, act]`` and their log-densities ``[n, B]``."""
        states = states.repeat(n, 1)
        mean, log_std = self.actor(states).chunk(2, -1)
        log_std = (log_std - 1).clamp(-20, 2)
        normal = torch.distributions.Normal(mean, log_std.exp(), validate_args=False)
        x = normal.rsample()
        # log(1 - tanh(x)^2), without the cancellation where tanh is 1.
        log_slope = 2 * (math.log(2) - x - functional.softplus(-2 * x))
        log_prob = (normal.log_prob(x) - log_slope).sum(-1)
        return x.tanh(), log_prob.view(n, -1)

    def update(self, batch: TensorDictBase) -> None:
        """Make one update. It draws random numbers in the order of our loss."""
        settings, n = self.settings, self.settings.actions
        s, a = batch.get(OBSERVATION), batch.get(ACTION)
        r = batch.get(REWARD).squeeze(-1)
        following = batch.get(NEXT_OBSERVATION)
        continues = (~batch.get(TERMINATED)).float().squeeze(-1)

        def value(q: nn.Module, states: Tensor, actions: Tensor, n: int = 1) -> Tensor:
            return q(torch.cat([states.repeat(n, 1), actions], -1)).view(n, -1)

        mine, log_prob = self.draw(s, 1)
        with torch.no_grad():
            here, log_here = self.draw(s, n)
            backups = n if settings.max_q_backup else 1
            after, _ = self.draw(following, backups)
            there, log_there = self.draw(following, n)
            bootstrap = torch.min(
                value(self.target1, following, after, backups).amax(0),
                value(self.target2, following, after, backups).amax(0),
            )
            target = r + settings.gamma * continues * bootstrap

        # The losses of soft actor-critic's policy and temperature.
        alpha = self.log_alpha.exp().detach()
        q_mine = torch.min(value(self.q1, s, mine), value(self.q2, s, mine))
        actor_loss = (alpha * log_prob - q_mine).mean()
        alpha_loss = -(self.log_alpha * (log_prob.detach() - a.shape[-1])).mean()

        # Eq. 4 with the log-sum-exp of Appendix F.
        uniform = torch.rand(n, *a.shape, device=a.device) * 2 - 1
        multiplier = self.log_multiplier.exp().clamp(max=1e6)
        q_loss, excesses = torch.zeros((), device=a.device), []
        for q in (self.q1, self.q2):
            data_value = value(q, s, a).squeeze(0)
            sampled = torch.cat(
                [
                    value(q, s, uniform.flatten(0, 1), n) - a.shape[-1] * math.log(0.5),
                    value(q, s, there, n) - log_there,
                    value(q, s, here, n) - log_here,
                ]
            )
            gap = torch.logsumexp(sampled, 0) - data_value
            if settings.least_gap is not None:
                gap = gap.clamp(min=settings.least_gap)
            excess = settings.min_q_weight * gap.mean()
            if settings.lagrange_threshold is not None:
                excess = excess - settings.lagrange_threshold
                excesses.append(excess.detach())
                excess = multiplier.detach() * excess
            q_loss = q_loss + (data_value - target).pow(2).mean() + excess

        steps = [
            (self.actor_optimizer, actor_loss),
            (self.alpha_optimizer, alpha_loss),
            (self.q_optimizer, q_loss),
        ]
        if excesses:
            multiplier_loss = -multiplier * (excesses[0] + excesses[1]) / 2
            steps.append((self.multiplier_optimizer, multiplier_loss))
        # All gradients are taken before the first step, each of the loss's own networks.
        for optimizer, loss in steps:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            gradients = torch.autograd.grad(loss, parameters, retain_graph=True)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
        for optimizer, _ in steps:
            optimizer.step()
        follow(self.target1, self.q1, settings.tau)
        follow(self.target2, self.q2, settings.tau)
