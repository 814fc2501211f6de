"""Data of the paper's shapes."""

from __future__ import annotations

from pathlib import Path

import torch
from tensordict import TensorDict, TensorDictBase

from iwsft import datasets
from iwsft.trajectory import ACTION, OBSERVATION, REWARD, TRAJ_IDS, from_steps, lengths


def cheetah_like(file: str | Path | None, trajectories: int, steps: int, seed: int) -> TensorDict:
    """Trajectories of equal length with HalfCheetah's sizes (17 observations, 6 actions).

    Args:
        file: read this dataset instead.
        trajectories: how many.
        steps: of each.
        seed: of the contents.
    """
    if file is not None:
        return datasets.load(file).trajectories
    generator = torch.Generator().manual_seed(seed)
    total = trajectories * steps
    skill = torch.rand(trajectories, 1, generator=generator).repeat_interleave(steps, 0)
    # Each trajectory has its own corner of the state space, so that weights differ.
    place = 3 * torch.randn(trajectories, 17, generator=generator).repeat_interleave(steps, 0)
    return from_steps(
        {
            OBSERVATION: place + torch.randn(total, 17, generator=generator),
            ACTION: 2 * torch.rand(total, 6, generator=generator) - 1,
            REWARD: 10 * skill + torch.randn(total, 1, generator=generator),
        },
        torch.arange(trajectories).repeat_interleave(steps),
    )


def hopper_replay(times: int) -> TensorDict:
    """The bundled data over and over: 9 times it has as many episodes as the set it is part of."""
    part = datasets.load(datasets.DEFAULT).trajectories
    whole: TensorDict = torch.cat([part] * times)
    sizes = lengths(part).repeat(times)
    whole.set(TRAJ_IDS, torch.arange(len(sizes)).repeat_interleave(sizes))
    return whole


def cut_evenly(trajectories: TensorDict) -> TensorDict:
    """The same steps as as many trajectories of equal length, the first ones a step longer."""
    count, total = len(lengths(trajectories)), len(trajectories)
    sizes = torch.full((count,), total // count)
    sizes[: total % count] += 1
    even = trajectories.copy()
    even.set(TRAJ_IDS, torch.arange(count).repeat_interleave(sizes))
    return even


def widths(trajectories: TensorDictBase) -> tuple[int, int]:
    """Sizes of observation and action."""
    return trajectories.get(OBSERVATION).shape[-1], trajectories.get(ACTION).shape[-1]
