"""The reference: log pi_ref of every step, computed once and cached on disk."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from iwsft import checkpoint
from iwsft.distributed import from_first, gathered, rank_and_world
from iwsft.fingerprint import fingerprint, text_of
from iwsft.forward_pass import ForwardPass
from iwsft.policies.causal_lm import CausalLMPolicy
from iwsft.policies.causal_lm_families import decoder_of
from iwsft.policies.log_prob import check_apart
from iwsft.trajectory import (
    ASSISTANT_MASK,
    ATTENTION_MASK,
    DATA_WEIGHT,
    GIVEN_REF_LOG_PROB,
    IMPORTANCE_WEIGHT,
    MULTIPLICITY,
    REF_LOG_PROB,
    TOKENS,
    TRAJ_IDS,
    Segments,
    fit,
)
from iwsft.validation import check_digits, check_links

_log = logging.getLogger(__name__)
# Rounds of batches after which the progress of a pass is saved.
_PART = 16


def annotate_reference(
    policy: Any,
    trajectories: TensorDictBase,
    *,
    cache: str | Path | None = None,
    rows: int = 8192,
) -> TensorDictBase:
    """Write log pi_ref(a|s) of every step into the trajectories, as ``ref_log_prob``.

    The policy runs in eval mode and without gradient, with PEFT adapters turned off. In a
    distributed run all processes must call this with the same trajectories, share the work, and get
    the result. The model may be sharded by DeepSpeed or FSDP2.

    Where the trajectories have ``given_ref_log_prob``, such as that of another policy that made a
    part of the data, it counts; steps where it is NaN get that of the policy.

    With ``cache``, the result is stored in that folder under a key of everything it depends on,
    the log-probs of the first batch included. A pass that was killed continues.

    Args:
        policy: pi_ref, an object with ``log_prob(trajectories)``; with a cache, a module.
        trajectories: Packed or padded trajectories, changed in place and returned; the entry is
            float32, one number per step, 0 off the mask.
        cache: Folder of stored results, made if it is missing; None stores nothing.
        rows: Most steps of a batch: a chunk in the order of the data, or tokens of trajectories of
            similar length. A longer trajectory is not cut.

    Raises:
        ValueError: Log-probs are not finite or not one per step, or depend on other trajectories;
            the trajectories are locked, or not the same on all processes.
        CheckpointError: A stored file is damaged.
    """
    check_links(trajectories)
    # Chunks in the order of the data, unless padding would then be large.
    tokens = TOKENS in trajectories.keys(True) and trajectories.batch_dims == 1
    batches = () if tokens else None
    write_reference(ForwardPass(policy, trajectories, batches, rows=rows, shared=True), cache=cache)
    return trajectories


def write_reference(forward: ForwardPass, *, cache: str | Path | None = None) -> str | None:
    """Write log pi_ref into the trajectories of a shared pass; the key under which it is stored.

    The errors are those of :func:`annotate_reference`.
    """
    policy, trajectories = forward.policy, forward.trajectories
    if trajectories.is_locked:
        raise ValueError("the trajectories are locked: pass trajectories.copy()")
    given = trajectories.get(GIVEN_REF_LOG_PROB, default=None)
    if given is not None:
        check_digits(given, repr(GIVEN_REF_LOG_PROB))
    if cache is not None:
        if not isinstance(policy, nn.Module):
            kind = type(policy).__name__
            raise TypeError(f"{kind} is not a torch.nn.Module with weights; pass cache=None")
        # Before the pass, so that a folder that can't be made costs nothing.
        from_first(lambda: Path(cache).mkdir(parents=True, exist_ok=True))
    data = _data_digest(trajectories) if cache is not None or rank_and_world()[1] > 1 else ""
    digests = gathered(data)
    if set(digests) != {data}:
        odd = next(rank for rank, other in enumerate(digests) if other != digests[0])
        way_out = "read and tokenise the same data on all of them, in the same order"
        raise ValueError(f"process {odd} holds other trajectories than process 0; {way_out}")
    check_apart(policy, trajectories, forward.segments, forward.device)
    adapted = isinstance(policy, CausalLMPolicy) and bool(adapter_parts(policy))
    with policy.reference() if adapted else nullcontext():
        first = forward.run(0, 1)
        key = path = None
        if cache is not None:
            key = f"{data}-{_rest_digest(forward, first)}"
            path = _path(cache, key)
        log_prob = _stored(path, lambda: forward.placed(_run(forward, first, path)))
    _set(trajectories, log_prob.to(forward.segments.index.device))
    if adapted:
        _check_adapters(forward, first)
    return key


def cached_reference(trajectories: TensorDictBase, key: str, *, cache: str | Path) -> None:
    """Write a stored reference into the trajectories, for a resumed run, whose model has changed.

    The key is that of :func:`write_reference`. Errors say that the stored file is gone, damaged, or
    of other trajectories.
    """
    if _data_digest(trajectories) != key.split("-")[0]:
        problem = f"the reference {key} of this run belongs to other trajectories or another iwsft"
        way_out = "the version, data, tokenizer, template and max_length of the first run"
        raise ValueError(f"{problem}; resume with {way_out}")
    path = _path(cache, key)
    way_out = "the model has moved: put a copy of the file back, or start afresh in another folder"
    log_prob = from_first(lambda: _read(path, way_out))
    if log_prob is None:
        raise FileNotFoundError(f"the reference of this run, {path}, is gone; {way_out}")
    _set(trajectories, log_prob.to(Segments.of(trajectories).index.device))


def _set(trajectories: TensorDictBase, log_prob: Tensor) -> None:
    """Write the reference; where the data give their own, that one counts."""
    given = trajectories.get(GIVEN_REF_LOG_PROB, default=None)
    if given is not None:
        given = fit(given, log_prob.shape, repr(GIVEN_REF_LOG_PROB))
        log_prob = torch.where(given.isnan(), log_prob, given)
    trajectories.set(REF_LOG_PROB, log_prob)


def _run(forward: ForwardPass, first: Tensor, path: Path | None) -> Tensor:
    """Log-probs of all rounds; ``first`` are those of the first one."""
    parts = [_part(forward, start, path) for start in range(1, forward.rounds, _PART)]
    return torch.cat([_check_finite(first, 0, forward), *parts])


def _part(forward: ForwardPass, start: int, path: Path | None) -> Tensor:
    """Log-probs of some rounds, stored beside the path of the result."""
    stop = min(start + _PART, forward.rounds)

    def run() -> Tensor:
        _log.info("reference: round %d of %d", start, forward.rounds)
        return _check_finite(forward.run(start, stop), start, forward)

    # The result would replace the last part at once.
    if path is None or stop == forward.rounds:
        return run()
    return _stored(path.with_suffix(f".{start}-{stop}.pt"), run)


def _path(cache: str | Path, key: str) -> Path:
    return Path(cache) / f"ref_log_prob-{key}.pt"


def _stored(path: Path | None, run: Callable[[], Tensor]) -> Tensor:
    """Log-probs from a file, or computed and stored there, in place of its parts."""
    if path is None:
        return run()
    log_prob = from_first(lambda: _read(path, "delete the file and run again"))
    if log_prob is None:
        log_prob = run()
        content = {"log_prob": log_prob.cpu(), "file": path.name}
        from_first(lambda: checkpoint.write(path, content))
    for part in path.parent.glob(f"{path.stem}.*-*.pt"):
        part.unlink(missing_ok=True)
    return log_prob


def _read(path: Path, way_out: str) -> Tensor | None:
    try:
        content = checkpoint.read(path, way_out)
    # Parts vanish when another process stores the result.
    except FileNotFoundError:
        return None
    if content.get("file") != path.name:
        raise checkpoint.CheckpointError(f"{path} is the copy of another file; {way_out}")
    return content["log_prob"]


def _data_digest(trajectories: TensorDictBase) -> str:
    """Digest of the entries that log pi(a|s) depends on; a key begins with it."""
    if TOKENS in trajectories.keys(True):
        inputs = trajectories.select(TOKENS, ATTENTION_MASK, ASSISTANT_MASK, TRAJ_IDS, strict=False)
    else:
        ours = (REF_LOG_PROB, GIVEN_REF_LOG_PROB, MULTIPLICITY, IMPORTANCE_WEIGHT, DATA_WEIGHT)
        inputs = trajectories.exclude("next", *ours)
    return fingerprint(dict(inputs.flatten_keys("/").items()))[:16]


def _rest_digest(forward: ForwardPass, first: Tensor) -> str:
    """Digest of everything else, the same on all processes."""
    device = torch.device(forward.device or "cpu").type
    rest = {
        # They show what is not listed: code, kernels, hardware.
        "first": first,
        "weights": gathered(_weights_digest(forward.policy)),
        "settings": [*_settings(forward.policy)],
        "batches": forward.batches,
        "collate": text_of(forward.collate),
        "precision": torch.get_float32_matmul_precision(),
        "autocast": torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
        "device": device,
        "torch": torch.__version__,
    }
    return fingerprint(rest)[:48]


def _settings(policy: nn.Module) -> Iterator[str]:
    """Classes and public attributes, such as a clamp that is not a parameter."""
    # Engines around a language model have attributes that change from run to run.
    parts = [("", policy)] if isinstance(policy, CausalLMPolicy) else policy.named_modules()
    for name, module in parts:
        yield f"{name} {type(module).__module__}.{type(module).__qualname__}"
        for attribute, value in sorted(vars(module).items()):
            if not attribute.startswith("_") and attribute != "training":
                yield f"{attribute}={text_of(value)}"
    if isinstance(policy, CausalLMPolicy):
        decoder = decoder_of(policy.model)
        # With transformers' version.
        config = {**decoder.config.to_dict(), "_name_or_path": "", "use_cache": False}
        yield f"{type(decoder).__qualname__} {decoder.config._attn_implementation} {config}"


def _weights_digest(policy: nn.Module) -> str:
    """Digest of what this process holds of the weights, without those of adapters."""
    for module in policy.modules():
        # FSDP2 keeps the outermost parameters gathered after a forward without backward.
        getattr(module, "reshard", lambda: None)()
    adapters = adapter_parts(policy)
    named = itertools.chain(policy.named_parameters(), policy.named_buffers())
    own = {name: x for name, x in named if adapters.isdisjoint(name.split("."))}
    return fingerprint({name: _local_shard(x) for name, x in own.items()})


def _local_shard(tensor: Any) -> Tensor:
    """What this process holds of a parameter or buffer: a view; all of it if it is not sharded."""
    shard = getattr(tensor, "ds_tensor", None)
    if shard is None:
        # A DTensor (FSDP2) has a local part.
        local: Tensor = getattr(tensor, "to_local", lambda: tensor)()
        return local.detach()
    if shard.status.name != "AVAILABLE":
        way_out = "pass cache=None, or offload them to the CPU"
        raise ValueError(f"DeepSpeed keeps these parameters on NVMe, out of reach; {way_out}")
    # The last shards end in padding that is never written.
    left = tensor.ds_numel - shard.ds_numel * tensor.ds_zero_partition_rank
    return shard.detach().reshape(-1)[: max(left, 0)]


def adapter_parts(policy: nn.Module) -> set[str]:
    """Names of modules and lists with PEFT's own tensors, which the model alone does not use."""
    return {part for m in policy.modules() for part in getattr(m, "adapter_layer_names", ())}


def _check_adapters(forward: ForwardPass, first: Tensor) -> None:
    """Warn of adapters that change the log-probs already."""
    parameters = forward.policy.parameters()
    dtypes = {first.dtype, *(p.dtype for p in parameters if p.is_floating_point())}
    # Half the digits, for kernels differ.
    tolerance = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5
    if not torch.allclose(forward.run(0, 1), first, rtol=tolerance, atol=tolerance):
        problem = "the adapters change the log-probs already, so the first weights are not 1"
        way_out = "to make them part of the reference, merge_and_unload() them and add new ones"
        warnings.warn(f"{problem}; {way_out}", UserWarning, stacklevel=4)


def _check_finite(log_prob: Tensor, start: int, forward: ForwardPass) -> Tensor:
    """The log-probs from round ``start`` on, as float32."""
    log_prob = log_prob.float()
    if bool(log_prob.isfinite().all()):
        return log_prob
    placed = forward.placed(log_prob, start).reshape(-1)
    bad = (~placed.isfinite()).nonzero().squeeze(1)
    step, index = bad[0], forward.segments.index
    within = int((index[:step] == index[step]).sum())
    traj_id = int(forward.trajectories.get(TRAJ_IDS, index).reshape(-1)[step])
    raise ValueError(
        f"the reference gives log-prob {float(placed[step])} at step {within} of trajectory "
        f"{traj_id}, and {len(bad)} of {len(log_prob)} log-probs are not finite: look for NaN "
        "there and in the policy's weights, for actions without a density, and for float16"
    )
