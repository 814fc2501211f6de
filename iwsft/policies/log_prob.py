"""log pi(a|s) of a whole dataset, chunk by chunk and without gradient."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn

from iwsft.trajectory import Segments

# Matrix products of 1 to 4 rows take another kernel, whose last bits differ from the rest.
_LEAST_STEPS = 16


def chunked_log_prob(
    policy: Any,
    trajectories: TensorDictBase,
    *,
    rows: int = 8192,
    segments: Segments | None = None,
) -> Tensor:
    """log pi(a|s) of every step, in eval mode, under ``no_grad``, in chunks of whole trajectories.

    Args:
        policy: anything with ``log_prob(trajectories)``, one number a step. It is given a shallow
            copy of each chunk, so what it writes there does not reach ``trajectories``.
        trajectories: packed or padded.
        rows: steps of a chunk. A trajectory (a row of a padded batch) is never cut, so a longer
            one makes a longer chunk; a remainder of a few steps joins its neighbour.
        segments: layout and mask of ``trajectories``, where they are not those of the usual keys.

    Returns:
        ``[N]`` or ``[B, T]``, float32 or wider, 0 off the mask.

    Raises:
        TypeError: a policy without ``log_prob``, or one that gives no tensor.
        ValueError: ``rows`` below 1, no step at all, or log-probs that are not one number a step.
    """
    if not callable(getattr(policy, "log_prob", None)):
        raise TypeError(
            f"{type(policy).__name__} has no log_prob(trajectories); pass a GaussianPolicy, a "
            "TorchRL ProbabilisticActor, or any object with that method"
        )
    if rows < 1:
        raise ValueError(f"rows={rows} must be at least 1")
    if segments is None:
        segments = Segments.of(trajectories)
    if segments.shape.numel() == 0:
        raise ValueError("there is not a single step in these trajectories")
    with torch.no_grad(), evaluating(policy):
        parts = [
            step_log_prob(
                policy,
                trajectories[chunk],
                torch.Size((chunk.stop - chunk.start, *segments.shape[1:])),
            )
            for chunk in whole_trajectories(segments, rows)
        ]
    out = torch.cat(parts)
    # Not a product with the mask: padding may hold NaN or infinity.
    return out if segments.mask is None else torch.where(segments.valid, out, 0.0)


@contextmanager
def evaluating(policy: Any) -> Iterator[None]:
    """Put a module (if it is one) in eval mode, and after that each part in its own mode."""
    modules = list(policy.modules()) if isinstance(policy, nn.Module) else []
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def step_log_prob(policy: Any, batch: TensorDictBase, shape: torch.Size) -> Tensor:
    """``policy.log_prob`` of a batch, checked to be one number a step, float32 or wider.

    The policy is given a shallow copy: what it writes there (loc, scale) stays there.

    Args:
        policy: anything with ``log_prob(trajectories)``.
        batch: packed or padded.
        shape: layout of the batch.

    Raises:
        TypeError: the policy gives no tensor.
        ValueError: a tensor of another shape.
    """
    out = policy.log_prob(batch.copy())
    name = type(policy).__name__
    if not isinstance(out, Tensor):
        raise TypeError(f"{name}.log_prob must give a tensor, it gave {type(out).__name__}")
    if out.shape == (*shape, 1):
        out = out.squeeze(-1)
    if out.shape != shape:
        raise ValueError(
            f"{name}.log_prob has shape {list(out.shape)}, {list(shape)} was expected, one "
            "number a step; a distribution over several action dimensions must sum over them "
            "(torch.distributions.Independent, or torchrl.modules.IndependentNormal)"
        )
    return out.to(torch.promote_types(out.dtype, torch.float32))


def finite_padding(
    batch: TensorDictBase, segments: Segments, keys: Sequence[NestedKey]
) -> TensorDictBase:
    """A shallow copy with 0 for NaN and infinity on masked steps, where a gradient would meet them.

    Other values stay: a masked step may be context of a step that counts.

    Args:
        batch: with a mask.
        segments: its trajectories.
        keys: entries that the policy reads.
    """
    batch = batch.copy()
    layout = segments.shape
    for key in keys:
        value = batch.get(key, default=None)
        if value is None or value.shape[: len(layout)] != layout or not value.is_floating_point():
            continue
        valid = segments.valid.reshape(*layout, *[1] * (value.ndim - len(layout)))
        batch.set(key, torch.where(valid | value.isfinite(), value, 0.0))
    return batch


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
