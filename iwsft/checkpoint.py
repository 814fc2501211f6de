"""The state of a training run on disk."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path
from typing import Any

import torch

from iwsft.files import written_whole

FILE = "state.pt"


class CheckpointError(RuntimeError):
    """A checkpoint that can't be used: corrupt, or of other settings."""


def save(folder: Path, state: dict[str, Any], settings: dict[str, Any]) -> None:
    """Write ``state`` (tensors and plain values) and the settings it belongs to, atomically."""
    # Through memory: torch's own writer turns a full disk into an unspecific RuntimeError.
    buffer = io.BytesIO()
    torch.save({"state": state, "settings": json.dumps(settings, sort_keys=True)}, buffer)
    with written_whole(folder / FILE) as partial:
        partial.write_bytes(buffer.getbuffer())


def load(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Read the state written by :func:`save`; None where there is no checkpoint.

    Raises:
        CheckpointError: a corrupt file, or one of other settings; it names what differs.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        held = torch.load(path, map_location="cpu", weights_only=True)
        state, stored = held["state"], json.loads(held["settings"])
    except (RuntimeError, EOFError, KeyError, TypeError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} is corrupt ({type(error).__name__}); delete its folder to start afresh"
        ) from error
    wanted = json.loads(json.dumps(settings))
    differ = sorted(k for k in {*stored, *wanted} if stored.get(k) != wanted.get(k))
    if differ:
        was = ", ".join(f"{k}={stored.get(k)!r} (now {wanted.get(k)!r})" for k in differ)
        raise CheckpointError(
            f"{path} belongs to a run with other settings: {was}; run with those, or choose "
            "another --out"
        )
    return state
