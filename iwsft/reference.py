"""The reference: log pi_ref of every step, computed once and cached on disk."""

from __future__ import annotations

import hashlib
import io
import itertools
import json
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from iwsft.distributed import from_first, gathered, rank_and_world
from iwsft.files import written_whole
from iwsft.fingerprint import fingerprint
from iwsft.forward_pass import Collate, ForwardPass
from iwsft.policies.causal_lm import CausalLMPolicy
from iwsft.policies.causal_lm_families import decoder_of
from iwsft.trajectory import (
    ASSISTANT_MASK,
    ATTENTION_MASK,
    IMPORTANCE_WEIGHT,
    MULTIPLICITY,
    REF_LOG_PROB,
    TOKENS,
    TRAJ_IDS,
    Segments,
)

_log = logging.getLogger(__name__)
# Rounds of batches after which the progress of a pass is saved.
_PART = 16
_CHECKSUM_BYTES = hashlib.sha256().digest_size
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def annotate_reference(
    policy: Any,
    trajectories: TensorDictBase,
    *,
    batches: Sequence[Sequence[int]] = (),
    collate: Collate = torch.cat,  # type: ignore[assignment]
    cache: str | Path | None = None,
    rows: int = 8192,
) -> TensorDictBase:
    """Write log pi_ref(a|s) of every step into the trajectories, as ``ref_log_prob``.

    The policy runs in eval mode and without gradient, with PEFT adapters turned off. In a
    distributed run all processes must call this with the same trajectories: they share the work,
    and all get the result. The model may be sharded by DeepSpeed or FSDP2.

    If ``batches`` are the micro-batches that training begins with, the first update's weights are
    exactly 1 (for a model without dropout, in float32 or less).

    With ``cache``, the result is stored in that folder under a key of everything it depends on:
    data, batches, weights, settings, precision, versions, and the log-probs of the first batch,
    which therefore runs in any case. Progress is stored too, so that a killed pass continues.

    Args:
        policy: pi_ref, an object with ``log_prob(trajectories)``; with a cache, a module.
        trajectories: Packed or padded trajectories, changed in place.
        batches: Positions of the trajectories of each batch, with those of all processes in turns.
            Trajectories that are in none follow in batches of similar length. Without batches,
            chunks in the order of the data are run, or for tokens batches of similar length.
        collate: Makes one of the ``batches`` of packed trajectories, see
            :class:`~iwsft.forward_pass.ForwardPass`.
        cache: Folder of stored results, made if it is missing; None stores nothing.
        rows: Steps of a chunk, or of a batch of similar length, at most; a longer trajectory is
            not cut.

    Returns:
        ``trajectories``, with ``ref_log_prob`` float32, one number per step, 0 off the mask.

    Raises:
        TypeError: The policy has no ``log_prob``, or is not a module and there is a cache.
        ValueError: Log-probs are not finite or not one per step; the trajectories are locked, or
            not the same on all processes; or a stored file is corrupt.
        OSError: The cache can't be written; no half-written file stays.

    Warns:
        UserWarning: Adapters change the log-probs already, so the first weights are not 1.
    """
    # Chunks in the order of the data, unless padding would then be large.
    tokens = TOKENS in trajectories.keys(True) and trajectories.batch_dims == 1
    forward = ForwardPass(
        policy,
        trajectories,
        batches if batches or tokens else None,
        collate=collate,
        rows=rows,
        complete=True,
        shared=True,
    )
    log_prob, _ = reference_log_prob(forward, cache=cache)
    return trajectories.set(REF_LOG_PROB, log_prob)


def reference_log_prob(
    forward: ForwardPass, *, cache: str | Path | None = None
) -> tuple[Tensor, str | None]:
    """log pi_ref of every step, and the key under which it is stored.

    A resumed run, whose model has changed, gets the same log-probs by :func:`cached_reference`.

    Args:
        forward: Pass of pi_ref over the trajectories, shared by all processes.
        cache: As for :func:`annotate_reference`, which also lists the errors.
    """
    policy, trajectories = forward.policy, forward.trajectories
    if trajectories.is_locked:
        raise ValueError(
            "these trajectories are locked, so ref_log_prob can't be written into them; pass "
            "trajectories.copy(), which shares their memory"
        )
    if cache is not None:
        if not isinstance(policy, nn.Module):
            raise TypeError(
                f"the key of a cached reference contains a module's weights, and "
                f"{type(policy).__name__} is not a torch.nn.Module; pass cache=None"
            )
        # Before the pass, so that a folder that can't be made costs nothing.
        from_first(lambda: Path(cache).mkdir(parents=True, exist_ok=True))
    _, world = rank_and_world()
    data = _data_digest(trajectories) if cache is not None or world > 1 else ""
    _check_same(data)
    adapted = isinstance(policy, CausalLMPolicy) and bool(_adapter_tensors(policy))
    with policy.reference() if adapted else nullcontext():
        head = forward.run_mine(0)
        store = None
        if cache is not None:
            store = _Store(Path(cache), f"{data}-{_rest_digest(forward, head)}")
        log_prob = _run(forward, head, store)
    if adapted:
        _check_adapters(forward, head)
    return log_prob, None if store is None else store.key


def cached_reference(trajectories: TensorDictBase, key: str, *, cache: str | Path) -> None:
    """Write a stored reference into the trajectories, for a resumed run, whose model has changed.

    Args:
        trajectories: Those that were annotated, changed in place.
        key: Key from :func:`reference_log_prob`.
        cache: Folder of stored results; the first process reads it.

    Raises:
        FileNotFoundError: The stored file is gone.
        ValueError: It is corrupt, or belongs to other trajectories.
    """
    if _data_digest(trajectories) != key.split("-")[0]:
        raise ValueError(
            f"the reference {key} of this run belongs to other trajectories, or comes from an "
            "earlier version of iwsft; resume with the version, data, tokenizer, template and "
            "max_length of the first run"
        )
    path = _Store(Path(cache), key).path()
    way_out = (
        "this run's model has moved, so it can't be computed again from it: put a copy of the file "
        "back, or start afresh with another output folder"
    )

    def read() -> Tensor:
        if not path.exists():
            raise FileNotFoundError(f"the reference of this run, {path}, is gone; {way_out}")
        return _read_log_prob(path, way_out)

    device = Segments.of(trajectories).index.device
    trajectories.set(REF_LOG_PROB, from_first(read).to(device))


def _run(forward: ForwardPass, head: Tensor, store: _Store | None) -> Tensor:
    """Run what is not stored; the log-probs in the layout of the trajectories."""
    device = Segments.of(forward.trajectories).index.device
    starts = range(0, forward.rounds, _PART)
    stored, parts = (None, []) if store is None else from_first(lambda: store.read(starts))
    if stored is not None:
        return stored.to(device)
    for start in starts[len(parts) :]:
        stop = min(start + _PART, forward.rounds)
        part = forward.run(start, stop, first=head).float()
        _check_finite(part, forward.steps(start, stop), forward.trajectories)
        parts.append(part)
        if store is not None and stop < forward.rounds:
            from_first(lambda: store.write(part, start))  # noqa: B023
            _log.info("reference: %d of %d rounds of batches", stop, forward.rounds)
    log_prob = forward.placed(torch.cat(parts)).to(device)
    if store is not None:
        from_first(lambda: store.write(log_prob))
    return log_prob


@dataclass(frozen=True)
class _Store:
    """Files of a pass: the whole result, or the parts that are done."""

    folder: Path
    key: str

    def path(self, part: int | str | None = None) -> Path:
        """File of the whole result, or of the part that begins at a round."""
        name = "" if part is None else f".rounds-{part}-of-{_PART}"
        return self.folder / f"ref_log_prob-{self.key}{name}.npy"

    def read(self, starts: Sequence[int]) -> tuple[Tensor | None, list[Tensor]]:
        """The whole result; or None, and the parts that are stored, from the first one on."""
        if self.path().exists():
            return _read_log_prob(self.path()), []
        stored = itertools.takewhile(lambda start: self.path(start).exists(), starts)
        try:
            return None, [_read_log_prob(self.path(start)) for start in stored]
        except FileNotFoundError:
            # Another process has just replaced the parts by the whole result.
            return _read_log_prob(self.path()), []

    def write(self, log_prob: Tensor, part: int | None = None) -> None:
        """Store a part, or the whole result, which replaces its parts, as ``.npy`` and checksum."""
        buffer = io.BytesIO()
        np.save(buffer, log_prob.cpu().numpy(), allow_pickle=False)
        body = buffer.getvalue()
        path = self.path(part)
        with written_whole(path) as partial:
            # After the array, where readers of .npy do not look.
            partial.write_bytes(body + _checksum(path, body))
        for old in self.folder.glob(self.path("*").name) if part is None else ():
            old.unlink(missing_ok=True)


def _read_log_prob(path: Path, way_out: str = "delete the file and run again") -> Tensor:
    content = path.read_bytes()
    body, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
    if _checksum(path, body) != checksum:
        raise ValueError(
            f"the reference stored in {path} is corrupt or belongs elsewhere (its checksum does "
            f"not fit); {way_out}"
        )
    return torch.from_numpy(np.load(io.BytesIO(body), allow_pickle=False))


def _checksum(path: Path, body: bytes) -> bytes:
    return hashlib.sha256(path.name.encode() + body).digest()


# ---- the key ----


def _data_digest(trajectories: TensorDictBase) -> str:
    """Digest of the entries that log pi(a|s) depends on; a key begins with it."""
    if TOKENS in trajectories.keys(True):
        inputs = trajectories.select(TOKENS, ATTENTION_MASK, ASSISTANT_MASK, TRAJ_IDS, strict=False)
    else:
        inputs = trajectories.exclude("next", REF_LOG_PROB, MULTIPLICITY, IMPORTANCE_WEIGHT)
    return fingerprint(dict(inputs.flatten_keys("/").items()))[:16]


def _rest_digest(forward: ForwardPass, head: Tensor) -> str:
    """Digest of everything else, the same on all processes."""
    policy = forward.policy
    # The first log-probs show what is not listed: code, kernels, hardware.
    mine = fingerprint({"weights": _weights_digest(policy), "head": head})
    tensor = next(itertools.chain(policy.parameters(), policy.buffers()), None)
    device = "cpu" if tensor is None else tensor.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    rest = {
        "batches": forward.batches,
        "collate": _ADDRESS.sub("", repr(forward.collate)),
        "settings": list(_settings(policy)),
        "device": [device, torch.get_float32_matmul_precision(), autocast],
        "torch": torch.__version__,
        "ranks": gathered(mine),
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
                yield f"{attribute}={_ADDRESS.sub('', repr(value))}"
    if isinstance(policy, CausalLMPolicy):
        import transformers

        decoder = decoder_of(policy.model)
        config = decoder.config.to_dict()
        for irrelevant in ("_name_or_path", "use_cache"):
            config.pop(irrelevant, None)
        yield f"{type(policy.model).__qualname__} {type(decoder).__qualname__}"
        yield json.dumps(config, sort_keys=True, default=str)
        yield f"{decoder.config._attn_implementation} {transformers.__version__}"


def _weights_digest(policy: nn.Module) -> str:
    for module in policy.modules():
        # FSDP2 keeps the outermost parameters gathered after a forward without backward.
        reshard = getattr(module, "reshard", None)
        if callable(reshard):
            reshard()
    adapters = _adapter_tensors(policy)
    named = itertools.chain(policy.named_parameters(), policy.named_buffers())
    return fingerprint({name: _local_shard(x) for name, x in named if id(x) not in adapters})


def _local_shard(tensor: Any) -> Tensor:
    """What this process holds of a parameter or buffer: a view; all of it if it is not sharded."""
    shard = getattr(tensor, "ds_tensor", None)
    if shard is not None:
        if shard.status.name != "AVAILABLE":
            raise ValueError(
                "DeepSpeed keeps these parameters on NVMe, so they can't be looked at; pass "
                "cache=None, or offload parameters to the CPU"
            )
        # The last shards end in padding that is never written.
        left = tensor.ds_numel - shard.ds_numel * tensor.ds_zero_partition_rank
        return shard.detach().reshape(-1)[: max(left, 0)]
    # A DTensor (FSDP2) has a local part.
    local: Tensor = getattr(tensor, "to_local", lambda: tensor)()
    return local.detach()


# ---- adapters ----


def _adapter_tensors(policy: nn.Module) -> set[int]:
    """Ids of PEFT's own tensors, which the model without adapters does not use."""
    ids: set[int] = set()
    for module in policy.modules():
        for name in getattr(module, "adapter_layer_names", ()):
            part = getattr(module, name, None)
            if isinstance(part, nn.Module):
                ids.update(map(id, itertools.chain(part.parameters(), part.buffers())))
    return ids


def _check_adapters(forward: ForwardPass, head: Tensor) -> None:
    """Warn of adapters that change the log-probs already."""
    parameters = forward.policy.parameters()
    dtypes = {head.dtype, *(p.dtype for p in parameters if p.is_floating_point())}
    # Half the digits, for kernels differ.
    tolerance = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5
    changed = not torch.allclose(forward.run_mine(0), head, rtol=tolerance, atol=tolerance)
    if any(gathered(changed)):
        warnings.warn(
            "the adapters change the log-probs already; the reference is the model without them, "
            "so the first weights are not 1. To take the model as it is for the reference, "
            "merge them into it (merge_and_unload()) and add new ones",
            UserWarning,
            stacklevel=4,
        )


# ---- checks ----


def _check_same(data: str) -> None:
    everyone = gathered(data)
    if len(set(everyone)) > 1:
        odd = next(rank for rank, other in enumerate(everyone) if other != everyone[0])
        raise ValueError(
            f"process {odd} holds other trajectories than process 0; read and tokenise the same "
            "data on all of them, in the same order"
        )


def _check_finite(log_prob: Tensor, steps: Tensor, trajectories: TensorDictBase) -> None:
    bad = (~log_prob.isfinite()).nonzero().squeeze(1).cpu()
    if len(bad) == 0:
        return
    step = int(steps[bad[0]])
    index = Segments.of(trajectories).index.cpu()
    first = int((index == index[step]).nonzero()[0])
    traj_id = int(trajectories.get(TRAJ_IDS, index).reshape(-1)[step])
    raise ValueError(
        f"the reference gives log-prob {float(log_prob[bad[0]])} at step {step - first} of "
        f"trajectory {traj_id}, and {len(bad)} of {len(steps)} log-probs are not finite: look for "
        "NaN in that trajectory and in the policy's weights; clip actions to where the "
        "distribution has a density; in float16, use bfloat16 or float32"
    )
