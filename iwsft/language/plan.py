"""Which rows stand together in which update of a training run, on any number of processes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from iwsft.language.batches import EpochBatches

if TYPE_CHECKING:
    from iwsft.language.config import ImportanceWeightedConfig


def uncounted(entry: int) -> int:
    """The number that stands for ``entry`` where it is computed, but counts for nothing.

    It is negative, and its own inverse: ``uncounted(uncounted(entry)) == entry``.
    """
    return -1 - entry


class Plan:
    """The micro-batches of every update, known beforehand and the same on every process.

    An update takes ``accumulation * processes`` micro-batches in the order of
    :class:`~iwsft.language.batches.EpochBatches`; process r runs every ``processes``-th of them
    from the r-th on. So an update holds the same entries however its size is made up: of large
    batches, of small ones that are accumulated, or of several processes. All epochs have the same
    number of micro-batches, a multiple of the processes: where entries run short, micro-batches are
    split, and then an entry is computed again with no share in the loss (:func:`uncounted`).

    Args:
        batches: entries of a micro-batch, epoch by epoch.
        accumulation: micro-batches of a process in an update.
        processes: how many run side by side.
        epochs: the least number of epochs that will be trained, at least 1.
    """

    def __init__(
        self, batches: EpochBatches, *, accumulation: int, processes: int, epochs: int
    ) -> None:
        self.batches = batches
        self.accumulation = accumulation
        self.processes = processes
        # With a budget of tokens, epochs differ in the number of their batches.
        most = max(len(batches.of(epoch)) for epoch in range(epochs if self._varies else 1))
        self._number = math.ceil(most / processes) * processes
        self._kept: tuple[int, list[list[int]]] | None = None

    @property
    def _varies(self) -> bool:
        return self.batches.token_budget is not None

    @property
    def steps(self) -> int:
        """Micro-batches of an epoch on each process."""
        return self._number // self.processes

    @property
    def updates(self) -> int:
        """Updates of an epoch; the last may accumulate fewer micro-batches."""
        return math.ceil(self.steps / self.accumulation)

    def epoch(self, epoch: int) -> list[list[int]]:
        """The micro-batches of an epoch, of all processes; process r runs ``[r::processes]``.

        Raises:
            ValueError: an epoch with more micro-batches than those that the plan was made for.
        """
        if self._kept is None or self._kept[0] != epoch:
            self._kept = epoch, self._filled(self.batches.of(epoch), epoch)
        return self._kept[1]

    def update(self, number: int) -> list[list[int]]:
        """The micro-batches of update ``number``, counted from 0 over all epochs.

        Of all processes; process r runs ``[r::processes]``.
        """
        epoch, within = divmod(number, self.updates)
        width = self.accumulation * self.processes
        return self.epoch(epoch)[within * width : (within + 1) * width]

    def settings(self) -> dict[str, Any]:
        """What the plan hangs on, for checkpoints."""
        held = self.batches.state_dict()
        return {
            **{name: value for name, value in held.items() if name not in ("epoch", "handed_out")},
            "accumulation": self.accumulation,
            "processes": self.processes,
            "micro_batches": self._number,
        }

    def _filled(self, batches: list[list[int]], epoch: int) -> list[list[int]]:
        if len(batches) > self._number:
            raise ValueError(
                f"epoch {epoch} has {len(batches)} micro-batches, the plan is for {self._number}: "
                "train for more epochs from the start, or use batch_size in place of token_budget"
            )
        # Within the last update, where they are enough: then every update holds what it would hold
        # on one process.
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
        lacking = self._number - len(batches)
        return batches + [[uncounted(batches[-1][0])]] * lacking


class ProcessBatches(Sampler[list[int]]):
    """The micro-batches of one process, epoch by epoch: a DataLoader's ``batch_sampler``.

    Args:
        plan: of all processes.
        process: which of them.
    """

    def __init__(self, plan: Plan, process: int) -> None:
        self._plan = plan
        self._process = process
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iterator goes through."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._plan.epoch(self._epoch)[self._process :: self._plan.processes])

    def __len__(self) -> int:
        return self._plan.steps


class PlannedLoader(DataLoader[Any]):
    """A DataLoader whose batch sampler hears of epochs."""

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next iterator goes through."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]


def planned(sizes: Tensor, args: ImportanceWeightedConfig, processes: int) -> Plan:
    """The plan of a run with these settings.

    Args:
        sizes: tokens of each entry.
        args: of the run.
        processes: how many run side by side.
    """
    batches = EpochBatches(
        sizes,
        batch_size=None if args.token_budget else args.per_device_train_batch_size,
        token_budget=args.token_budget,
        padded=args.layout == "padded",
        multiple_of=args.pad_to_multiple_of,
        seed=args.seed if args.data_seed is None else args.data_seed,
    )
    shape = {"accumulation": args.gradient_accumulation_steps, "processes": processes}
    epochs = max(1, math.ceil(args.num_train_epochs))
    plan = Plan(batches, epochs=epochs, **shape)
    while args.max_steps > plan.updates * epochs:
        epochs = math.ceil(args.max_steps / plan.updates)
        plan = Plan(batches, epochs=epochs, **shape)
    return plan
