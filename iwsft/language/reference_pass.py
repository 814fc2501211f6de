"""Which batches the pass over all trajectories runs, on which process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from tensordict import TensorDictBase
from torch import Tensor

from iwsft.language.batches import TrajectoryDataset
from iwsft.trajectory import ASSISTANT_MASK, ATTENTION_MASK, TOKENS, TRAJ_IDS, lengths, steps_of

# Tokens of a batch where none is given as a measure.
_BATCH_TOKENS = 8192


@dataclass(frozen=True)
class Pass:
    """Which batches run in which order, on which process.

    Attributes:
        dataset: the trajectories, each an entry.
        ids: int64 ``[N]``, of the tokens' trajectories.
        sizes: int64, tokens of each trajectory.
        batches: trajectories of each batch and, in their order, those that are new in it.
        rank: of this process.
        world: number of processes.
    """

    dataset: TrajectoryDataset
    ids: Tensor
    sizes: Tensor
    batches: tuple[tuple[list[int], list[int]], ...]
    rank: int
    world: int

    @classmethod
    def of(
        cls,
        trajectories: TensorDictBase,
        batches: Sequence[Sequence[int]],
        *,
        rank: int,
        world: int,
    ) -> Pass:
        """Plan the pass: the given batches that hold something new, then what stands in none.

        Args:
            trajectories: packed.
            batches: of entries, see :func:`~iwsft.language.reference.annotate_tokens`.
            rank: of this process.
            world: number of processes.

        Raises:
            ValueError: trajectories that are not packed, or an entry that is not there.
        """
        if trajectories.batch_dims != 1:
            raise ValueError(
                "the trajectories must be packed, one batch dimension over all tokens; these have "
                f"batch size {list(trajectories.batch_size)}"
            )
        drawn = TrajectoryDataset(trajectories)
        each = trajectories.select(TOKENS, ATTENTION_MASK, ASSISTANT_MASK, TRAJ_IDS)
        sizes = lengths(each).cpu()
        given = [_trajectories(batch, drawn, number) for number, batch in enumerate(batches)]
        seen: set[int] = set()
        needed = []
        for batch in (*given, *_left_over(given, sizes.tolist())):
            new = [trajectory for trajectory in batch if trajectory not in seen]
            if new:
                needed.append((batch, new))
                seen.update(new)
        ids = trajectories.get(TRAJ_IDS).cpu()
        return cls(TrajectoryDataset(each), ids, sizes, tuple(needed), rank, world)

    @property
    def rounds(self) -> int:
        """In a round each process runs a batch."""
        return math.ceil(len(self.batches) / self.world)

    def mine(self, number: int) -> tuple[list[int], list[int]]:
        """This process's batch of a round; where there is none, another with nothing new."""
        place = number * self.world + self.rank
        if place < len(self.batches):
            return self.batches[place]
        return self.batches[-1][0], []

    def tokens(self, start: int, stop: int) -> Tensor:
        """Places in the packed trajectories of the new tokens of some rounds, in their order."""
        batches = self.batches[start * self.world : stop * self.world]
        order = [trajectory for _, new in batches for trajectory in new]
        return steps_of(self.sizes, torch.tensor(order, dtype=torch.int64))


def _trajectories(batch: Sequence[int], drawn: TrajectoryDataset, number: int) -> list[int]:
    """The distinct trajectories of a batch of entries, in their order."""
    if max(batch, default=0) >= len(drawn):
        raise ValueError(
            f"batch {number} holds {max(batch)}; entries run from 0 to "
            f"{len(drawn) - 1}, each trajectory as often as its multiplicity says"
        )
    return sorted({drawn.trajectory(entry) for entry in batch})


def _left_over(given: Sequence[list[int]], sizes: list[int]) -> Iterator[list[int]]:
    """Batches of the trajectories in none, no larger than the largest given one."""
    held = {trajectory for batch in given for trajectory in batch}
    left = sorted(set(range(len(sizes))) - held, key=lambda trajectory: -sizes[trajectory])
    room = max((sum(sizes[t] for t in batch) for batch in given), default=_BATCH_TOKENS)
    while left:
        # The longest first, so a batch is of nearly equal lengths.
        number = max(1, room // sizes[left[0]])
        yield sorted(left[:number])
        left = left[number:]
