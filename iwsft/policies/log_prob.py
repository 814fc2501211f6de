"""log pi(a|s) of a batch, checked and with harmless padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase, is_tensor_collection
from tensordict.nn import (
    CompositeDistribution,
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
)
from tensordict.utils import expand_as_right
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, constraints
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torchrl.modules import (
    BatchRenorm1d,
    MaskedOneHotCategorical,
    OneHotCategorical,
    TanhNormal,
    set_recurrent_mode,
)
from torchrl.modules.distributions import LLMMaskedCategorical

from iwsft.trajectory import OBSERVATION, Segments, on_host

# Rounding of actions at the bounds -1 and 1.
ROUNDING = 1e-5


@contextmanager
def evaluating(policy: Any) -> Iterator[None]:
    """Within, all parts of a module are in eval mode; at the end each has its own mode again."""
    modules = list(policy.modules()) if isinstance(policy, nn.Module) else []
    modes = [module.training for module in modules]
    for module in modules:
        module.training = False
    try:
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def noise_watch(policy: nn.Module, device: torch.device) -> Callable[[], bool]:
    """Return a function that says whether a policy has differed from itself in eval mode.

    It has where noise, such as dropout, was drawn since this call, or where statistics of the batch
    were taken into buffers. Looking at the generator's state and at the buffers finds all of it,
    also that of functions and hooks (NEFTune) and of normalisers of the user's own. While a graph
    is compiled or captured, only layers of torch are found.
    """
    if torch.compiler.is_compiling() or (
        device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    ):
        drops = any(m.training and isinstance(m, _DropoutNd) and m.p for m in policy.modules())
        differs = drops or takes_statistics(policy)
        return lambda: differs
    if device.type == "cpu":
        state = torch.get_rng_state
    else:
        state = partial(torch.get_device_module(device).get_rng_state, device)
    before, written = state(), _writes(policy)
    return lambda: not torch.equal(before, state()) or written != _writes(policy)


def takes_statistics(policy: nn.Module) -> bool:
    """Whether a layer of torch or TorchRL takes statistics of the batch, in train mode."""
    trained = [module for module in policy.modules() if module.training]
    return any(
        isinstance(m, BatchRenorm1d) or (isinstance(m, _NormBase) and m.track_running_stats)
        for m in trained
    )


def _writes(policy: nn.Module) -> list[tuple[int, int]]:
    """Where each buffer is, and how often it was written to."""
    return [(buffer.data_ptr(), buffer._version) for buffer in _buffers(policy)]


def _buffers(policy: nn.Module) -> list[Tensor]:
    return [buffer for buffer in policy.buffers() if not buffer.is_inference()]


@set_recurrent_mode(True)
def step_log_prob(policy: Any, batch: TensorDictBase, shape: torch.Size) -> Tensor:
    """``policy.log_prob`` of a batch of this layout, checked to be one number per step.

    The policy reads a shallow copy, so entries that it writes (loc, scale) do not reach the batch.
    The numbers are float32 or wider. It is -inf for actions that a distribution of torch or TorchRL
    can't give, and for which its own ``log_prob`` is that of another action.
    """
    try:
        return _step_log_prob(policy, batch.copy(), shape)
    except RuntimeError as error:
        # Not before: a policy may convert what it reads.
        if "type" in str(error) and isinstance(policy, nn.Module):
            own = next((p.dtype for p in policy.parameters()), torch.float32)
            for key in getattr(policy, "in_keys", [OBSERVATION]):
                if key in batch.keys(True):
                    _check_dtype(batch, key, own)
        raise


def _step_log_prob(policy: Any, batch: TensorDictBase, shape: torch.Size) -> Tensor:
    if getattr(type(policy), "log_prob", None) is not ProbabilisticTensorDictSequential.log_prob:
        return _checked(policy.log_prob(batch), policy, shape)
    _check_draws(policy)
    dist = policy.get_dist(batch)
    composite = isinstance(dist, CompositeDistribution)
    action = batch if composite else batch[policy.dist_sample_keys[0]]
    _check_broadcast(dist, action, shape)
    impossible = _impossible(dist, action, shape)
    if impossible is None:
        return _checked(policy.log_prob(batch, dist=dist), policy, shape)
    for key in policy.dist_sample_keys:
        # An index that does not exist would be torch's error, or get the log-prob 0.
        batch.set(key, batch.get(key).masked_fill(expand_as_right(impossible, batch.get(key)), 0))
    log_prob = _checked(policy.log_prob(batch, dist=dist), policy, shape)
    return log_prob.masked_fill(impossible, -torch.inf)


@set_recurrent_mode(True)
def step_log_prob_and_entropy(
    policy: Any, batch: TensorDictBase, shape: torch.Size, top_k: int | None
) -> tuple[Tensor, Tensor | None]:
    """:func:`step_log_prob`, and the entropy of the ``top_k`` likeliest actions; None for None."""
    if top_k is None:
        return step_log_prob(policy, batch, shape), None
    log_prob, entropy = policy.log_prob_and_entropy(batch.copy(), top_k=top_k)
    return _checked(log_prob, policy, shape), _checked(entropy, policy, shape)


def check_columns(
    batch: TensorDictBase, columns: Mapping[NestedKey, int], own: torch.dtype
) -> None:
    """Refuse entries with other columns; a density would broadcast actions to its own size.

    The first entry, which layers read, must have their ``own`` dtype.
    """
    for key, size in columns.items():
        shape = batch[key].shape
        if shape[-1:] != (size,):
            raise ValueError(f"{key!r} has shape {list(shape)}, but the policy has size {size}")
        if batch[key].dtype == torch.bool:
            way_out = f"trajectories[{key!r}] = trajectories[{key!r}].to({own})"
            raise ValueError(f"{key!r} is torch.bool, and the policy reads numbers: {way_out}")
    _check_dtype(batch, next(iter(columns)), own)


def _check_dtype(batch: TensorDictBase, key: NestedKey, own: torch.dtype) -> None:
    read = batch[key].dtype
    if read != own and not torch.is_autocast_enabled(batch[key].device.type):
        way_out = f"trajectories[{key!r}] = trajectories[{key!r}].to({own})"
        other = f", or policy.to({read})" if read.is_floating_point else ""
        raise ValueError(f"{key!r} is {read}, and the policy is {own}: {way_out}{other}")


def _check_draws(policy: ProbabilisticTensorDictSequential) -> None:
    """Refuse several draws where log p leaves one out, or reads another one than the data have."""
    modules = [*policy.modules()]
    draws = [i for i, m in enumerate(modules) if isinstance(m, ProbabilisticTensorDictModule)]
    if len(draws) < 2:
        return
    drawn = [key for i in draws for key in modules[i].dist_sample_keys]
    after = modules[draws[0] : draws[-1] + 1]
    read = {key for module in after for key in getattr(module, "in_keys", ())}
    if read.intersection(drawn) or not policy.return_composite:
        problem = f"{type(policy).__name__} draws {', '.join(map(repr, drawn))} in turn"
        lacks = "its log_prob does not have all of them as the data have them"
        way_out = "give it a method log_prob(trajectories) of your own, which adds them up"
        raise ValueError(f"{problem}, and {lacks}; {way_out}")


def _check_broadcast(dist: Any, action: Any, shape: torch.Size) -> None:
    """Refuse actions of another shape than the density's, which would broadcast them in silence."""
    if isinstance(dist, CompositeDistribution) and is_tensor_collection(action):
        for key, part in dist.dists.items():
            _check_broadcast(part, action.get(key, default=None), shape)
    # The event shape of torchrl's masked tokens is the vocabulary's, and not that of a token.
    if not isinstance(action, Tensor) or isinstance(dist, LLMMaskedCategorical):
        return
    event = dist.batch_shape[len(shape) :] + dist.event_shape
    if isinstance(dist, OneHotCategorical | MaskedOneHotCategorical):
        # Its own event shape is that of indices.
        event += (dist.num_samples,)
    if action.dtype == torch.bool and (event or not isinstance(dist, Categorical)):
        problem = f"actions are torch.bool, and {type(dist).__name__} needs numbers"
        raise ValueError(f"{problem}: make them floats, as action.float() does")
    if action.shape != shape + event:
        found, needed = list(action.shape), list(shape + event)
        one_each = ", one index or number for each step" if len(event) == 0 else ""
        name = type(dist).__name__
        raise ValueError(f"actions have shape {found}; {name} needs {needed}{one_each}")


def _impossible(dist: Any, action: Any, shape: torch.Size) -> Tensor | None:
    """Whether an action is taken for another one, bool in the layout of the batch; None for no."""
    if isinstance(dist, CompositeDistribution):
        parts = [_impossible(part, action.get(key), shape) for key, part in dist.dists.items()]
        found = [part for part in parts if part is not None]
        return torch.stack(found).any(0) if found else None
    if isinstance(dist, Independent):
        return _impossible(dist.base_dist, action, shape)
    if isinstance(dist, TanhNormal):
        # It takes those beyond its bounds for the bounds.
        margin = ROUNDING * (dist.high - dist.low) / 2
        wrong = (action < dist.low - margin) | (action > dist.high + margin)
    elif isinstance(dist, OneHotCategorical | MaskedOneHotCategorical):
        # The largest entry is taken for the 1.
        wrong = (action != 0) & (action != 1) | (action.sum(-1, keepdim=True) != 1)
    else:
        # Fractions of an index are left out, and padding is often -1 or -100.
        support = _support(dist)
        if support is None:
            return None
        wrong = ~support.check(action)
    return wrong.reshape(*shape, -1).any(-1)


def _support(dist: Any) -> constraints.Constraint | None:
    """What a distribution of torch can give, if that is not all numbers and is exact to check."""
    # Subclasses that scale or cut often have the support of what they are made of.
    plain = isinstance(dist, Categorical) or type(dist).__module__.startswith("torch.distributions")
    if not plain or getattr(dist, "_sparse_mask", False):
        return None
    support = dist.support
    # Sums to 1 and matrices are checked up to a rounding that data may exceed.
    exact = support.is_discrete or support.event_dim == 0
    known = exact and support is not constraints.real and not constraints.is_dependent(support)
    return support if known else None


def _checked(out: Any, policy: Any, shape: torch.Size) -> Tensor:
    name = type(policy).__name__
    if is_tensor_collection(out):
        problem = f"{name}.log_prob gives a TensorDict, one log-prob for each part of an action"
        way_out = "tensordict.nn.set_composite_lp_aggregate(True).set() before the policy is made"
        raise TypeError(f"{problem}; to add them up, call {way_out}")
    if not isinstance(out, Tensor):
        raise TypeError(f"{name}.log_prob must give a tensor, it gave {type(out).__name__}")
    if out.shape not in (shape, (*shape, 1)):
        problem = f"{name}.log_prob has shape {list(out.shape)}, not {list(shape)}"
        way_out = "sum over the action's dimensions (torchrl.modules.IndependentNormal)"
        raise ValueError(f"{problem}, one number per step; {way_out}")
    return out.reshape(shape).to(torch.promote_types(out.dtype, torch.float32))


def check_memory(policy: Any, batch: TensorDictBase, segments: Segments) -> None:
    """Refuse a trajectory that begins without TorchRL's mark, so that a memory leaks into it."""
    init = batch.get("is_init", default=None)
    if init is None or "is_init" not in getattr(policy, "in_keys", ()) or not on_host(init):
        return
    rows = segments.index.reshape(segments.shape if len(segments.shape) == 2 else (1, -1))
    leaks = (rows.diff(dim=1) > 0) & ~init.reshape(rows.shape).bool()[:, 1:]
    if bool(leaks.any()):
        row, step = leaks.nonzero()[0].tolist()
        where = f"step {step + 1}" if len(segments.shape) == 1 else f"step {step + 1} of row {row}"
        problem = f"a trajectory begins at {where} and has no 'is_init' there"
        leak = "the memory of the policy would go on from the trajectory before"
        raise ValueError(f"{problem}: {leak}; set 'is_init' there, or give each a row [B, T]")


@torch.no_grad()
def check_apart(
    policy: Any, batch: TensorDictBase, segments: Segments, device: torch.device | str | None = None
) -> bool:
    """Refuse a policy that looks across trajectories; whether the batch has two.

    The second trajectory of a packed batch, or row of a padded one, must have the log-probs that it
    has alone also behind the first, in eval mode. A policy with noise of its own passes, and so
    does one that fails on a part of a batch. Random state and buffers stay as they are.
    """
    rows = len(segments.shape) == 2
    index = torch.arange(segments.shape[0]) if rows else segments.index
    start, stop = torch.searchsorted(index, index.new_tensor([1, 2])).tolist()
    # Language models keep trajectories apart themselves, at the cost of long passes.
    if start == len(index) or not isinstance(policy, nn.Module) or hasattr(policy, "predicted"):
        return start < len(index)
    device = torch.device(device or segments.index.device)
    both, alone = batch[:stop].to(device), batch[start:stop].to(device)
    width = segments.shape[1:]
    kept = [(buffer, buffer.clone()) for buffer in _buffers(policy)]
    with torch.random.fork_rng([] if device.type == "cpu" else [device]), evaluating(policy):
        differs = noise_watch(policy, device)
        try:
            behind = step_log_prob(policy, both, torch.Size((stop, *width)))[start:]
            alone = step_log_prob(policy, alone, torch.Size((stop - start, *width)))
        except Exception:
            # Some policies read only whole batches. One that fails on these raises there.
            return True
        finally:
            noisy = differs()
            for buffer, value in kept if noisy else ():
                buffer.copy_(value)
    # A third of the digits: kernels differ, and a small std enlarges what they round.
    dtypes = {alone.dtype, *(p.dtype for p in policy.parameters() if p.is_floating_point())}
    if torch.is_autocast_enabled(device.type) or torch.get_float32_matmul_precision() != "highest":
        dtypes.add(torch.bfloat16)
    tolerance = max(torch.finfo(dtype).eps for dtype in dtypes) ** (1 / 3)
    near = torch.isclose(behind, alone, tolerance, tolerance, equal_nan=True)
    wrong = ~near & segments.valid[start:stop].to(device)
    if bool(wrong.any()) and not noisy:
        a, b = float(alone[wrong][0]), float(behind[wrong][0])
        name, one = type(policy).__name__, "row" if rows else "trajectory"
        problem = f"{name}.log_prob gives a step {a:.4g} in a {one} alone, {b:.4g} behind another"
        way_out = "a row is a trajectory: look for layers that read time first (batch_first=False)"
        if not rows:
            lie = "packed trajectories lie back to back: reset memory and attention at each start"
            way_out = f"{lie}, look for [N, 1] beside [N], or give padded rows [B, T]"
        raise ValueError(f"{problem}; {way_out}")
    return True


def finite_padding(
    batch: TensorDictBase, segments: Segments, keys: Sequence[NestedKey]
) -> TensorDictBase:
    """A shallow copy with 0 for NaN and infinity on masked steps, where a gradient would meet them.

    Only ``keys``, which the policy reads, are changed. Other values stay, because a masked step may
    be context of a step that counts.
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
