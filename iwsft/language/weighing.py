"""Cached weights of coming updates, from one forward pass over their trajectories."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain

import torch
from tensordict import TensorDictBase
from torch import Tensor

from iwsft.language.batches import PLACE, TrajectoryDataset
from iwsft.language.plan import UpdatePlan
from iwsft.objective import ImportanceWeightedMLE
from iwsft.trajectory import IMPORTANCE_WEIGHT, MULTIPLICITY, lengths, select
from iwsft.weights import exponential

# Batches, by the positions of their trajectories -> log-probs, gathered from all processes.
LogProb = Callable[[list[list[int]]], Tensor]


class CachedWeights:
    """Computes the weights of the coming updates and writes them into their batches.

    q does not move within a window of updates, so one forward pass gives the weights of all their
    trajectories. Transforms that compare weights see the whole window, on all processes.

    Args:
        loss: Loss whose transforms weigh.
        dataset: Trajectories, with ``ref_log_prob``.
        plan: Entries of each update.

    Attributes:
        until: The first update whose weights are not known.
        clip_fraction: Share of the window whose weight a clip changed.
    """

    def __init__(
        self, loss: ImportanceWeightedMLE, dataset: TrajectoryDataset, plan: UpdatePlan
    ) -> None:
        self._loss = loss
        self._dataset = dataset
        self._plan = plan
        self._weights = torch.ones(len(dataset.trajectories), dtype=torch.float32)
        self.until = 0
        self.clip_fraction = torch.nan

    @torch.no_grad()
    def weigh(self, updates: range, log_prob: LogProb) -> None:
        """Weigh the trajectories of a window.

        Args:
            updates: Numbers of the updates of the window.
            log_prob: From batches to log q of their tokens, ``[N]`` in the layout of all
                trajectories.

        Raises:
            OverflowError: A weight is beyond float32.
        """
        batches = [
            self._dataset.positions(batch)
            for update in updates
            for batch in self._plan.update(update)
        ]
        drawn = torch.tensor([*chain.from_iterable(batches)])
        trajectories, multiplicity = drawn.unique(return_counts=True)
        window = select(self._dataset.trajectories, trajectories)
        window.set(MULTIPLICITY, multiplicity.repeat_interleave(lengths(window)))
        log_q = log_prob(batches).to("cpu", torch.float32)
        place = window.get(PLACE)
        segments = self._loss.segments(window)
        share = self._loss.share(window, segments)
        weights = self._loss.weigh(window, log_q[place], segments=segments, share=share)
        self._weights[place] = exponential(weights.log_weight)
        self.clip_fraction = float((share * weights.clipped).sum() / share.sum())
        self.until = updates.stop

    def write(self, batch: TensorDictBase) -> None:
        """Write ``importance_weight`` into a batch of the window."""
        batch.set(IMPORTANCE_WEIGHT, self._weights[batch.get(PLACE)])

    def state_dict(self) -> dict[str, Tensor | int | float]:
        """Weights of the window, and its end."""
        return {
            "weights": self._weights,
            "until": self.until,
            "clip_fraction": self.clip_fraction,
        }

    def load_state_dict(self, state: dict[str, Tensor | int | float]) -> None:
        """Restore :meth:`state_dict`, also in the middle of a window."""
        self._weights.copy_(torch.as_tensor(state["weights"]))
        self.until = int(state["until"])
        self.clip_fraction = float(state["clip_fraction"])
