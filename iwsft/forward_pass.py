"""log pi(a|s) of a whole dataset without gradient: in chunks or micro-batches, on all processes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from iwsft.distributed import gathered, rank_and_world
from iwsft.policies.log_prob import check_memory, evaluating, step_log_prob
from iwsft.trajectory import MULTIPLICITY, Segments, steps_of
from iwsft.validation import check_count

# Matrix products of 1 to 4 rows take another kernel, whose last bits differ from the rest.
_LEAST_STEPS = 16

Collate = Callable[[Sequence[TensorDictBase]], TensorDictBase]
# Trajectories of a batch, and those of them that no batch before it has, by their positions.
_Batch = tuple[list[int], list[int]]


class ForwardPass:
    """A policy runs over all trajectories once, in eval mode and without gradient.

    Of several batches with a trajectory the first counts. Processes that share the pass take turns:
    in a round each runs one batch, and all run equally often, as sharded models need.

    Args:
        policy: An object with ``log_prob(trajectories)``, one number per step.
        trajectories: Packed or padded trajectories; with ``batches``, packed ones.
        batches: Positions of the trajectories of each batch. Those that are in none follow in
            batches of similar length, as large as the largest given one, or else ``rows``, padding
            included. None: chunks of the trajectories as they are, in their order.
        collate: Makes a batch of packed trajectories, ``[B, T]`` padded on the right, or ``[N]``
            back to back, in their order.
        rows: Steps of a chunk. A longer trajectory is not cut; a few steps join their neighbour.
        segments: Layout and mask of the trajectories, if they are not those of the usual keys.
        device: Device of the batches; by default that of the policy.
        shared: Whether the processes of a distributed run share the pass. All of them must then
            take part with the same trajectories.
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
        shared: bool = False,
    ) -> None:
        if not callable(getattr(policy, "log_prob", None)):
            way_out = "pass a GaussianPolicy, a ProbabilisticActor, or any object with that method"
            raise TypeError(f"{type(policy).__name__} has no log_prob(trajectories); {way_out}")
        self.segments = Segments.of(trajectories) if segments is None else segments
        check_memory(policy, trajectories, self.segments)
        shape = self.segments.shape
        check_count("rows", rows)
        if batches is not None and len(shape) != 1:
            size = list(trajectories.batch_size)
            raise ValueError(f"the trajectories must be packed, [N]; these have batch size {size}")
        self.policy = policy
        self.trajectories = trajectories
        self.device = _device_of(policy) if device is None else device
        self.collate = None if batches is None else collate
        self._shared = shared
        self._rank, self._world = rank_and_world() if shared else (0, 1)
        # A row of a padded batch counts as a trajectory.
        width = shape[1:].numel()
        lengths = [width] * shape[0] if len(shape) == 2 else torch.bincount(self.segments.index)
        self._sizes = torch.as_tensor(lengths).cpu()
        # Along the first dimension.
        self._stops = self._sizes.cumsum(0) // width
        self._starts = self._stops - self._sizes // width
        sizes = self._sizes.tolist()
        self.batches = (
            _chunks(sizes, rows) if batches is None else _micro_batches(batches, sizes, rows)
        )

    @property
    def rounds(self) -> int:
        """Number of rounds."""
        return math.ceil(len(self.batches) / self._world)

    def run(self, start: int, stop: int) -> Tensor:
        """Log-probs of the new steps of rounds ``start`` to ``stop - 1``; 0 off the mask."""
        mine = [self._run_batch(number) for number in range(start, stop)]
        results = gathered([part.cpu() for part in mine]) if self._shared else [mine]
        return torch.cat([part for parts in zip(*results, strict=True) for part in parts])

    def placed(self, log_prob: Tensor, start: int = 0) -> Tensor:
        """Log-probs of :meth:`run` from ``start`` on, in the data's layout; other steps have 0."""
        new = [trajectory for _, new in self.batches[start * self._world :] for trajectory in new]
        steps = steps_of(self._sizes, torch.tensor(new))[: len(log_prob)]
        out = log_prob.new_zeros(self.segments.shape.numel())
        out[steps.to(out.device)] = log_prob
        return out.reshape(self.segments.shape).to(self.segments.index.device)

    def log_prob(self) -> Tensor:
        """log pi(a|s) of every step in the layout of the trajectories, see :meth:`run`."""
        return self.placed(self.run(0, self.rounds))

    def _run_batch(self, number: int) -> Tensor:
        """Log-probs of the new steps in this process's batch of a round."""
        place = number * self._world + self._rank
        # Where batches run short, the last is run again, and nothing in it is new.
        members, new = self.batches[min(place, len(self.batches) - 1)]
        sizes = self._sizes[members].tolist()
        starts, stops = self._starts[members].tolist(), self._stops[members].tolist()
        if self.collate is None:
            batch = self.trajectories[starts[0] : stops[-1]]
            shape = torch.Size((stops[-1] - starts[0], *self.segments.shape[1:]))
        else:
            examples = self.trajectories.exclude(MULTIPLICITY)
            batch = self.collate([examples[a:b] for a, b in zip(starts, stops, strict=True)])
            shape = batch.batch_size
        if self.device is not None:
            batch = batch.to(self.device)
        with torch.no_grad(), evaluating(self.policy):
            log_prob = step_log_prob(self.policy, batch, shape)
        rows = log_prob if log_prob.ndim == 2 else log_prob.split(sizes)
        parts = {t: row[:size] for t, row, size in zip(members, rows, sizes, strict=True)}
        log_prob = torch.cat([parts[trajectory] for trajectory in new])
        if self.segments.mask is not None:
            valid = self.segments.mask[steps_of(self._sizes, torch.tensor(new))]
            # Not a product with the mask, for padding may hold NaN or infinity.
            log_prob = torch.where(valid.to(log_prob.device), log_prob, 0.0)
        return log_prob if place < len(self.batches) else log_prob[:0]


def _chunks(sizes: Sequence[int], rows: int) -> list[_Batch]:
    """Neighbours, about ``rows`` steps together."""
    chunks: list[_Batch] = []
    steps, left = 0, sum(sizes)
    for trajectory, size in enumerate(sizes):
        is_full = steps + size > rows and min(steps, left) >= _LEAST_STEPS
        if not chunks or is_full:
            members: list[int] = []
            chunks.append((members, members))
            steps = 0
        members.append(trajectory)
        steps += size
        left -= size
    return chunks


def _micro_batches(
    batches: Sequence[Sequence[int]], sizes: Sequence[int], rows: int
) -> list[_Batch]:
    """The given batches, and batches of the trajectories that are in none."""
    seen: set[int] = set()
    planned = []
    for place, batch in enumerate(batches):
        members = sorted(set(batch))
        if members and not 0 <= members[0] <= members[-1] < len(sizes):
            range_ = f"{members[0]} to {members[-1]}; the data has those from 0 to {len(sizes) - 1}"
            raise ValueError(f"batch {place} holds trajectories {range_}")
        new = [trajectory for trajectory in members if trajectory not in seen]
        if new:
            planned.append((members, new))
            seen.update(new)
    left = [trajectory for trajectory in range(len(sizes)) if trajectory not in seen]
    # The longest first, so that what does not fit into memory fails at once.
    left.sort(key=lambda trajectory: -sizes[trajectory])
    room = max((sum(sizes[t] for t in set(batch)) for batch in batches), default=rows)
    while left:
        number = max(1, room // sizes[left[0]])
        members = sorted(left[:number])
        planned.append((members, members))
        left = left[number:]
    return planned


def _device_of(policy: Any) -> torch.device | None:
    """Device that a policy reads from; None where it has no parameters."""
    # An engine knows better than parameters that are offloaded.
    device = getattr(getattr(policy, "model", None), "device", None)
    if isinstance(device, torch.device) or not isinstance(policy, nn.Module):
        return device
    first = next(policy.parameters(), None)
    return None if first is None else first.device
