"""Trajectories as TensorDicts: keys, the packed and the padded layout, sums along a trajectory.

*Packed*: batch size ``[N]`` steps, trajectories back to back, with non-decreasing
``("collector", "traj_ids")``. *Padded*: batch size ``[B, T]``, or ``[B]`` with time inside; valid
steps are marked by a mask. Keys follow TorchRL's episode data (TED); seven keys are ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

OBSERVATION: NestedKey = "observation"
ACTION: NestedKey = "action"
NEXT_OBSERVATION: NestedKey = ("next", "observation")
REWARD: NestedKey = ("next", "reward")
DONE: NestedKey = ("next", "done")
TERMINATED: NestedKey = ("next", "terminated")
TRUNCATED: NestedKey = ("next", "truncated")
TRAJ_IDS: NestedKey = ("collector", "traj_ids")
MASK: NestedKey = ("collector", "mask")
# Language, TorchRL's: a token is a step, those of the assistant are its actions.
TOKENS: NestedKey = ("tokens", "full")
ATTENTION_MASK: NestedKey = ("masks", "all_attention_mask")
ASSISTANT_MASK: NestedKey = ("masks", "all_assistant_mask")
# Ours: log pi_ref of the step, and the one that the data give (NaN where they give none); draws,
# cached weight and standard score of its trajectory; the data's own weight of the step; and how
# often its prompt is answered rightly, in [0, 1].
REF_LOG_PROB: NestedKey = "ref_log_prob"
GIVEN_REF_LOG_PROB: NestedKey = "given_ref_log_prob"
MULTIPLICITY: NestedKey = "multiplicity"
IMPORTANCE_WEIGHT: NestedKey = "importance_weight"
STANDARD_SCORE: NestedKey = "standard_score"
DATA_WEIGHT: NestedKey = "data_weight"
SUCCESS_RATE: NestedKey = "success_rate"
_TIME_FIRST = "these have the layout [T, B]: pass trajectories.transpose(0, 1)"


def on_host(tensor: Tensor) -> bool:
    """Whether reading the values of ``tensor`` is free: not compiling, not on an accelerator."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    return tensor.device.type == "cpu"


@dataclass(frozen=True)
class Segments:
    """Which trajectory each step of a batch belongs to, and sums along the trajectories.

    Results per trajectory have ``slots`` entries: the rows of a padded batch without ids and ends,
    else the trajectories. Where reading the data is not free, on an accelerator and in
    ``torch.compile``, there is a slot for each step in place of the latter, and those after the
    last trajectory are empty (length 0, sum 0). So nothing waits, and shapes are static.

    Attributes:
        shape: Layout of the batch, ``[N]`` or ``[B, T]``.
        index: Slot of each step, int64 ``[prod(shape)]``.
        mask: Valid steps, bool ``[prod(shape)]``, or None if all are valid.
        slots: Number of slots ``S``.
        single_steps: Whether each slot is known to be one valid step, so that sums change nothing.
    """

    shape: torch.Size
    index: Tensor
    mask: Tensor | None
    slots: int
    single_steps: bool = False

    @classmethod
    def of(
        cls, batch: TensorDictBase, *, traj_ids: NestedKey = TRAJ_IDS, mask: Tensor | None = None
    ) -> Segments:
        """Read the layout of a packed or padded batch.

        Args:
            batch: The batch.
            traj_ids: Key of the trajectory ids, which the packed layout needs. A padded row is cut
                where they change, and after a step with ``("next", "done")``.
            mask: Valid steps, bool, in the layout of the batch (a trailing 1 is dropped). By
                default the batch's own ``("collector", "mask")``, if it has one.

        Raises:
            KeyError: A packed batch has no trajectory ids.
            ValueError: There is no step, ids or mask are wrong, the name of a dimension or the
                observations show the layout ``[T, B]``, or rows without a mask are padded. Values
                are not read on an accelerator: see :func:`validate`.
        """
        shape, ids, mask = _read_layout(batch, traj_ids, mask)
        pair = observation_pair(batch) if len(shape) == 2 else None
        if pair is not None and on_host(pair[0]):
            check_time_second(batch, shape)
        if len(shape) == 2 and mask is None:
            _check_padding(batch, shape)
        steps = shape.numel()
        if ids is None:
            device = (mask if mask is not None else next(iter(batch.values(True, True)))).device
            ids = torch.arange(shape[0], device=device)[:, None].expand(shape)
            if batch.get(DONE, default=None) is None:
                return cls(shape, ids.reshape(-1), mask, shape[0])
        if len(shape) == 1 and on_host(ids) and bool((ids[0, 1:] > ids[0, :-1]).all()):
            return cls(shape, torch.arange(steps), mask, steps, single_steps=mask is None)
        index = _first_steps(batch, shape, ids, mask, traj_ids).cumsum(0) - 1
        return cls(shape, index, mask, int(index[-1]) + 1 if on_host(index) else steps)

    def where_valid(self, x: Tensor) -> Tensor:
        """``x`` on valid steps, 0 where masked; not a product, for padding may hold NaN."""
        return x if self.mask is None else torch.where(self.valid, x, 0)

    def sum(self, x: Tensor) -> Tensor:
        """Sum of ``x`` along each trajectory, ``[S]``, accumulated in float64.

        ``x`` has one number per step, in the layout of the batch. Masked steps count as 0, also if
        they are NaN. The result has the dtype of ``x`` or float32, whichever is wider.
        """
        dtype = torch.promote_types(x.dtype, torch.float32)
        if self.single_steps:
            return x.reshape(-1).to(dtype)
        total = torch.zeros(self.slots, dtype=torch.float64, device=x.device)
        flat = self.where_valid(x.reshape(self.shape)).reshape(-1)
        return total.index_add(0, self.index, flat.double()).to(dtype)

    def mean(self, x: Tensor) -> Tensor:
        """Mean of ``x`` over the valid steps of each trajectory, ``[S]``; 0 in an empty slot."""
        return self.sum(x) if self.single_steps else self.sum(x) / self.lengths.clamp(min=1)

    @property
    def lengths(self) -> Tensor:
        """Valid steps of each trajectory, float32 ``[S]`` (exact to 2^24), 0 in an empty slot."""
        return self.sum(torch.ones(self.shape, device=self.index.device))

    def spread(self, per_trajectory: Tensor) -> Tensor:
        """Write a number per trajectory ``[S]`` onto its steps, in the layout of the batch."""
        of_step = per_trajectory if self.single_steps else per_trajectory[self.index]
        return of_step.reshape(self.shape)

    @property
    def without_valid_step(self) -> Tensor:
        """Slots of the trajectories that have every step masked, int64 ``[k]``."""
        occupied = torch.bincount(self.index, minlength=self.slots) > 0
        return (occupied & (self.lengths == 0)).nonzero().squeeze(-1)

    @property
    def valid(self) -> Tensor:
        """Valid steps as bool, in the layout of the batch."""
        if self.mask is None:
            return torch.ones(self.shape, dtype=torch.bool, device=self.index.device)
        return self.mask.reshape(self.shape)


def layout(
    batch: TensorDictBase, *, traj_ids: NestedKey = TRAJ_IDS, mask: Tensor | None = None
) -> torch.Size:
    """Layout of a batch, ``[N]`` or ``[B, T]``; see :meth:`Segments.of`."""
    size = batch.batch_size
    mask = batch.get(MASK, default=None) if mask is None else mask
    if len(size) not in (1, 2):
        raise ValueError(
            f"trajectories have batch size [N], [B, T] or [B], not {list(size)}: set "
            "trajectories.batch_size, which is lost where a batch is built anew from its entries"
        )
    if len(size) == 2 and batch.names[0] == "time":
        raise ValueError(_TIME_FIRST)
    if len(size) == 1 and mask is not None and mask.ndim >= 2 and mask.shape[1] != 1:
        return mask.shape[:2]
    if len(size) == 1 and batch.get(traj_ids, default=None) is None:
        way_out = f"trajectories[{traj_ids!r}] = ids, for each step the number of its trajectory"
        problem = f"{traj_ids!r} is missing; only padded trajectories ([B, T]) do without"
        raise KeyError(f"{problem}: {way_out}, non-decreasing")
    return size


def observation_pair(batch: TensorDictBase) -> tuple[Tensor, Tensor] | None:
    """Observations and next observations; None unless both are tensors of one shape."""
    now, following = (batch.get(key, default=None) for key in (OBSERVATION, NEXT_OBSERVATION))
    tensors = isinstance(now, Tensor) and isinstance(following, Tensor)
    return (now, following) if tensors and now.shape == following.shape else None


def check_time_second(batch: TensorDictBase, shape: torch.Size) -> None:
    """Refuse rows ``[T, B]``: their next observations are the observations of the next row."""
    pair = observation_pair(batch)
    if pair is None or batch.batch_dims != 2 or min(shape) < 2:
        return
    now, following = (x.reshape(*shape, -1) for x in pair)
    steps = (following[:-1], now[1:]), (following[:, :-1], now[:, 1:])
    # Most steps, for an episode may end between two of them.
    down, right = (float((a == b).all(2).double().mean()) for a, b in steps)
    if down > 0.5 > right:
        raise ValueError(_TIME_FIRST)


def _check_padding(batch: TensorDictBase, shape: torch.Size) -> None:
    """Refuse rows without a mask in which all that follows the end of an episode is 0."""
    action, done = (batch.get(key, default=None) for key in (ACTION, DONE))
    known = all(isinstance(x, Tensor) and x.shape[:2] == shape for x in (action, done))
    if not known or not on_host(done) or bool(action[:, -1].reshape(shape[0], -1).any(1).all()):
        return
    ended = done.reshape(*shape, -1).any(2)
    behind = (ended.flip(1).cumsum(1).flip(1) == 0) & ended.any(1, keepdim=True)
    for value in batch.exclude(REF_LOG_PROB).values(True, True):
        if isinstance(value, Tensor) and value.shape[:2] == shape:
            behind[(behind & value.reshape(*shape, -1).any(2)).any(1)] = False
    if bool(behind.any()):
        row, step = behind.nonzero()[0].tolist()
        problem = f"row {row} is 0 from step {step} on, behind the end of its episode"
        way_out = f"pad_sequence(..., return_mask=True) gives one; set it as {MASK!r}"
        raise ValueError(f"{problem}: this is padding, and there is no mask; {way_out}")


def _read_layout(
    batch: TensorDictBase, traj_ids: NestedKey = TRAJ_IDS, mask: Tensor | None = None
) -> tuple[torch.Size, Tensor | None, Tensor | None]:
    """Layout, ids of the steps, ``[rows, T]``, and valid steps, ``[N]``."""
    shape = layout(batch, traj_ids=traj_ids, mask=mask)
    if shape.numel() == 0:
        raise ValueError("there is not a single step in these trajectories")
    mask = batch.get(MASK, default=None) if mask is None else mask
    if mask is not None:
        mask = fit(mask, shape, "mask").bool().reshape(-1)
    ids = batch.get(traj_ids, default=None)
    if ids is not None:
        if ids.dtype not in (torch.int64, torch.int32, torch.int16, torch.uint8):
            raise ValueError(f"{traj_ids!r} must hold integers, it holds {ids.dtype}")
        ids = fit(ids, shape, repr(traj_ids)).reshape(shape[0] if len(shape) == 2 else 1, -1)
    return shape, ids, mask


def _first_steps(
    batch: TensorDictBase, shape: torch.Size, ids: Tensor, mask: Tensor | None, key: NestedKey
) -> Tensor:
    """Whether a step is the first of its trajectory, bool ``[N]``."""
    if len(shape) == 1 and on_host(ids):
        check_order(ids[0], key)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    done = batch.get(DONE, default=None)
    if done is not None and len(shape) == 1:
        # Neighbours may have equal ids: episodes of two collectors, slices of a replay buffer.
        first[:, 1:] |= fit(done, shape, repr(DONE)).bool()[:-1]
    elif done is not None and done.shape in (shape, (*shape, 1)):
        # After the end of an episode a row of a rollout holds the next one.
        first[:, 1:] |= done.reshape(shape).bool()[:, :-1]
    if mask is not None and len(shape) == 2:
        # Padding belongs to the trajectory beside it, whatever it holds.
        seen = mask.reshape(shape).cumsum(1)
        first[:, 1:] &= (seen[:, :-1] > 0) & (seen[:, :-1] < seen[:, -1:])
    return first.reshape(-1)


def check_order(ids: Tensor, key: NestedKey) -> None:
    """Refuse ids of packed steps that decrease."""
    falls = ids[1:] < ids[:-1]
    if bool(falls.any()):
        where = int(falls.nonzero()[0]) + 1
        problem = f"{key!r} is out of order at step {where}"
        slices = "slices (SliceSampler, pad_output=True) to [B, T]"
        way_out = f"sort whole trajectories by id and time, or reshape padded {slices}"
        steps = "draw single steps by iwsft.samplers.StepSampler, or give each an id of its own"
        raise ValueError(f"{problem}; {way_out}; {steps}; join datasets by iwsft.curation.join")


def fit(x: Tensor, shape: torch.Size, name: str) -> Tensor:
    """Check that there is one number a step; drop a trailing dimension of 1."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} is a {type(x).__name__}, and must be a tensor, one number a step")
    if x.shape not in (shape, (*shape, 1)):
        raise ValueError(f"{name} has shape {list(x.shape)}, the batch has {list(shape)} steps")
    return x.reshape(shape)


def lengths(packed: TensorDictBase) -> Tensor:
    """Number of steps of each trajectory of a packed batch, int64 ``[n]``, in order."""
    # Not the index of each step: of much data it fills new memory, which costs more than counting.
    start = first_steps(packed).nonzero().squeeze(1)
    return start.diff(append=start.new_tensor([len(packed)]))


def first_steps(packed: TensorDictBase) -> Tensor:
    """Whether each step of a packed batch is the first of its trajectory, bool ``[N]``."""
    shape, ids, _ = _read_layout(packed)
    assert ids is not None
    return _first_steps(packed, shape, ids, None, TRAJ_IDS)


def per_trajectory(packed: TensorDictBase, key: NestedKey) -> Tensor:
    """Return an entry ``[n]`` that must be the same on all steps of a trajectory, in order."""
    value, sizes = fit(packed.get(key), packed.batch_size, repr(key)), lengths(packed)
    first = value[sizes.cumsum(0) - sizes]
    expected = first.repeat_interleave(sizes)
    # NaN does not equal itself.
    varies = ((value != expected) & ~(value.isnan() & expected.isnan())).nonzero()
    if len(varies):
        raise ValueError(f"{key!r} changes within a trajectory, first at step {int(varies[0])}")
    return first


def select(packed: TensorDictBase, index: Tensor) -> TensorDictBase:
    """Keep the trajectories at increasing positions ``index`` (int64 ``[k]``) of a packed batch."""
    sizes = lengths(packed)
    ends = torch.tensor([-1, len(sizes)], device=index.device)
    if bool((torch.cat([ends[:1], index, ends[1:]]).diff() <= 0).any()):
        raise ValueError(f"positions must increase and run from 0 to {len(sizes) - 1}")
    steps = steps_of(sizes, index)
    # index_select copies whole rows, several times faster than indexing.
    return packed.apply(lambda x: x.index_select(0, steps), batch_size=[len(steps)])


def steps_of(sizes: Tensor, index: Tensor) -> Tensor:
    """Positions of all steps of the trajectories ``index`` (int64 ``[k]``), int64, back to back.

    ``sizes``, int64 ``[n]``, are the steps of each trajectory of the packed data.
    """
    starts = torch.cumsum(sizes, 0) - sizes
    taken = sizes[index]
    begin = torch.cumsum(taken, 0) - taken
    shift = torch.repeat_interleave(starts[index] - begin, taken)
    return torch.arange(len(shift), device=sizes.device) + shift


def pad(packed: TensorDictBase, length: int | None = None) -> TensorDictBase:
    """Packed ``[N]`` to padded ``[B, T]``, with ``("collector", "mask")``; padding is 0.

    T is ``length``, or the longest trajectory's; a ValueError says that one is longer.
    """
    segments = Segments.of(packed)
    sizes = torch.bincount(segments.index)
    longest = int(sizes.max())
    length = longest if length is None else length
    if length < longest:
        raise ValueError(f"the longest trajectory has {longest} steps, more than length={length}")
    starts = torch.cumsum(sizes, 0) - sizes
    row = segments.index
    column = torch.arange(len(row), device=row.device) - starts[row]

    def put(x: Tensor) -> Tensor:
        out = x.new_zeros((len(sizes), length, *x.shape[1:]))
        out[row, column] = x
        return out

    padded = packed.apply(put, batch_size=[len(sizes), length])
    mask = torch.zeros(len(sizes), length, dtype=torch.bool, device=row.device)
    mask[row, column] = segments.valid
    padded.set(MASK, mask)
    # Padding has its row's id, so that a row is one trajectory by its ids, too.
    ids = packed.get(TRAJ_IDS).reshape(-1)[starts]
    return padded.set(TRAJ_IDS, ids[:, None].expand(-1, length).contiguous())


def pack(padded: TensorDictBase) -> TensorDictBase:
    """Padded ``[B, T]`` (or ``[B]`` with time inside) to packed ``[N]``; drops masked steps.

    Trajectory ids are numbered anew if there are none, or they decrease or are equal across rows.
    """
    segments = Segments.of(padded)
    keep = segments.valid.reshape(-1)
    layout = len(segments.shape)
    flat = padded.apply(
        lambda x: x.reshape(-1, *x.shape[layout:])[keep], batch_size=[int(keep.sum())]
    ).exclude(MASK)
    ids = flat.get(TRAJ_IDS, default=None)
    slots = segments.index[keep]
    # Equal ids on two rows would join two trajectories.
    joins = ids is None or not torch.equal(ids[1:] != ids[:-1], slots[1:] != slots[:-1])
    if joins or bool((ids[1:] < ids[:-1]).any()):
        flat.set(TRAJ_IDS, slots)
    return flat


def from_steps(steps: dict[NestedKey, Tensor], traj_ids: Tensor) -> TensorDict:
    """A packed batch from tensors of one row per step and their trajectory ids (int64 ``[N]``)."""
    packed = TensorDict({}, batch_size=[len(traj_ids)])
    for key, value in {**steps, TRAJ_IDS: traj_ids}.items():
        packed.set(key, value)
    return packed
