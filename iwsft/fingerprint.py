"""SHA-256 of tensors and plain values."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def fingerprint(entries: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hex) of names, dtypes, shapes and values, in the order of the names.

    Values that are not tensors count by their ``repr``.
    """
    digest = hashlib.sha256()
    for name, value in sorted(entries.items()):
        if not isinstance(value, Tensor):
            digest.update(f"{name} {value!r}\n".encode())
            continue
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        # As bytes: numpy has no bfloat16.
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()
