"""Which trajectories stand together in a batch, epoch by epoch, without replacement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.utils.data import Sampler

from iwsft.language.collator import Layout, TrajectoryDataset, collate


class EpochBatches(Sampler[list[int]]):
    """Batches of numbers for a DataLoader's ``batch_sampler``: each epoch holds every entry once.

    The order of an epoch hangs on the seed and the epoch alone. An iterator ends with its epoch and
    starts where the last one stood, at first with epoch 0; the state counts batches handed out,
    which a DataLoader with workers fetches ahead. The last batch of an epoch may be smaller.

    Args:
        sizes: tokens of each entry, int64 ``[n]``.
        batch_size: entries of a batch; this, or ``token_budget``.
        token_budget: tokens of a batch at most, padding included where ``padded``; entries are
            taken in the order of the epoch as long as they fit.
        padded: whether the entries of a batch are padded to the longest.
        multiple_of: of the padded length.
        seed: of the order.

    Raises:
        ValueError: not one of ``batch_size`` and ``token_budget``, one below 1, no entry, or an
            entry larger than the budget.
    """

    def __init__(
        self,
        sizes: Tensor,
        *,
        batch_size: int | None = None,
        token_budget: int | None = None,
        padded: bool = False,
        multiple_of: int = 1,
        seed: int = 0,
    ) -> None:
        if (batch_size is None) == (token_budget is None):
            raise ValueError(
                "a batch is as large as batch_size or as token_budget says; pass one of them "
                f"(batch_size={batch_size}, token_budget={token_budget})"
            )
        for name, value in (("batch_size", batch_size), ("token_budget", token_budget)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if len(sizes) == 0:
            raise ValueError("there is not a single entry to draw from")
        self._sizes = -(-sizes // multiple_of) * multiple_of if padded else sizes
        if token_budget is not None and int(self._sizes.max()) > token_budget:
            entry = int(self._sizes.argmax())
            raise ValueError(
                f"entry {entry} has {int(sizes[entry])} tokens, more than token_budget="
                f"{token_budget}; raise it, or tokenise with max_length={token_budget}"
            )
        self.batch_size = batch_size
        self.token_budget = token_budget
        self.padded = padded
        self.seed = seed
        self.epoch = 0
        self._handed_out = 0

    def set_epoch(self, epoch: int) -> None:
        """Start epoch ``epoch`` from its first batch, unless it is under way."""
        if epoch != self.epoch:
            self.epoch, self._handed_out = epoch, 0

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.of(self.epoch)
        last = len(batches) - 1
        for number in range(self._handed_out, len(batches)):
            # Before it is handed out, so that the state is always that of the next batch.
            self._handed_out = 0 if number == last else number + 1
            self.epoch += number == last
            yield batches[number]

    def __len__(self) -> int:
        """Batches of the current epoch, all of them."""
        if self.batch_size is not None:
            return -(-len(self._sizes) // self.batch_size)
        return len(self.of(self.epoch))

    def state_dict(self) -> dict[str, Any]:
        """Where the draws stand; batches that load it go on from here."""
        return {"epoch": self.epoch, "handed_out": self._handed_out, **self._settings()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`.

        Raises:
            ValueError: the state of batches over other data or with other settings.
        """
        for name, value in self._settings().items():
            if state_dict[name] != value:
                raise ValueError(
                    f"this state belongs to batches with {name}={state_dict[name]}, these have "
                    f"{name}={value}; resume with the data and settings of the first run"
                )
        self.epoch, self._handed_out = state_dict["epoch"], state_dict["handed_out"]

    def _settings(self) -> dict[str, Any]:
        return {
            "entries": len(self._sizes),
            "tokens": int(self._sizes.sum()),
            "batch_size": self.batch_size,
            "token_budget": self.token_budget,
            "padded": self.padded,
            "seed": self.seed,
        }

    def of(self, epoch: int) -> list[list[int]]:
        """All batches of an epoch."""
        generator = torch.Generator().manual_seed(self._epoch_seed(epoch))
        order = torch.randperm(len(self._sizes), generator=generator).tolist()
        if self.batch_size is not None:
            return [
                order[at : at + self.batch_size] for at in range(0, len(order), self.batch_size)
            ]
        sizes = self._sizes.tolist()
        batches: list[list[int]] = []
        batch: list[int] = []
        for entry in order:
            if batch and self._tokens([*batch, entry], sizes) > (self.token_budget or 0):
                batches.append(batch)
                batch = []
            batch.append(entry)
        return [*batches, batch]

    def _tokens(self, batch: list[int], sizes: list[int]) -> int:
        each = [sizes[entry] for entry in batch]
        return max(each) * len(each) if self.padded else sum(each)

    def _epoch_seed(self, epoch: int) -> int:
        # A seed of its own for each epoch, so that any epoch can be started alone.
        generator = torch.Generator().manual_seed(self.seed)
        return int(torch.randint(2**62, (epoch + 1,), generator=generator)[-1])


class EpochSampler:
    """Endless iterator over collated batches: epochs without replacement, as SFT users expect.

    An epoch holds each trajectory as often as its multiplicity says. Draws with replacement are
    those of ``iwsft.samplers.TrajectorySampler``, which takes token trajectories as they are.

    Args:
        trajectories: packed, see ``iwsft.datasets.text.tokens``; held by reference.
        batch_size: draws of a batch; this, or ``token_budget``.
        token_budget: tokens of a batch at most, see :class:`EpochBatches`.
        layout: ``"padded"`` or ``"packed"``, see :func:`~iwsft.language.collator.collate`.
        pad_token_id: token in the padding.
        multiple_of: of the padded length.
        seed: of the order.
    """

    def __init__(
        self,
        trajectories: TensorDictBase,
        batch_size: int | None = None,
        *,
        token_budget: int | None = None,
        layout: Layout = "padded",
        pad_token_id: int = 0,
        multiple_of: int = 8,
        seed: int = 0,
    ) -> None:
        self.dataset = TrajectoryDataset(trajectories)
        self.layout: Layout = layout
        self.pad_token_id = pad_token_id
        self.multiple_of = multiple_of
        self.batches = EpochBatches(
            self.dataset.sizes,
            batch_size=batch_size,
            token_budget=token_budget,
            padded=layout == "padded",
            multiple_of=multiple_of,
            seed=seed,
        )
        self._iterator = iter(self.batches)

    @property
    def epoch(self) -> int:
        """The epoch of the next batch."""
        return self.batches.epoch

    def sample(self) -> TensorDict:
        """The next batch."""
        numbers = next(self._iterator, None)
        if numbers is None:
            self._iterator = iter(self.batches)
            numbers = next(self._iterator)
        return collate(
            [self.dataset[number] for number in numbers],
            layout=self.layout,
            pad_token_id=self.pad_token_id,
            multiple_of=self.multiple_of,
        )

    def __iter__(self) -> Iterator[TensorDict]:
        return self

    def __next__(self) -> TensorDict:
        return self.sample()

    def state_dict(self) -> dict[str, Any]:
        """Where the draws stand; a sampler that loads it draws the same batches from here on."""
        return self.batches.state_dict()

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; see :meth:`EpochBatches.load_state_dict`."""
        self.batches.load_state_dict(state_dict)
        self._iterator = iter(self.batches)
