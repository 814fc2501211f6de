"""Checks of whole data, once, before training time is spent."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

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
    TRAJ_IDS,
    Segments,
    check_order,
    check_time_second,
    first_steps,
    fit,
    layout,
    observation_pair,
)

# Entries with one number a step.
_NUMBERS = (REF_LOG_PROB, IMPORTANCE_WEIGHT, REWARD, MULTIPLICITY)
# Steps that are compared at a time.
_PART = 2**16


def check_count(name: str, value: object) -> None:
    """Refuse what is not a whole number from 1 on."""
    if not isinstance(value, Integral) or int(value) < 1:
        raise ValueError(f"{name}={value!r} must be a whole number from 1 on")


def check_digits(numbers: Tensor, name: str) -> None:
    """Refuse log-probs of the reference, or importance weights, that are less than float32."""
    if not numbers.is_floating_point() or numbers.itemsize < 4:
        problem = f"{name} holds {numbers.dtype}, which rounds importance weights"
        way_out = "exclude it from the trajectories: annotate_reference and reweight write float32"
        raise ValueError(f"{problem}; {way_out}")


def check_tensordict(trajectories: object) -> None:
    """Raise a TypeError for anything but a TensorDict, with a hint at an attribute that is one."""
    if isinstance(trajectories, TensorDictBase):
        return
    inside = getattr(trajectories, "trajectories", None)
    hint = "; pass its .trajectories" if isinstance(inside, TensorDictBase) else ""
    raise TypeError(f"trajectories are a TensorDict, not a {type(trajectories).__name__}{hint}")


def check_packed(trajectories: TensorDictBase) -> None:
    """Refuse padded trajectories, and what :func:`check_tensordict` refuses."""
    check_tensordict(trajectories)
    if len(layout(trajectories)) != 1:
        raise ValueError("these trajectories are padded; use trajectory.pack(trajectories)")


def check_links(trajectories: TensorDictBase) -> None:
    """Refuse trajectories that their next observations show to be others.

    A packed trajectory in which the next observation of a step is not that of the next step may be
    two: ``torch.cat`` of two collectors' episodes can give neighbours equal ids. Rows ``[B, T]``
    whose columns are linked instead are ``[T, B]``.
    """
    check_tensordict(trajectories)
    pair, shape = observation_pair(trajectories), layout(trajectories)
    if pair is not None and len(shape) == 1:
        _check_steps(trajectories, *pair)
    check_time_second(trajectories, shape)


def _check_steps(packed: TensorDictBase, observation: Tensor, following: Tensor) -> None:
    """Refuse a step that does not begin where the one before it in its trajectory ends."""
    following, observation = following[:-1], observation[1:]
    inner = ~first_steps(packed)[1:]
    mask = packed.get(MASK, default=None)
    if mask is not None:
        mask = fit(mask, packed.batch_size, "mask").bool()
        inner &= mask[1:] & mask[:-1]
    breaks = torch.zeros_like(inner)
    for at in range(0, len(inner), _PART):
        part = slice(at, at + _PART)
        a, b = following[part], observation[part]
        # What is NaN has an error of its own.
        differs = (a != b) & ~a.isnan() & ~b.isnan()
        breaks[part] = inner[part] & differs.reshape(len(a), -1).any(1)
    # Where most steps break, the next observations follow another convention.
    if 0 < int(breaks.sum()) <= int(inner.sum()) // 2:
        step = int(breaks.nonzero()[0]) + 1
        problem = f"step {step} does not begin where step {step - 1} of its trajectory ends"
        differ = f"{NEXT_OBSERVATION!r} and {OBSERVATION!r} differ"
        way_out = f"give each episode its own {TRAJ_IDS!r}, or set {DONE!r} at its last step"
        raise ValueError(f"{problem}: {differ}; {way_out}")


def validate(
    trajectories: TensorDictBase, *, keys: Iterable[NestedKey] = (OBSERVATION, ACTION)
) -> None:
    """Check a batch or a whole dataset once, before training time is spent.

    It reads the values, so it waits for an accelerator. ``keys`` are the floating-point entries
    that must exist (KeyError), one row per step, finite on valid steps. A ValueError names the
    entry and the step of anything else that is wrong.
    """
    check_tensordict(trajectories)
    segments = Segments.of(trajectories)
    if len(segments.shape) == 1:
        check_order(trajectories.get(TRAJ_IDS), TRAJ_IDS)
    check_links(trajectories)
    present = set(trajectories.keys(True, True))
    keys = tuple(keys)
    for key in keys:
        if key not in present:
            raise KeyError(f"{key!r} is missing; there are {sorted(map(str, present))}")
        dtype = trajectories.get(key).dtype
        if not dtype.is_floating_point:
            raise ValueError(f"{key!r} must be floating point, it is {dtype}")
    for key in (*keys, *_NUMBERS):
        if key in present:
            _check_values(trajectories.get(key), segments, key)
        if key in present and key in _NUMBERS:
            fit(trajectories.get(key), segments.shape, repr(key))
    if MULTIPLICITY in present:
        check_multiplicity(trajectories.get(MULTIPLICITY), segments, repr(MULTIPLICITY))
    if DATA_WEIGHT in present:
        weight = fit(trajectories.get(DATA_WEIGHT), segments.shape, repr(DATA_WEIGHT))
        check_data_weights(segments.where_valid(weight), repr(DATA_WEIGHT))
    check_valid_steps(segments, repr(MASK))


def check_valid_steps(segments: Segments, name: str) -> None:
    """Refuse a trajectory without a valid step; ``name`` is that of its mask."""
    empty = segments.without_valid_step
    if len(empty):
        problem = f"trajectory {int(empty[0])} has every step masked"
        raise ValueError(f"{problem}; drop it, or correct its mask ({name})")


def check_multiplicity(multiplicity: Tensor, segments: Segments, name: str) -> None:
    """Refuse multiplicities that do not count draws: whole numbers from 0 on, one a trajectory."""
    if multiplicity.is_floating_point() or multiplicity.dtype == torch.bool:
        raise ValueError(f"{name} must hold whole numbers, it holds {multiplicity.dtype}")
    steps = segments.valid.reshape(-1).nonzero().squeeze(1)
    count, index = fit(multiplicity, segments.shape, name).reshape(-1)[steps], segments.index[steps]
    if bool((count < 0).any()):
        raise ValueError(f"{name} counts draws, it can't be negative")
    varies = (count[1:] != count[:-1]) & (index[1:] == index[:-1])
    if bool(varies.any()):
        step = int(steps[1:][varies][0])
        raise ValueError(f"{name} changes within a trajectory, first at step {step}")


def check_data_weights(weight: Tensor, name: str) -> None:
    """Refuse the data weights of a whole dataset if one is NaN or infinite, or all are 0."""
    bad = (~weight.isfinite()).nonzero()
    if len(bad):
        places = f"in {len(bad)} places, first {bad[0].tolist()}"
        raise ValueError(f"{name} is NaN, infinite or beyond float32 {places}")
    if not bool(weight.any()):
        raise ValueError(f"{name} is 0 everywhere, so there is nothing to train on")


def beyond_float32(numbers: Tensor) -> Tensor:
    """Which float64 numbers are infinite in float32, or 0 though they are not."""
    rounded = numbers.float()
    return ~rounded.isfinite() | ((rounded == 0) & (numbers != 0))


def _check_values(value: Tensor, segments: Segments, key: NestedKey) -> None:
    """Refuse what is not one row a step, or not finite on valid steps."""
    shape = segments.shape
    if value.shape[: len(shape)] != shape:
        raise ValueError(f"{key!r} has shape {list(value.shape)}; it must start with {list(shape)}")
    rows = value.reshape(shape.numel(), -1).isfinite().all(-1)
    bad = torch.nonzero(~rows & segments.valid.reshape(-1))
    if len(bad):
        first = int(bad[0])
        raise ValueError(f"{key!r} is NaN or infinite (steps: {len(bad)}), first at step {first}")
