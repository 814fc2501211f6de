"""log pi(a|s) of a whole dataset without gradient: in chunks or micro-batches, on all processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from iwsft.distributed import gathered, rank_and_world
from iwsft.policies.log_prob import evaluating, step_log_prob
from iwsft.trajectory import MULTIPLICITY, Segments, lengths, steps_of

# Matrix products of 1 to 4 rows take another kernel, whose last bits differ from the rest.
_LEAST_STEPS = 16

Collate = Callable[[Sequence[TensorDictBase]], TensorDictBase]


class ForwardPass:
    """A policy runs over all trajectories once, in eval mode and without gradient.

    It runs batch by batch: over chunks of whole trajectories as they are, or over ``batches``,
    which are collated. If a trajectory is in several batches, its log-probs are those of the
    first; batches without a new trajectory are left out. Processes that share the pass take turns:
    in a round each runs one batch, and all run equally often, as sharded models need.

    Args:
        policy: An object with ``log_prob(trajectories)``, one number per step. It reads a shallow
            copy of each batch.
        trajectories: Packed or padded trajectories; with ``batches``, packed ones.
        batches: Positions of the trajectories of each batch; by default chunks in the order of the
            data.
        collate: Makes a batch of packed trajectories, one each: ``[B, T]`` padded on the right, or
            ``[N]`` back to back, in their order.
        rows: Steps of a chunk. A longer trajectory (or row of a padded batch) is not cut; a
            remainder of a few steps joins its neighbour.
        segments: Layout and mask of the trajectories, if they are not those of the usual keys.
        device: Device of the batches; by default that of the policy.
        complete: Whether batches of similar length follow, of the trajectories that are in none;
            they are as large as the largest given one, or else ``rows``, padding included.
        shared: Whether the processes of a distributed run share the pass. All of them must then
            take part with the same trajectories.

    Raises:
        TypeError: The policy has no ``log_prob``.
        ValueError: ``rows`` is below 1, there is no step, a batch names a trajectory that does not
            exist, or trajectories with ``batches`` are not packed.
    """

    def __init__(
        self,
        policy: Any,
        trajectories: TensorDictBase,
        batches: Sequence[Sequence[int]] | None = None,
        *,
        collate: Collate = torch.cat,  # type: ignore[assignment]
        rows: int = 8192,
        segments: Segments | None = None,
        device: torch.device | str | None = None,
        complete: bool = False,
        shared: bool = False,
    ) -> None:
        if not callable(getattr(policy, "log_prob", None)):
            raise TypeError(
                f"{type(policy).__name__} has no log_prob(trajectories); pass a GaussianPolicy, a "
                "TorchRL ProbabilisticActor, or any object with that method"
            )
        segments = Segments.of(trajectories) if segments is None else segments
        if segments.shape.numel() == 0:
            raise ValueError("there is not a single step in these trajectories")
        if rows < 1:
            raise ValueError(f"rows={rows} must be at least 1")
        self.policy = policy
        self.trajectories = trajectories
        self.device = _device_of(policy) if device is None else device
        self.collate = collate
        self._segments = segments
        self._shared = shared
        self._rank, self._world = rank_and_world() if shared else (0, 1)
        # A slice of the trajectories as they are, or trajectories with those that are new.
        self.batches: list[slice | tuple[list[int], list[int]]]
        if batches is None:
            self.batches = list(whole_trajectories(segments, rows))
            return
        if trajectories.batch_dims != 1:
            raise ValueError(
                "the trajectories must be packed, one batch dimension over all steps; these have "
                f"batch size {list(trajectories.batch_size)}"
            )
        self._examples = trajectories.exclude(MULTIPLICITY)
        self._sizes = lengths(trajectories).cpu()
        self._stops = self._sizes.cumsum(0)
        sizes = self._sizes.tolist()
        self.batches = [*_micro_batches(batches, sizes, rows=rows, complete=complete)]

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return math.ceil(len(self.batches) / self._world)

    def run_mine(self, number: int) -> Tensor:
        """Log-probs ``[k]`` of the new steps in this process's batch of a round."""
        place = number * self._world + self._rank
        # Where batches run short, the last is run again, and nothing in it is new.
        batch = self.batches[min(place, len(self.batches) - 1)]
        with torch.no_grad(), evaluating(self.policy):
            log_prob = self._chunk(batch) if isinstance(batch, slice) else self._collated(*batch)
        if self._segments.mask is not None:
            # Not a product with the mask, for padding may hold NaN or infinity.
            valid = self._segments.valid.reshape(-1)[self._positions(batch)]
            log_prob = torch.where(valid.to(log_prob.device), log_prob, 0.0)
        return log_prob if place < len(self.batches) else log_prob[:0]

    def run(self, start: int, stop: int, *, first: Tensor | None = None) -> Tensor:
        """Log-probs ``[k]`` of all new steps of some rounds, on all processes.

        Args:
            start: First round.
            stop: Round after the last.
            first: Result of :meth:`run_mine` for the first of all rounds, if it is known.
        """
        known = [] if start or first is None else [first]
        mine = [*known, *map(self.run_mine, range(start + len(known), stop))]
        results = gathered([part.cpu() for part in mine]) if self._shared else [mine]
        return torch.cat([part for parts in zip(*results, strict=True) for part in parts])

    def steps(self, start: int, stop: int) -> Tensor:
        """Positions ``[k]`` among all steps, row by row, of the log-probs of some rounds."""
        batches = self.batches[start * self._world : stop * self._world]
        return torch.cat([self._positions(batch) for batch in batches])

    def log_prob(self) -> Tensor:
        """log pi(a|s) of every step, in the layout of the trajectories, float32 or wider.

        It is 0 off the mask, and for trajectories in no batch.
        """
        return self.placed(self.run(0, self.rounds))

    def placed(self, log_prob: Tensor) -> Tensor:
        """The log-probs of all rounds in the layout and on the device of the trajectories."""
        out = log_prob.new_zeros(self._segments.shape.numel())
        out[self.steps(0, self.rounds).to(out.device)] = log_prob
        return out.reshape(self._segments.shape).to(self._segments.index.device)

    def _positions(self, batch: slice | tuple[list[int], list[int]]) -> Tensor:
        """Positions of a batch's new steps among all steps."""
        if isinstance(batch, slice):
            width = self._segments.shape[1:].numel()
            return torch.arange(batch.start * width, batch.stop * width)
        return steps_of(self._sizes, torch.tensor(batch[1]))

    def _log_prob(self, batch: TensorDictBase, shape: torch.Size) -> Tensor:
        batch = batch if self.device is None else batch.to(self.device)
        return step_log_prob(self.policy, batch, shape)

    def _chunk(self, chunk: slice) -> Tensor:
        shape = torch.Size((chunk.stop - chunk.start, *self._segments.shape[1:]))
        return self._log_prob(self.trajectories[chunk], shape).reshape(-1)

    def _collated(self, members: list[int], new: list[int]) -> Tensor:
        sizes = self._sizes[members].tolist()
        stops = self._stops[members].tolist()
        batch = self.collate(
            [self._examples[stop - size : stop] for stop, size in zip(stops, sizes, strict=True)]
        )
        log_prob = self._log_prob(batch, batch.batch_size)
        rows = log_prob if log_prob.ndim == 2 else log_prob.split(sizes)
        parts = {t: row[:size] for t, row, size in zip(members, rows, sizes, strict=True)}
        return torch.cat([parts[trajectory] for trajectory in new])


def _micro_batches(
    batches: Sequence[Sequence[int]], sizes: Sequence[int], *, rows: int, complete: bool
) -> list[tuple[list[int], list[int]]]:
    """The distinct trajectories of each batch, and those that no batch before it holds."""
    seen: set[int] = set()
    planned = []
    for place, batch in enumerate(batches):
        members = sorted(set(batch))
        if members and not 0 <= members[0] <= members[-1] < len(sizes):
            raise ValueError(
                f"batch {place} holds trajectories {members[0]} to {members[-1]}; the data has "
                f"those from 0 to {len(sizes) - 1}"
            )
        new = [trajectory for trajectory in members if trajectory not in seen]
        if new:
            planned.append((members, new))
            seen.update(new)
    left = [trajectory for trajectory in range(len(sizes)) if trajectory not in seen]
    # The longest first, so that what does not fit into memory fails at once.
    left.sort(key=lambda trajectory: -sizes[trajectory])
    room = max((sum(sizes[t] for t in set(batch)) for batch in batches), default=rows)
    while complete and left:
        number = max(1, room // sizes[left[0]])
        planned.append((sorted(left[:number]), sorted(left[:number])))
        left = left[number:]
    return planned


def whole_trajectories(segments: Segments, rows: int) -> Iterator[slice]:
    """Slices of the first batch dimension, whole trajectories, about ``rows`` steps each."""
    if len(segments.shape) == 2:
        width = segments.shape[1]
        ends = torch.arange(1, segments.shape[0] + 1) * width
    else:
        width = 1
        ends = torch.bincount(segments.index).cumsum(0).cpu()
    last = int(ends[-1])
    start = 0
    while start < last:
        fits = int(torch.searchsorted(ends, start + rows, right=True)) - 1
        least = int(torch.searchsorted(ends, min(start + _LEAST_STEPS, last)))
        stop = int(ends[max(fits, least)])
        if last - stop < _LEAST_STEPS:
            stop = last
        yield slice(start // width, stop // width)
        start = stop


def _device_of(policy: Any) -> torch.device | None:
    """Device that a policy reads from; None where it has no parameters."""
    # An engine knows better than parameters that are offloaded.
    device = getattr(getattr(policy, "model", None), "device", None)
    if isinstance(device, torch.device) or not isinstance(policy, nn.Module):
        return device
    first = next(policy.parameters(), None)
    return None if first is None else first.device
