"""ReBRAC in plain torch, from the paper's equations (arXiv 2305.09836), one network at a time."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase

from baselines.rebrac import Settings
from tests.oracles.td3_bc import PlainTD3BC


class PlainReBRAC(PlainTD3BC):
    """TD3 with Eq. 2 and 3: a penalty for the actor, and one in the critics' target."""

    settings: Settings

    def next_value(self, batch: TensorDictBase, next_action: torch.Tensor) -> torch.Tensor:
        """The lesser of both targets less the squared distance to the data's next action."""
        distances = [
            sum((a - b) ** 2 for a, b in zip(mine, theirs, strict=True))
            for mine, theirs in zip(next_action, batch["next", "action"], strict=True)
        ]
        penalty = self.settings.critic_penalty * torch.stack(distances)
        return super().next_value(batch, next_action) - penalty.unsqueeze(-1)

    def actor_loss(self, s: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
        """The lesser Q, divided by its mean absolute value, and the distance to the data."""
        mine = self.actor(s)
        state_action = torch.cat([s, mine], -1)
        q = torch.min(self.q1(state_action), self.q2(state_action))
        distance = (mine - a).pow(2).sum(-1)
        return self.settings.actor_penalty * distance.mean() - q.mean() / q.abs().mean().detach()
