"""Scaling of states to mean 0 and standard deviation 1, in the training data and in the policy.

TD3+BC (arXiv 2106.06860, Section 5) normalises each feature over the dataset,
``(s - mean) / (std + 1e-3)``.
"""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from iwsft.samplers import multiplicities
from iwsft.trajectory import (
    ACTION,
    MULTIPLICITY,
    NEXT_OBSERVATION,
    OBSERVATION,
    Segments,
    lengths,
)

# Added to the standard deviation, so that a constant feature is not divided by 0.
_LEAST_STD = 1e-3


class Normalization(nn.Module):
    """``(observation - mean) / std`` of each feature; mean and std are in the state_dict.

    A new one has mean 0 and std 1, and so changes nothing.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, observation_dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(observation_dim))
        self.register_buffer("std", torch.ones(observation_dim))

    def forward(self, observation: Tensor) -> Tensor:
        """Return the normalised observations ``[*, obs]``."""
        return (observation - self.mean) / self.std

    @classmethod
    def of(cls, trajectories: TensorDictBase) -> Normalization:
        """Return the normalization of packed trajectories, over all their valid steps.

        A step counts as often as its trajectory's ``multiplicity`` says, where there is one.
        """
        observation, valid = trajectories.get(OBSERVATION), Segments.of(trajectories).valid
        # In float64: the variance of a feature far from 0 cancels in float32.
        steps = observation[valid].double()
        mean, std = steps.mean(0), steps.std(0, correction=0)
        if trajectories.get(MULTIPLICITY, default=None) is not None:
            sizes = lengths(trajectories)
            counts = multiplicities(trajectories, sizes).to(sizes.device).repeat_interleave(sizes)
            counts = counts[valid].double()
            share = (counts / counts.sum()).unsqueeze(1)
            mean = (share * steps).sum(0)
            std = (share * (steps - mean).square()).sum(0).sqrt()
        out = cls(observation.shape[-1]).to(observation)
        out.mean.copy_(mean)
        out.std.copy_(std + _LEAST_STD)
        return out


def normalized(trajectories: TensorDictBase, normalization: Normalization) -> TensorDictBase:
    """Return a shallow copy with normalised observations and next observations."""
    out = trajectories.copy()
    for key in (OBSERVATION, NEXT_OBSERVATION):
        out.set(key, normalization(trajectories.get(key)))
    return out


class NormalizedPolicy(TensorDictModuleBase):
    """The policy of an actor that was trained on normalised observations.

    It reads ``observation`` as the environment gives it, does not change it, and writes ``action``.
    Its parameters are the actor's; its state_dict has also mean and std.
    """

    def __init__(self, normalization: Normalization, actor: TensorDictModuleBase) -> None:
        super().__init__()
        self.in_keys = [OBSERVATION]
        self.out_keys = [ACTION]
        self.normalization = normalization
        self.actor = actor

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the actor's ``action``."""
        inner = tensordict.select(OBSERVATION)
        inner.set(OBSERVATION, self.normalization(inner.get(OBSERVATION)))
        return tensordict.set(ACTION, self.actor(inner).get(ACTION))
