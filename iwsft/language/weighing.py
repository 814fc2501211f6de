"""The weights of coming updates, from one forward sweep over their trajectories."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

import torch
from tensordict import TensorDictBase
from torch import Tensor

from iwsft.language.batches import PLACE, TrajectoryDataset
from iwsft.language.plan import UpdatePlan
from iwsft.objective import ImportanceWeightedMLE
from iwsft.trajectory import IMPORTANCE_WEIGHT, MULTIPLICITY, lengths, select
from iwsft.weights import exponential

# log-probs per token of the trajectories in some batches, all processes' results together.
Sweep = Callable[[list[list[int]]], Tensor]


class Weigher:
    """Keeps the weights of the updates that come next, and writes them into their batches.

    Within a window of updates q stands still, so one forward sweep gives the weights of all of its
    trajectories, and no second model is needed. Transforms that look at a batch
    (self-normalisation, a target ESS) see all draws of the window, on all processes.

    Args:
        loss: with ``proposal="cached"``; its keys and transforms are used.
        entries: the trajectories, with ``ref_log_prob``.
        plan: which entries an update holds.
    """

    def __init__(
        self, loss: ImportanceWeightedMLE, entries: TrajectoryDataset, plan: UpdatePlan
    ) -> None:
        self._loss = loss
        self._entries = entries
        self._plan = plan
        self._sizes = lengths(entries.trajectories)
        self._weights = torch.ones(len(entries.trajectories), dtype=torch.float32)
        self.clip_fraction = torch.nan
        self.until = 0
        """The first update whose weights are not known."""

    @torch.no_grad()
    def weigh(self, updates: range, sweep: Sweep) -> None:
        """Weigh the trajectories of some updates.

        Args:
            updates: numbers of the updates, those that come next.
            sweep: log q of the tokens of the trajectories in some batches, ``[N]`` in the layout of
                all trajectories; tokens of others are not looked at.

        Raises:
            OverflowError: weights beyond float32.
        """
        batches = [batch for update in updates for batch in self._plan.update(update)]
        draws = self._draws(batches)
        log_q = sweep(self._needed(batches)).to("cpu", torch.float32)
        chosen = torch.tensor(sorted(draws))
        window = select(self._entries.trajectories, chosen)
        each = torch.tensor([draws[trajectory] for trajectory in chosen.tolist()])
        window.set(MULTIPLICITY, each.repeat_interleave(self._sizes[chosen]))
        segments = self._loss.segments(window)
        share = self._loss.share(window, segments)
        place = window.get(PLACE)
        log_weight, clipped = self._loss.weigh(window, log_q[place], segments=segments, share=share)
        self._weights[place] = exponential(log_weight)
        self.clip_fraction = float((share * clipped).sum() / share.sum())
        self.until = updates.stop

    def write(self, batch: TensorDictBase) -> None:
        """Write ``importance_weight`` into a batch of the window."""
        batch.set(IMPORTANCE_WEIGHT, self._weights[batch.get(PLACE)])

    def state_dict(self) -> dict[str, Tensor | int | float]:
        """The kept weights, and until when they hold."""
        return {
            "weights": self._weights,
            "until": self.until,
            "clip_fraction": self.clip_fraction,
        }

    def load_state_dict(self, state: dict[str, Tensor | int | float]) -> None:
        """Restore :meth:`state_dict`, in mid-window too."""
        self._weights.copy_(torch.as_tensor(state["weights"]))
        self.until = int(state["until"])
        self.clip_fraction = float(state["clip_fraction"])

    def _draws(self, batches: Iterable[list[int]]) -> Counter[int]:
        """How often each trajectory is drawn."""
        return Counter(self._entries.trajectory(entry) for batch in batches for entry in batch)

    def _needed(self, batches: list[list[int]]) -> list[list[int]]:
        """The batches that hold a trajectory for the first time, with those beside them."""
        seen: set[int] = set()
        needed: list[list[int]] = []
        for start in range(0, len(batches), self._plan.processes):
            # All processes run or none, for sharded models gather parameters together.
            beside = batches[start : start + self._plan.processes]
            held = {self._entries.trajectory(entry) for batch in beside for entry in batch}
            if not held <= seen:
                needed += beside
                seen |= held
        return needed
