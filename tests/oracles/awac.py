"""AWAC in plain torch, from the paper's equations (arXiv 2006.09359), one network at a time."""

from __future__ import annotations

from copy import deepcopy

import torch
from tensordict import TensorDictBase
from torch import nn

from baselines.awac import Settings
from baselines.learner import Learner
from iwsft.trajectory import ACTION, NEXT_OBSERVATION, OBSERVATION, REWARD, TERMINATED
from tests.oracles.networks import Networks, PlainGaussian, follow, leaves, mlp


class PlainAWAC:
    """Algorithm 1 on fixed data, both losses at the same parameters.

    Args:
        learner: The learner whose weights the networks take.
        settings: Settings of the learner.
    """

    def __init__(self, learner: Learner, settings: Settings) -> None:
        loss = learner.loss
        log_std, *mean = leaves(loss.actor_network_params)
        self.actor = PlainGaussian(mlp(mean, nn.Tanh()), log_std)
        self.q1 = mlp(leaves(loss.qvalue_network_params, 0))
        self.q2 = mlp(leaves(loss.qvalue_network_params, 1))
        self.target1, self.target2 = deepcopy(self.q1), deepcopy(self.q2)
        self.networks: Networks = {
            "actor_network": [self.actor],
            "qvalue_network": [self.q1, self.q2],
            "target_qvalue_network": [self.target1, self.target2],
        }
        self.settings = settings
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=settings.lr)
        both = [*self.q1.parameters(), *self.q2.parameters()]
        self.q_optimizer = torch.optim.Adam(both, lr=settings.lr)

    def update(self, batch: TensorDictBase) -> None:
        """Make one update. It draws the policy's actions at s', then at s."""
        s, a, r = batch.get(OBSERVATION), batch.get(ACTION), batch.get(REWARD)
        following = batch.get(NEXT_OBSERVATION)
        continues = (~batch.get(TERMINATED)).float()
        with torch.no_grad():
            after = torch.cat([following, self.actor(following).sample().clamp(-1, 1)], -1)
            bootstrap = torch.min(self.target1(after), self.target2(after))
            target = r + self.settings.gamma * continues * bootstrap

        state_action = torch.cat([s, a], -1)
        q1, q2 = self.q1(state_action), self.q2(state_action)
        q_loss = (q1 - target).pow(2).mean() + (q2 - target).pow(2).mean()

        dist = self.actor(s)
        with torch.no_grad():
            own = torch.cat([s, dist.sample().clamp(-1, 1)], -1)
            advantage = torch.min(q1, q2) - torch.min(self.q1(own), self.q2(own))
            weight = (advantage / self.settings.temperature).exp()
            weight = weight.clamp(max=self.settings.max_weight)
        actor_loss = -(weight * dist.log_prob(a).sum(-1, keepdim=True)).mean()

        for optimizer, loss in (
            (self.q_optimizer, q_loss),
            (self.actor_optimizer, actor_loss),
        ):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        follow(self.target1, self.q1, self.settings.tau)
        follow(self.target2, self.q2, self.settings.tau)
