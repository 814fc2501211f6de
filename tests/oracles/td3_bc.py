"""TD3+BC in plain torch, from the paper's equations (arXiv 2106.06860), one network at a time."""

from __future__ import annotations

from copy import deepcopy

import torch
from tensordict import TensorDictBase
from torch import nn

from baselines.learner import Learner
from baselines.td3_bc import Settings
from iwsft.trajectory import ACTION, NEXT_OBSERVATION, OBSERVATION, REWARD, TERMINATED
from tests.oracles.networks import follow, leaves, mlp


class PlainTD3BC:
    """TD3 with the actor's loss of Eq. 5, both losses at the same parameters.

    Args:
        learner: The learner whose weights the networks take.
        settings: Settings of the learner.
    """

    def __init__(self, learner: Learner, settings: Settings) -> None:
        loss = learner.loss
        self.actor = mlp(leaves(loss.actor_network_params), nn.Tanh())
        self.q1 = mlp(leaves(loss.qvalue_network_params, 0))
        self.q2 = mlp(leaves(loss.qvalue_network_params, 1))
        self.target_actor = deepcopy(self.actor)
        self.target1, self.target2 = deepcopy(self.q1), deepcopy(self.q2)
        self.networks = {
            "actor_network": [self.actor],
            "qvalue_network": [self.q1, self.q2],
            "target_actor_network": [self.target_actor],
            "target_qvalue_network": [self.target1, self.target2],
        }
        self.settings = settings
        self.updates = 0
        lr = getattr(settings, "actor_lr", settings.lr)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), lr=lr)
        both = [*self.q1.parameters(), *self.q2.parameters()]
        self.q_optimizer = torch.optim.Adam(both, lr=settings.lr)

    def update(self, batch: TensorDictBase) -> None:
        """Make one update. It draws the noise of the target's actions."""
        self.updates += 1
        settings = self.settings
        s, a, r = batch.get(OBSERVATION), batch.get(ACTION), batch.get(REWARD)
        following = batch.get(NEXT_OBSERVATION)
        continues = (~batch.get(TERMINATED)).float()
        with torch.no_grad():
            noise = settings.policy_noise * torch.randn_like(a)
            noise = noise.clamp(-settings.noise_clip, settings.noise_clip)
            next_action = (self.target_actor(following) + noise).clamp(-1, 1)
            bootstrap = self.next_value(batch, next_action)
            target = r + settings.gamma * continues * bootstrap
        state_action = torch.cat([s, a], -1)
        q1, q2 = self.q1(state_action), self.q2(state_action)
        q_loss = (q1 - target).pow(2).mean() + (q2 - target).pow(2).mean()

        due = self.updates % settings.policy_delay == 0
        if due:
            # The actor's gradient is taken before the critics move.
            gradients = torch.autograd.grad(self.actor_loss(s, a), list(self.actor.parameters()))

        self.q_optimizer.zero_grad()
        q_loss.backward()
        self.q_optimizer.step()
        if due:
            for parameter, gradient in zip(self.actor.parameters(), gradients, strict=True):
                parameter.grad = gradient
            self.actor_optimizer.step()
            follow(self.target_actor, self.actor, settings.tau)
            follow(self.target1, self.q1, settings.tau)
            follow(self.target2, self.q2, settings.tau)

    def next_value(self, batch: TensorDictBase, next_action: torch.Tensor) -> torch.Tensor:
        """The lesser of both targets at the next states, ``[B, 1]``."""
        after = torch.cat([batch.get(NEXT_OBSERVATION), next_action], -1)
        return torch.min(self.target1(after), self.target2(after))

    def actor_loss(self, s: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """Eq. 5 with the normalised Q."""
        mine = self.actor(s)
        q = self.q1(torch.cat([s, mine], -1))
        weight = self.settings.alpha / q.abs().mean().detach()
        return -weight * q.mean() + (mine - a).pow(2).mean()
