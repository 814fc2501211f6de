"""iw-SFT in plain torch: the whole method in one update."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import Tensor

from tests.oracles.networks import PlainGaussian


class NaiveIwSft:
    """iw-SFT on trajectories padded to one length, with q a moving average of the policy.

    Args:
        observation: States of all trajectories ``[n, T, obs]``.
        action: Their actions ``[n, T, act]``.
        mask: True at steps, False at padding ``[n, T]``.
        reference: The policy pi_ref that the training starts at.
        k: Temperature of the mean log-ratio.
        decay: Share of q that an update keeps.
        lr: Learning rate of Adam.
    """

    def __init__(
        self,
        observation: Tensor,
        action: Tensor,
        mask: Tensor,
        reference: PlainGaussian,
        *,
        k: float,
        decay: float,
        lr: float,
    ) -> None:
        self.observation, self.action, self.mask = observation, action, mask.float()
        self.reference, self.k, self.decay = reference, k, decay
        self.policy, self.q = deepcopy(reference), deepcopy(reference)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=lr)

    def step(self, draws: Tensor) -> None:
        """Make one update on the trajectories at positions ``draws`` ``[B]``, repeats included."""
        steps = self.observation[draws], self.action[draws]
        mask = self.mask[draws]
        length = mask.sum(1)
        # log p, log q and log pi_ref of each step [B, T]; only p has a gradient.
        log_prob = self.policy.log_prob(*steps)
        with torch.no_grad():
            log_ratio = self.q.log_prob(*steps) - self.reference.log_prob(*steps)
            # The importance weight of each trajectory [B]: 1 at the start, where q is pi_ref.
            weight = (self.k * (log_ratio * mask).sum(1) / length).exp()
        loss = -(weight * (log_prob * mask).sum(1) / length).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        # q follows the policy.
        with torch.no_grad():
            for q, p in zip(self.q.parameters(), self.policy.parameters(), strict=True):
                q.mul_(self.decay).add_(p, alpha=1 - self.decay)
