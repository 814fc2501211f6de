"""IQL in plain torch, from the paper's equations (arXiv 2110.06169), one network at a time."""

from __future__ import annotations

from copy import deepcopy

import torch
from tensordict import TensorDictBase
from torch import nn

from baselines.iql import Settings
from baselines.learner import Learner
from iwsft.trajectory import ACTION, NEXT_OBSERVATION, OBSERVATION, REWARD, TERMINATED
from tests.oracles.networks import Networks, PlainGaussian, follow, leaves, mlp


class PlainIQL:
    """Algorithm 1, each loss at the same parameters.

    Args:
        learner: The learner whose weights the networks take.
        settings: Settings of the learner, without dropout.
    """

    def __init__(self, learner: Learner, settings: Settings) -> None:
        loss = learner.loss
        log_std, *mean = leaves(loss.actor_network_params)
        self.actor = PlainGaussian(mlp(mean, nn.Tanh()), log_std)
        self.value = mlp(leaves(loss.value_network_params))
        self.q1 = mlp(leaves(loss.qvalue_network_params, 0))
        self.q2 = mlp(leaves(loss.qvalue_network_params, 1))
        self.target1, self.target2 = deepcopy(self.q1), deepcopy(self.q2)
        self.networks: Networks = {
            "actor_network": [self.actor],
            "value_network": [self.value],
            "qvalue_network": [self.q1, self.q2],
            "target_qvalue_network": [self.target1, self.target2],
        }
        self.settings = settings
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=settings.lr)
        self.value_optimizer = torch.optim.Adam(self.value.parameters(), lr=settings.lr)
        both = [*self.q1.parameters(), *self.q2.parameters()]
        self.q_optimizer = torch.optim.Adam(both, lr=settings.lr)
        self.decay = torch.optim.lr_scheduler.CosineAnnealingLR(
            self.actor_optimizer, T_max=settings.steps
        )

    def update(self, batch: TensorDictBase) -> None:
        """Make one update; it draws nothing."""
        s, a, r = batch.get(OBSERVATION), batch.get(ACTION), batch.get(REWARD)
        continues = (~batch.get(TERMINATED)).float()
        state_action = torch.cat([s, a], -1)
        with torch.no_grad():
            q = torch.min(self.target1(state_action), self.target2(state_action))
            bootstrap = self.value(batch.get(NEXT_OBSERVATION))
            target = r + self.settings.gamma * continues * bootstrap

        # Eq. 5: expectile regression of V on Q.
        v = self.value(s)
        advantage = q - v
        expectile = self.settings.expectile
        weight = torch.where(advantage > 0, expectile, 1 - expectile)
        value_loss = (weight * advantage.pow(2)).mean()

        # Eq. 6, for both Q-networks.
        q1, q2 = self.q1(state_action), self.q2(state_action)
        q_loss = (q1 - target).pow(2).mean() + (q2 - target).pow(2).mean()

        # Eq. 7, with the weight clipped as in the code of Appendix B.
        weight = (self.settings.temperature * advantage.detach()).exp().clamp(max=100.0)
        log_prob = self.actor(s).log_prob(a).sum(-1, keepdim=True)
        actor_loss = -(weight * log_prob).mean()

        for optimizer, loss in (
            (self.value_optimizer, value_loss),
            (self.q_optimizer, q_loss),
            (self.actor_optimizer, actor_loss),
        ):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        self.decay.step()
        follow(self.target1, self.q1, self.settings.tau)
        follow(self.target2, self.q2, self.settings.tau)
