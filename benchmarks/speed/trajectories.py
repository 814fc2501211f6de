"""iw-SFT(Q) on whole trajectories, ours and the naive way, on the same draws."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.objectives.utils import TargetNetUpdater

from benchmarks.d4rl.settings import QUALITY_BINS
from benchmarks.speed.data import cheetah_like, widths
from benchmarks.speed.memory import growth_mb
from benchmarks.speed.plain import NaiveIwSft, PlainPolicy
from iwsft.curation import curate
from iwsft.diagnostics import diagnose
from iwsft.objective import LOSS, ImportanceWeightedMLE
from iwsft.policies import GaussianPolicy
from iwsft.proposals import EMA
from iwsft.reference import annotate_reference
from iwsft.samplers import StepSampler, TrajectorySampler
from iwsft.trajectory import MULTIPLICITY, TRAJ_IDS, pad
from iwsft.weights import ImportanceWeights

# halfcheetah-medium-replay in Table 4 of the paper.
K, DECAY, LR = 1.0, 0.995, 4e-5


@dataclass
class Training:
    """The updates of ``iwsft.training.fit``, one a call, without its files."""

    loss: ImportanceWeightedMLE
    sampler: StepSampler | TrajectorySampler
    updater: TargetNetUpdater | None = None
    lr: float = LR
    # Looks at the weights of every batch.
    diagnosed: bool = False

    def __post_init__(self) -> None:
        self.optimizer = torch.optim.Adam(self.loss.parameters(), lr=self.lr, fused=True)
        self.batch: TensorDictBase | None = None

    def step(self) -> None:
        """One update; the batch stays at hand."""
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
    """Ours and the naive way on the curated trajectories of one dataset.

    Args:
        file: dataset; synthetic without.
        trajectories: of the synthetic dataset.
        steps: of each trajectory of it.
        draws: trajectories of a batch.
        seed: of everything.
    """

    def __init__(
        self, file: str | Path | None, trajectories: int, steps: int, draws: int, seed: int
    ) -> None:
        torch.manual_seed(seed)
        curated = curate(cheetah_like(file, trajectories, steps, seed), cuts=QUALITY_BINS)
        sizes = widths(curated)
        reference, policy = GaussianPolicy(*sizes), GaussianPolicy(*sizes)
        annotate_reference(reference, curated)
        # The order of the naive policy's parameters, before the loss takes them out of the module.
        self._names = [tuple(name.split(".")) for name, _ in policy.named_parameters()]
        plain = PlainPolicy(*sizes)
        plain.copy_(reference.parameters())
        loss = ImportanceWeightedMLE(
            policy, importance_weights=ImportanceWeights.paper_control(K), proposal="lagged"
        )
        sampler = TrajectorySampler(curated, draws, seed=seed)
        self.ours = Training(loss, sampler, EMA(loss, decay=DECAY))
        self.naive = NaiveIwSft(pad(curated), plain, k=K, decay=DECAY, lr=LR)
        self.kept = curated.get(TRAJ_IDS).unique_consecutive()
        self.follow()

    def follow(self) -> None:
        """Give the naive policy and q the parameters of ours."""
        loss = self.ours.loss
        self.naive.policy.copy_(loss.actor_network_params[name] for name in self._names)
        self.naive.q.copy_(loss.target_actor_network_params[name] for name in self._names)

    def draws(self) -> Tensor:
        """Positions of the trajectories of our last batch, one entry a draw."""
        assert self.ours.batch is not None
        ids, steps = self.ours.batch.get(TRAJ_IDS).unique_consecutive(return_counts=True)
        first = steps.cumsum(0) - steps
        drawn = self.ours.batch.get(MULTIPLICITY)[first]
        return torch.searchsorted(self.kept, ids).repeat_interleave(drawn)

    def disagreement(self) -> float:
        """Largest relative difference of a parameter's last gradient, in the 2-norm."""
        ours = [self.ours.loss.actor_network_params[name].grad for name in self._names]
        naive = [p.grad for p in self.naive.policy.parameters() if p.grad is not None]
        both = [(a.double(), b.double()) for a, b in zip(ours, naive, strict=True)]
        return max(float((a - b).norm() / b.norm()) for a, b in both)


def peak(*, ours: bool, **settings: Any) -> float:
    """MB that a step needs above the loaded data; alone in its process."""
    torch.set_num_threads(1)
    both = SameDraws(**settings)
    if ours:
        return growth_mb(both.ours.step)
    everything = both.ours.sampler.batch_size
    return growth_mb(lambda: both.naive.step(torch.arange(everything) % len(both.kept)))


if __name__ == "__main__":
    print(peak(**json.loads(sys.argv[1])))
