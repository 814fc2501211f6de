"""The peers of control: what one writes in plain torch, without this library."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from copy import deepcopy

import gymnasium as gym
import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from iwsft.trajectory import ACTION, MASK, OBSERVATION


class PlainPolicy(nn.Module):
    """The policy of :class:`iwsft.GaussianPolicy`: 3 x 256 ReLU, tanh mean, free log-std."""

    def __init__(self, observation_dim: int, action_dim: int) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.zeros(action_dim))
        sizes = (observation_dim, 256, 256, 256)
        hidden = [
            layer
            for i, o in zip(sizes[:-1], sizes[1:], strict=True)
            for layer in (nn.Linear(i, o), nn.ReLU())
        ]
        self.mean = nn.Sequential(*hidden, nn.Linear(256, action_dim), nn.Tanh())

    def log_prob(self, observation: Tensor, action: Tensor) -> Tensor:
        std = self.log_std.clamp(-5, 2).exp()
        return torch.distributions.Normal(self.mean(observation), std).log_prob(action).sum(-1)

    @torch.no_grad()
    def copy_(self, parameters: Iterable[Tensor]) -> None:
        """Take over parameters, in the order of this module's."""
        for mine, theirs in zip(self.parameters(), parameters, strict=True):
            mine.copy_(theirs)


class NaiveIwSft:
    """iw-SFT with live networks: every draw of a padded batch goes through policy, q and reference.

    Args:
        padded: all trajectories, ``[n, T]``, with their mask.
        reference: pi_ref.
        k: temperature on the mean log-ratio.
        decay: of the moving average q.
        lr: of Adam.
    """

    def __init__(
        self, padded: TensorDictBase, reference: PlainPolicy, *, k: float, decay: float, lr: float
    ) -> None:
        self.observation, self.action = padded.get(OBSERVATION), padded.get(ACTION)
        self.mask = padded.get(MASK).float()
        self.reference, self.k, self.decay = reference, k, decay
        self.policy, self.q = deepcopy(reference), deepcopy(reference)
        self.optimizer = torch.optim.Adam(self.policy.parameters(), lr=lr)

    def step(self, draws: Tensor) -> None:
        """One update on the trajectories at ``draws``, int64 ``[B]``, repeats and all."""
        batch = self.observation[draws], self.action[draws]
        mask = self.mask[draws]
        length = mask.sum(1)
        log_prob = self.policy.log_prob(*batch)
        with torch.no_grad():
            log_ratio = self.q.log_prob(*batch) - self.reference.log_prob(*batch)
            weight = (self.k * (log_ratio * mask).sum(1) / length).exp()
        loss = -(weight * (log_prob * mask).sum(1) / length).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for q, p in zip(self.q.parameters(), self.policy.parameters(), strict=True):
                q.mul_(self.decay).add_(p, alpha=1 - self.decay)


def cloning(
    data: TensorDictBase, batch_size: int, *, lr: float, seed: int, fused: bool | None = None
) -> Callable[[], None]:
    """Behaviour cloning on steps drawn uniformly; one update a call."""
    observation, action = data.get(OBSERVATION), data.get(ACTION)
    policy = PlainPolicy(observation.shape[-1], action.shape[-1])
    optimizer = torch.optim.Adam(policy.parameters(), lr=lr, fused=fused)
    generator = torch.Generator().manual_seed(seed)

    def update() -> None:
        rows = torch.randint(len(observation), (batch_size,), generator=generator)
        loss = -policy.log_prob(observation[rows], action[rows]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return update


@torch.no_grad()
def roll_out(policy: PlainPolicy, env: gym.Env, episodes: int) -> int:
    """Episodes one after the other, a call of the policy for each step; steps taken."""
    steps = 0
    for episode in range(episodes):
        observation, _ = env.reset(seed=episode)
        over = False
        while not over:
            action = policy.mean(torch.as_tensor(observation, dtype=torch.float32)).numpy()
            observation, _, terminated, truncated, _ = env.step(action)
            over = terminated or truncated
            steps += 1
    return steps
