"""The reference: log pi_ref of every step, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from iwsft.files import written_whole
from iwsft.fingerprint import fingerprint
from iwsft.policies.log_prob import chunked_log_prob, whole_trajectories
from iwsft.trajectory import IMPORTANCE_WEIGHT, MULTIPLICITY, REF_LOG_PROB, Segments

_DIGEST_BYTES = hashlib.sha256().digest_size
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")


def annotate_reference(
    policy: Any,
    trajectories: TensorDictBase,
    *,
    cache: str | Path | None = None,
    rows: int = 8192,
) -> TensorDictBase:
    """Write log pi_ref(a|s) of every step into the trajectories, as ``ref_log_prob``.

    The policy runs in eval mode, without gradient, chunk by chunk. With ``cache`` the result is
    kept in that folder under a key of the policy's weights and settings, the data, the precision,
    the device type and the torch version; the code of the policy is no part of it, so a kept
    result is compared with the policy on the first trajectories.

    Args:
        policy: pi_ref, anything with ``log_prob(trajectories)``; a module where there is a cache.
        trajectories: packed or padded; changed in place.
        cache: folder of kept results, made where it is missing; None keeps nothing.
        rows: steps of a forward pass; a longer trajectory is not cut.

    Returns:
        ``trajectories``, with ``ref_log_prob`` float32, one number a step, 0 off the mask.

    Raises:
        TypeError: a policy without ``log_prob``, or a cache for one that is no module.
        ValueError: log-probs that are not finite or not one a step, locked trajectories, or a
            kept file that is corrupt or does not fit the policy.
        OSError: the cache can't be written; nothing half-written stays.
    """
    check_unlocked(trajectories)
    if cache is None:
        trajectories.set(REF_LOG_PROB, _reference(policy, trajectories, rows))
        return trajectories
    if not isinstance(policy, nn.Module):
        raise TypeError(
            f"the cache is keyed by a module's weights and {type(policy).__name__} is no "
            "torch.nn.Module; pass cache=None"
        )
    folder = Path(cache)
    # Before the sweep, so that a folder that can't be made costs nothing.
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"ref_log_prob-{_key(policy, trajectories)}.npy"
    if path.exists():
        log_prob = read_log_prob(path)
        _check_fit(log_prob, policy, trajectories, path)
    else:
        log_prob = _reference(policy, trajectories, rows)
        write_log_prob(path, log_prob)
    trajectories.set(REF_LOG_PROB, log_prob.to(Segments.of(trajectories).index.device))
    return trajectories


def check_unlocked(trajectories: TensorDictBase) -> None:
    """Refuse trajectories that ``ref_log_prob`` can't be written into.

    Raises:
        ValueError: they are locked.
    """
    if trajectories.is_locked:
        raise ValueError(
            "these trajectories are locked, so ref_log_prob can't be written into them; pass "
            "trajectories.copy(), which shares their memory"
        )


def near(policy: nn.Module) -> float:
    """How far log-probs of the same policy may be apart: half the digits, for kernels differ."""
    precisions = [p.dtype for p in policy.parameters() if p.is_floating_point()]
    eps = max((torch.finfo(p).eps for p in precisions), default=0.0)
    return max(eps, torch.finfo(torch.float32).eps) ** 0.5


def write_log_prob(path: Path, log_prob: Tensor, *, label: str = "") -> None:
    """Keep log-probs as ``.npy`` with a checksum, whole or not at all.

    Args:
        path: the file.
        log_prob: any shape.
        label: what the file belongs to; whoever reads it must name the same.

    Raises:
        OSError: it can't be written; nothing half-written stays.
    """
    buffer = io.BytesIO()
    np.save(buffer, log_prob.cpu().numpy(), allow_pickle=False)
    body = buffer.getvalue()
    with written_whole(path) as partial:
        # After the array, where readers of .npy do not look.
        partial.write_bytes(body + _checksum(label, body))


def read_log_prob(
    path: Path, *, label: str = "", way_out: str = "delete the file and run again"
) -> Tensor:
    """Read what :func:`write_log_prob` kept, onto the CPU.

    Args:
        path: the file.
        label: what it must belong to.
        way_out: what to do about a damaged file, for the error.

    Raises:
        ValueError: the file is damaged, or belongs to something else.
    """
    content = path.read_bytes()
    body, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
    if _checksum(label, body) != digest:
        raise ValueError(
            f"the reference kept in {path} is corrupt or belongs elsewhere (its checksum does not "
            f"fit); {way_out}"
        )
    return torch.from_numpy(np.load(io.BytesIO(body), allow_pickle=False))


def _checksum(label: str, body: bytes) -> bytes:
    return hashlib.sha256(label.encode() + body).digest()


def _reference(policy: Any, trajectories: TensorDictBase, rows: int) -> Tensor:
    log_prob = chunked_log_prob(policy, trajectories, rows=rows).float()
    bad = (~log_prob.isfinite()).nonzero()
    if len(bad):
        raise ValueError(
            f"the reference gives log-prob {float(log_prob[tuple(bad[0])])} at step "
            f"{bad[0].tolist()} and NaN or infinity at {len(bad)} of {log_prob.numel()} steps; "
            "clean NaN out of the data, and clip actions to where the distribution has a density"
        )
    return log_prob


def _key(policy: nn.Module, trajectories: TensorDictBase) -> str:
    digest = hashlib.sha256()
    for part in (*_precision(policy), *_settings(policy), *_contents(policy, trajectories)):
        digest.update(f"{part}\n".encode())
    return digest.hexdigest()


def _precision(policy: nn.Module) -> Iterator[str]:
    tensors = [*policy.parameters(), *policy.buffers()]
    device = tensors[0].device.type if tensors else "cpu"
    yield f"torch {torch.__version__} {device} {torch.get_float32_matmul_precision()}"
    if torch.is_autocast_enabled(device):
        yield f"autocast {torch.get_autocast_dtype(device)}"


def _settings(policy: nn.Module) -> Iterator[str]:
    """Class and public attributes of each part, such as a clamp that is no parameter."""
    for name, module in policy.named_modules():
        yield f"{name} {type(module).__module__}.{type(module).__qualname__}"
        for attribute, value in sorted(vars(module).items()):
            if not attribute.startswith("_") and attribute != "training":
                yield f"{attribute}={_ADDRESS.sub('', repr(value))}"


def _contents(policy: nn.Module, trajectories: TensorDictBase) -> Iterator[str]:
    yield fingerprint(policy.state_dict())
    # What comes after a step, and what is ours, has no part in log pi_ref(a|s).
    data = trajectories.exclude("next", REF_LOG_PROB, MULTIPLICITY, IMPORTANCE_WEIGHT)
    yield fingerprint(dict(data.flatten_keys("/").items()))


def _check_fit(
    log_prob: Tensor, policy: nn.Module, trajectories: TensorDictBase, path: Path
) -> None:
    """Compare a kept result with the policy on the first trajectories."""
    segments = Segments.of(trajectories)
    head = next(whole_trajectories(segments, 1))
    now = chunked_log_prob(policy, trajectories[head]).float().cpu()
    close = near(policy)
    fits = log_prob.shape == segments.shape and torch.allclose(
        log_prob[head], now, rtol=close, atol=close
    )
    if not fits:
        raise ValueError(
            f"the reference kept in {path} is not what the policy gives now: its code must have "
            "changed since; delete the file and run again"
        )
