"""Micro-batches by the numbers of their entries, for a plan, a sweep and a DataLoader."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torch.utils.data import Dataset

from iwsft.language.collator import Layout, TrajectoryDataset, collate
from iwsft.language.plan import uncounted
from iwsft.trajectory import MULTIPLICITY

# Where a token stands in the packed trajectories.
PLACE: NestedKey = ("collector", "place")


class Entries(Dataset[TensorDictBase]):
    """The entries of a :class:`TrajectoryDataset`, and those that count for nothing.

    Each token carries its place in the packed trajectories, :data:`PLACE`.

    Args:
        trajectories: packed, see ``iwsft.datasets.text.tokens``; a shallow copy is held.
    """

    def __init__(self, trajectories: TensorDictBase) -> None:
        self.trajectories = trajectories.copy()
        self.trajectories.set(PLACE, torch.arange(len(trajectories)))
        self._dataset = TrajectoryDataset(self.trajectories)

    def __len__(self) -> int:
        return len(self._dataset)

    @property
    def sizes(self) -> Tensor:
        """Tokens of each entry, int64 ``[len(self)]``."""
        return self._dataset.sizes

    def trajectory(self, number: int) -> int:
        """The trajectory of an entry, counted from 0; of an uncounted one too."""
        return self._dataset.trajectory(number if number >= 0 else uncounted(number))

    def __getitem__(self, number: int) -> TensorDictBase:
        """Entry ``number``, one trajectory; a negative number is that of an uncounted entry."""
        if number >= 0:
            return self._dataset[number]
        steps = self._dataset[uncounted(number)].copy()
        steps.set(MULTIPLICITY, torch.zeros(len(steps), dtype=torch.int64))
        return steps


@dataclass(frozen=True)
class MicroBatches:
    """Entries by number -> a batch.

    Attributes:
        entries: what is numbered.
        layout: ``"padded"`` or ``"packed"``.
        pad_token_id: token in the padding.
        multiple_of: of the padded length.
    """

    entries: Entries
    layout: Layout
    pad_token_id: int
    multiple_of: int

    def __call__(self, numbers: Sequence[int]) -> TensorDict:
        """The batch of these entries."""
        return self.of([self.entries[number] for number in numbers])

    def of(self, examples: Sequence[TensorDictBase]) -> TensorDict:
        """The batch of these examples: a DataLoader's ``collate_fn``."""
        return collate(
            examples,
            layout=self.layout,
            pad_token_id=self.pad_token_id,
            multiple_of=self.multiple_of,
        )
