"""Minibatches in which every trajectory is drawn in proportion to its multiplicity."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from iwsft.fingerprint import fingerprint
from iwsft.trajectory import (
    ACTION,
    DATA_WEIGHT,
    DONE,
    IMPORTANCE_WEIGHT,
    MASK,
    MULTIPLICITY,
    NEXT_OBSERVATION,
    OBSERVATION,
    REF_LOG_PROB,
    REWARD,
    TERMINATED,
    TOKENS,
    TRAJ_IDS,
    Segments,
    lengths,
    per_trajectory,
    steps_of,
)
from iwsft.validation import check_count, check_links, check_multiplicity, check_packed

# What a critic learns from.
TRANSITION: tuple[NestedKey, ...]
TRANSITION = (OBSERVATION, ACTION, NEXT_OBSERVATION, REWARD, DONE, TERMINATED)
_NEXT = "next"


class _Sampler(ABC):
    """Endless iterator over batches of one packed dataset, which each batch reads anew.

    Lengths and multiplicities are read once.
    """

    def __init__(
        self, trajectories: TensorDictBase, batch_size: int = 256, *, seed: int = 0
    ) -> None:
        check_count("batch_size", batch_size)
        check_packed(trajectories)
        check_links(trajectories)
        self.trajectories = trajectories
        self.batch_size = batch_size
        self.seed = seed
        # On the host, so that a seed means the same on any device.
        self._generator = torch.Generator().manual_seed(seed)
        self._lengths = lengths(trajectories).cpu()
        self._multiplicity = multiplicities(trajectories, self._lengths)
        self._tickets = self._multiplicity.cumsum(0)
        # Now, as syncs may write reference log-probs later.
        self._computed = self._sum_computed()

    @abstractmethod
    def sample(self) -> TensorDictBase:
        """Draw the next batch."""

    @property
    def device(self) -> torch.device:
        """Device of the trajectories."""
        device: torch.device = self.trajectories.get(TRAJ_IDS).device
        return device

    def __iter__(self) -> Iterator[TensorDictBase]:
        return self

    def __next__(self) -> TensorDictBase:
        return self.sample()

    def state_dict(self) -> dict[str, Any]:
        """Return the state; a sampler that loads it continues with the same batches."""
        return {"generator": self._generator.get_state(), **self._settings()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore :meth:`state_dict`; other trajectories or another batch size are refused."""
        check_same_settings(state_dict, self._settings())
        self._generator.set_state(state_dict["generator"].cpu())

    def _settings(self) -> dict[str, Any]:
        return {
            "class": type(self).__name__,
            "batch_size": self.batch_size,
            "trajectories": len(self._lengths),
            "steps": int(self._lengths.sum()),
            "multiplicity": int(self._tickets[-1]),
            "multiplicities": fingerprint({"": self._tickets})[:12],
            "data": self._data,
            **self._computed,
        }

    @cached_property
    def _data(self) -> str:
        """Fingerprint of what was observed, done and received, and of the mask."""
        entries = self._entries((*TRANSITION, TOKENS, MASK))
        return fingerprint({str(key): entry for key, entry in entries.items()})[:12]

    def _sum_computed(self) -> dict[str, float]:
        """A number for each computed entry, of which machines differ in the last digits."""
        numbers = {}
        entries = self._entries((DATA_WEIGHT, IMPORTANCE_WEIGHT, REF_LOG_PROB))
        # Without data weights they are 1: a state of data that have none refuses others.
        entries = {DATA_WEIGHT: torch.ones(len(self.trajectories)), **entries}
        for key, entry in entries.items():
            # NaN of masked steps does not equal itself.
            squares = (1 + entry.double().flatten().nan_to_num()).square()
            place = torch.arange(1, len(squares) + 1, device=squares.device)
            numbers[str(key)] = float((place * squares).sum())
        return numbers

    def _entries(self, keys: Sequence[NestedKey]) -> dict[NestedKey, Tensor]:
        present = self.trajectories.keys(True, True)
        return {key: self.trajectories.get(key) for key in keys if key in present}

    def _draw(self) -> Tensor:
        """Draw the positions of ``batch_size`` trajectories with replacement, in exact integers."""
        total = int(self._tickets[-1])
        ticket = torch.randint(total, (self.batch_size,), generator=self._generator)
        return torch.searchsorted(self._tickets, ticket, right=True)

    def _gather(self, steps: Tensor, *without: NestedKey) -> TensorDictBase:
        """All entries of the steps but ``next``, multiplicities and those of ``without``."""
        entries = self.trajectories.exclude(_NEXT, MULTIPLICITY, *without)
        return _take(entries, steps.to(self.device))


class TrajectorySampler(_Sampler):
    """Draws whole trajectories; a batch contains each distinct one once.

    A batch of the paper is ``batch_size`` trajectories, drawn with replacement. This sampler packs
    the distinct ones, in the order of the data, with the number of draws as ``multiplicity``
    (int64 per step). Loss and gradient are the same, for less work. A batch has ids, mask and
    ``("next", "done")``, which tells neighbours with equal ids apart.
    """

    def sample(self) -> TensorDictBase:
        """Draw the next batch: packed, with ``multiplicity``, which adds up to ``batch_size``."""
        positions, draws = torch.unique(self._draw(), return_counts=True)
        steps = steps_of(self._lengths, positions)
        batch = self._gather(steps)
        for key, done in self._entries((DONE,)).items():
            batch.set(key, done.index_select(0, steps.to(done.device)))
        multiplicity = draws.repeat_interleave(self._lengths[positions])
        batch.set(MULTIPLICITY, multiplicity.to(batch.get(TRAJ_IDS).device))
        return batch


class _StepSampler(_Sampler):
    """Draws a number of steps; a CUDA graph reads at positions that are drawn outside of it."""

    @abstractmethod
    def draw(self) -> Tensor:
        """Draw the positions of the next batch's steps, int64 ``[batch_size]`` on the host."""

    @abstractmethod
    def take(self, steps: Tensor) -> TensorDictBase:
        """Read the batch of these positions, which are on the device of the trajectories."""

    def sample(self) -> TensorDictBase:
        """Draw the next batch: ``[batch_size]`` steps."""
        # The host does not wait for the device that it copies to.
        return self.take(self.draw().to(self.device, non_blocking=True))

    @property
    def cuts_trajectories(self) -> bool:
        """Whether a batch has parts of trajectories."""
        return bool((self._lengths > 1).any())


class StepSampler(_StepSampler):
    """Draws single steps: a trajectory, then one of its valid steps, uniformly.

    The expected loss and gradient are those of the length-normalised loss over whole trajectories,
    as long as a step's weight does not depend on the rest of the batch (cached weights, SFT).
    Trajectories that are drawn must have a valid step.
    """

    def __init__(
        self, trajectories: TensorDictBase, batch_size: int = 1024, *, seed: int = 0
    ) -> None:
        super().__init__(trajectories, batch_size, seed=seed)
        segments = Segments.of(trajectories)
        valid = segments.valid.cpu()
        self._positions = None if bool(valid.all()) else valid.nonzero().squeeze(-1)
        self._choices = segments.lengths[: len(self._lengths)].long().cpu()
        self._starts = self._choices.cumsum(0) - self._choices
        empty = ((self._choices == 0) & (self._multiplicity > 0)).nonzero()
        if len(empty):
            raise ValueError(f"trajectory {int(empty[0])} has every step masked; drop it")

    def draw(self) -> Tensor:
        positions = self._draw()
        uniform = torch.rand(self.batch_size, generator=self._generator, dtype=torch.float64)
        steps = self._starts[positions] + (uniform * self._choices[positions]).long()
        if self._positions is not None:
            steps = self._positions[steps]
        return steps

    def take(self, steps: Tensor) -> TensorDictBase:
        # Each is a trajectory of length 1, all are valid, and each counts once.
        batch = self._gather(steps, MASK, TRAJ_IDS)
        batch.set(TRAJ_IDS, torch.arange(self.batch_size, device=steps.device))
        return batch


class TransitionSampler(_StepSampler):
    """Draws single transitions with entries ``keys``, all with the same probability."""

    def __init__(
        self,
        trajectories: TensorDictBase,
        batch_size: int = 256,
        *,
        seed: int = 0,
        keys: Sequence[NestedKey] = TRANSITION,
    ) -> None:
        super().__init__(trajectories, batch_size, seed=seed)
        self.keys = tuple(keys)
        missing = [key for key in keys if key not in trajectories.keys(True)]
        if missing:
            raise KeyError(f"{', '.join(map(repr, missing))} is missing in the trajectories")
        valid = Segments.of(trajectories).valid.cpu()
        # A step of a trajectory that counts twice has two tickets.
        tickets = self._multiplicity.repeat_interleave(self._lengths) * valid
        self._total = int(tickets.sum())
        if self._total == 0:
            raise ValueError("there is no step to draw: every step is masked")
        self._until = None if bool((tickets == 1).all()) else tickets.cumsum(0)

    def draw(self) -> Tensor:
        steps = torch.randint(self._total, (self.batch_size,), generator=self._generator)
        if self._until is not None:
            steps = torch.searchsorted(self._until, steps, right=True)
        return steps

    def take(self, steps: Tensor) -> TensorDictBase:
        return _take(self.trajectories.select(*self.keys), steps)

    def _settings(self) -> dict[str, Any]:
        return {"keys": sorted(map(str, self.keys)), **super()._settings()}


def check_same_settings(state_dict: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Check that a sampler's state was saved with these settings; a ValueError names another."""
    for name, value in settings.items():
        # A state of an earlier release has fewer entries.
        stored = state_dict.get(name, value)
        # Computed entries are floats.
        alike = isinstance(value, float) and math.isclose(stored, value, rel_tol=1e-4)
        if stored != value and not alike:
            other = f"this state is of a sampler with {name}={stored}, not {value}"
            raise ValueError(f"{other}; resume with the data and settings of the first run")


def multiplicities(trajectories: TensorDictBase, sizes: Tensor) -> Tensor:
    """Return the multiplicity of each trajectory, int64 ``[n]`` on the host; 1 without any.

    They must be whole numbers from 0 on, not all 0.
    """
    stored = trajectories.get(MULTIPLICITY, default=None)
    if stored is None:
        return torch.ones_like(sizes)
    check_multiplicity(stored, Segments.of(trajectories), repr(MULTIPLICITY))
    multiplicity = per_trajectory(trajectories, MULTIPLICITY).cpu().long()
    if int(multiplicity.sum()) == 0:
        raise ValueError(f"{MULTIPLICITY!r} is 0 for every trajectory")
    return multiplicity


def _take(entries: TensorDictBase, steps: Tensor) -> TensorDictBase:
    """Copy the steps at these positions."""
    # index_select copies whole rows, several times faster than indexing.
    return entries.apply(lambda x: x.index_select(0, steps), batch_size=[len(steps)])
