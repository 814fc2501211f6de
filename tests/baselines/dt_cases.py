"""Small settings and trajectories for the tests of the decision transformer."""

from __future__ import annotations

import torch
from tensordict import TensorDict

from baselines import dt
from iwsft.trajectory import from_steps

SMALL = dt.Settings(steps=6, batch_size=8, context=5, layers=2, width=32, target_return=2.0)


def data(sizes: list[int], observation_dim: int = 3, action_dim: int = 2) -> TensorDict:
    generator = torch.Generator().manual_seed(0)
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    count = len(ids)
    return from_steps(
        {
            "observation": 2 + 3 * torch.randn(count, observation_dim, generator=generator),
            "action": 2 * torch.rand(count, action_dim, generator=generator) - 1,
            ("next", "reward"): torch.rand(count, 1, generator=generator),
        },
        ids,
    )


SIZES = [3, 9, 1, 12]
