"""Data of the paper's shapes, and iw-SFT(Q) on them, ours and the naive way on the same draws."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.objectives.utils import TargetNetUpdater

from benchmarks.d4rl.run import sizes
from benchmarks.d4rl.settings import QUALITY_BINS
from iwsft import datasets
from iwsft.curation import curate
from iwsft.diagnostics import diagnose
from iwsft.objective import LOSS, ImportanceWeightedMLE
from iwsft.policies import GaussianPolicy
from iwsft.proposals import EMA
from iwsft.reference import annotate_reference
from iwsft.samplers import StepSampler, TrajectorySampler
from iwsft.trajectory import (
    ACTION,
    MASK,
    MULTIPLICITY,
    OBSERVATION,
    REWARD,
    TRAJ_IDS,
    from_steps,
    lengths,
    pad,
)
from iwsft.weights import ImportanceWeights
from tests.oracles.iw_sft import NaiveIwSft
from tests.oracles.networks import PlainGaussian

# halfcheetah-medium-replay in Table 4 of the paper.
K, DECAY, LR = 1.0, 0.995, 4e-5


def cheetah_like(file: str | Path | None, trajectories: int, steps: int, seed: int) -> TensorDict:
    """Return the file's trajectories, or random ones of HalfCheetah's sizes and equal length."""
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
    """Return copies of the bundled data; 9 have as many episodes as the set it is part of."""
    part = datasets.load(datasets.DEFAULT).trajectories
    whole: TensorDict = torch.cat([part] * times)
    steps = lengths(part).repeat(times)
    whole.set(TRAJ_IDS, torch.arange(len(steps)).repeat_interleave(steps))
    return whole


def cut_evenly(trajectories: TensorDict) -> TensorDict:
    """Return the same steps cut into as many trajectories of equal length, up to one step."""
    count, total = len(lengths(trajectories)), len(trajectories)
    steps = torch.full((count,), total // count)
    steps[: total % count] += 1
    even = trajectories.copy()
    even.set(TRAJ_IDS, torch.arange(count).repeat_interleave(steps))
    return even


@dataclass
class Training:
    """The updates of ``iwsft.training.fit``, one per call, without its files."""

    loss: ImportanceWeightedMLE
    sampler: StepSampler | TrajectorySampler
    updater: TargetNetUpdater | None = None
    lr: float = LR
    # Whether each update also looks at the weights of its batch.
    diagnosed: bool = False
    batch: TensorDictBase | None = None

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.loss.parameters(), lr=self.lr, fused=True)

    def step(self) -> None:
        """Make one update."""
        self.batch = self.sampler.sample()
        terms = self.loss.terms(self.batch)
        out = self.loss.summary(terms)
        self.optimizer.zero_grad()
        out[LOSS].backward()
        if self.diagnosed:
            diagnose(self.loss, self.batch, terms)
        self.optimizer.step()
        if self.updater is not None:
            self.updater.step()


class SameDraws:
    """Ours and the naive way on the curated part of :func:`cheetah_like`, in batches of draws."""

    def __init__(
        self, file: str | Path | None, trajectories: int, steps: int, draws: int, seed: int
    ) -> None:
        torch.manual_seed(seed)
        curated = curate(cheetah_like(file, trajectories, steps, seed), cuts=QUALITY_BINS)
        observation_dim, action_dim = sizes(curated)
        reference, policy = (GaussianPolicy(observation_dim, action_dim) for _ in range(2))
        annotate_reference(reference, curated)
        # The order of the naive policy's parameters, before the loss takes them out of the module.
        self._names = [tuple(name.split(".")) for name, _ in policy.named_parameters()]
        plain = PlainGaussian.of_sizes(observation_dim, action_dim)
        plain.copy_(reference.parameters())
        loss = ImportanceWeightedMLE(
            policy, importance_weights=ImportanceWeights.paper_control(K), proposal="lagged"
        )
        sampler = TrajectorySampler(curated, draws, seed=seed)
        self.ours = Training(loss, sampler, EMA(loss, decay=DECAY))
        padded = pad(curated)
        observation, action, mask = (padded.get(key) for key in (OBSERVATION, ACTION, MASK))
        self.naive = NaiveIwSft(observation, action, mask, plain, k=K, decay=DECAY, lr=LR)
        self.ids = curated.get(TRAJ_IDS).unique_consecutive()
        self.follow()

    def follow(self) -> None:
        """Give the naive policy and q the parameters of ours."""
        loss = self.ours.loss
        self.naive.policy.copy_(loss.actor_network_params[name] for name in self._names)
        self.naive.q.copy_(loss.target_actor_network_params[name] for name in self._names)

    def draws(self) -> Tensor:
        """Return the positions of the trajectories of our last batch, one entry per draw."""
        assert self.ours.batch is not None
        ids, steps = self.ours.batch.get(TRAJ_IDS).unique_consecutive(return_counts=True)
        first = steps.cumsum(0) - steps
        multiplicity = self.ours.batch.get(MULTIPLICITY)[first]
        return torch.searchsorted(self.ids, ids).repeat_interleave(multiplicity)

    def disagreement(self) -> float:
        """Return the largest relative difference of a parameter's last gradient, in the 2-norm."""
        ours = [self.ours.loss.actor_network_params[name].grad for name in self._names]
        naive = [p.grad for p in self.naive.policy.parameters() if p.grad is not None]
        pairs = [(a.double(), b.double()) for a, b in zip(ours, naive, strict=True)]
        return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def job(*, ours: bool, **arguments: Any) -> Callable[[], object]:
    """Return a step whose memory is measured, ours or the naive one."""
    pair = SameDraws(**arguments)
    if ours:
        return pair.ours.step
    draws = torch.arange(pair.ours.sampler.batch_size) % len(pair.ids)
    return lambda: pair.naive.step(draws)
