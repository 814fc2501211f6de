"""Which entries an update of a training run holds, on any number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import Sampler

from iwsft.language.batches import EpochBatches

if TYPE_CHECKING:
    from iwsft.language.config import ImportanceWeightedConfig


class UpdatePlan(Sampler[list[int]]):
    """The micro-batches of every update, known beforehand and the same on every process.

    An update takes ``accumulation * processes`` micro-batches in the order of ``batches``; process
    r runs every ``processes``-th of them from the r-th on. So it holds the same entries however it
    is divided. All epochs have the same number of micro-batches, a multiple of the processes; where
    an epoch has fewer, they are split, or filled up by empty ones. The run has at least ``epochs``
    epochs. As a DataLoader's ``batch_sampler`` it yields the micro-batches of this process.
    """

    def __init__(
        self,
        batches: EpochBatches,
        accumulation: int,
        *,
        processes: int,
        process: int,
        epochs: int,
    ) -> None:
        self.batches = batches
        self.accumulation = accumulation
        self.processes = processes
        self.process = process
        # With a budget of tokens, epochs differ in the number of their batches.
        self._varies = batches.token_budget is not None
        most = max(len(batches.of(epoch)) for epoch in range(epochs if self._varies else 1))
        self._number = math.ceil(most / processes) * processes
        self._epoch = 0
        self._cached: tuple[int, list[list[int]]] | None = None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that the next iterator yields."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.epoch(self._epoch)[self.process :: self.processes])

    def __len__(self) -> int:
        """Micro-batches of an epoch on each process."""
        return self._number // self.processes

    @property
    def updates(self) -> int:
        """Updates of an epoch; the last may accumulate fewer micro-batches."""
        return math.ceil(len(self) / self.accumulation)

    def epoch(self, epoch: int) -> list[list[int]]:
        """The micro-batches of an epoch on all processes; process r runs ``[r::processes]``."""
        if self._cached is None or self._cached[0] != epoch:
            self._cached = epoch, self._filled(self.batches.of(epoch))
        return self._cached[1]

    def update(self, number: int) -> list[list[int]]:
        """The micro-batches of update ``number``, from 0 over all epochs, on all processes."""
        epoch, within = divmod(number, self.updates)
        width = self.accumulation * self.processes
        return self.epoch(epoch)[within * width : (within + 1) * width]

    def settings(self) -> dict[str, Any]:
        """Everything that determines the plan, for checkpoints."""
        return {
            **self.batches.settings(),
            "accumulation": self.accumulation,
            "processes": self.processes,
            "micro_batches": self._number,
        }

    def _filled(self, batches: list[list[int]]) -> list[list[int]]:
        assert len(batches) <= self._number, "an epoch is beyond those of the plan"
        # If those of the last update suffice, every update holds what it holds on one process.
        width = self.accumulation * self.processes
        for start in ((len(batches) - 1) // width * width, 0):
            while len(batches) < self._number:
                place = max(range(start, len(batches)), key=lambda i: (len(batches[i]), i))
                entries = batches[place]
                if len(entries) == 1:
                    break
                half = len(entries) // 2
                batches[place : place + 1] = [entries[:half], entries[half:]]
            if not self._varies:
                break
        return batches + [[] for _ in range(self._number - len(batches))]


def plan_updates(
    sizes: Tensor, args: ImportanceWeightedConfig, *, processes: int, process: int
) -> UpdatePlan:
    """The plan of a training run over entries of these sizes, see :class:`UpdatePlan`."""
    batches = EpochBatches(
        sizes,
        batch_size=None if args.token_budget else args.per_device_train_batch_size,
        token_budget=args.token_budget,
        padded=args.layout == "padded",
        multiple_of=args.pad_to_multiple_of,
        seed=args.seed if args.data_seed is None else args.data_seed,
    )
    accumulation = args.gradient_accumulation_steps
    plan_of = partial(UpdatePlan, batches, accumulation, processes=processes, process=process)
    epochs = max(1, math.ceil(args.num_train_epochs))
    plan = plan_of(epochs=epochs)
    while args.max_steps > plan.updates * epochs:
        epochs = math.ceil(args.max_steps / plan.updates)
        plan = plan_of(epochs=epochs)
    return plan
