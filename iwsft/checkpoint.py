"""The state of a training run on disk."""

from __future__ import annotations

import errno
import io
import json
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from os.path import commonprefix
from pathlib import Path
from typing import Any

from iwsft import files

FOLDER = "checkpoint"
FILE = "state.pt"
# What zipfile and torch raise for damaged archives and for other files of torch's.
CORRUPT = (
    *(zipfile.BadZipFile, zlib.error, struct.error, pickle.UnpicklingError, EOFError),
    *(AttributeError, LookupError, OverflowError, RuntimeError, TypeError, ValueError),
)
# Bit of an archive's entry, in the way of MS-DOS.
_FOLDER = 0x10


class CheckpointError(ValueError):
    """A checkpoint or a folder of a run is corrupt, or belongs to other settings."""


def save(folder: Path, state: dict[str, Any], settings: dict[str, Any]) -> None:
    """Write a state (tensors and plain values) with its settings, whole or not at all."""
    write(folder / FILE, {"state": state, "settings": _text(settings)})


def _text(settings: dict[str, Any]) -> str:
    """Settings as JSON; a TypeError names those that JSON does not have, such as a tensor."""
    try:
        return json.dumps(settings, sort_keys=True)
    except TypeError as error:
        raise TypeError(f"settings={settings!r:.80} must be plain values: {error}") from error


def load(folder: Path, settings: dict[str, Any]) -> dict[str, Any] | None:
    """Read a state that :func:`save` wrote; None where there is no checkpoint.

    A CheckpointError says that it is corrupt, or which settings differ; a TypeError, that
    :func:`save` could not write these.
    """
    _text(settings)
    path = folder / FILE
    if not path.exists():
        return None
    way_out = f"delete its folder {folder} to start afresh"
    content = read(path, way_out)
    if content.keys() != {"state", "settings"}:
        raise CheckpointError(f"{path} is corrupt (it holds {list(content)}); {way_out}")
    differ = differences(json.loads(content["settings"]), settings)
    if differ:
        problem = f"belongs to a run with other settings: {differ}"
        raise CheckpointError(f"{path} {problem}; choose another folder (--out)")
    return content["state"]


def write(path: Path, content: dict[str, Any]) -> None:
    """Write tensors and plain values, whole or not at all."""
    # Here, so that commands find the runs of a folder without it.
    import torch

    # Through memory: torch's own writer turns a full disk into an unspecific RuntimeError.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    files.write(path, buffer.getbuffer())


def read(path: Path, way_out: str) -> dict[str, Any]:
    """Read a file that :func:`write` wrote, onto the CPU.

    Raises:
        CheckpointError: The file is damaged, or of another kind; ``way_out`` says what to do.
    """
    import torch

    try:
        # `torch.load` does not compare the entries of its archive with their checksums.
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
            if broken is not None:
                raise zipfile.BadZipFile(f"{broken} does not fit its checksum")
            # Of an entry that is marked as a folder it reads nothing, into memory that is not set.
            if any(entry.external_attr & _FOLDER for entry in archive.infolist()):
                raise zipfile.BadZipFile("an entry is marked as a folder")
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (*CORRUPT, OSError) as error:
        # Places outside of the file, not a disk that can't be read.
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise
        problem = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is corrupt ({problem}); {way_out}") from error
    return content


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    """Name the differences of two trees of settings: ``name=stored (now wanted), ...``.

    The text is empty where they are equal. Values are compared as JSON: a tuple equals a list. NaN
    equals itself.
    """
    trees = (json.loads(json.dumps(tree), parse_constant=_constant) for tree in (stored, wanted))
    old, new = (dict(leaves(tree)) for tree in trees)
    names = sorted(name for name in {*old, *new} if old.get(name) != new.get(name))
    pairs = [(name, old.get(name), new.get(name)) for name in names]
    return ", ".join(f"{name}={_shown(a, b)} (now {_shown(b, a)})" for name, a, b in pairs)


def _constant(text: str) -> float | str:
    """A number that JSON lacks; NaN, which does not equal itself, stays a text."""
    return text if text == "NaN" else float(text)


def leaves(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Iterate over the values of a tree of settings, each with its names as ``outer.inner``."""
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{above}{name}.")
        else:
            yield above + name, value


def _shown(value: Any, other: Any) -> str:
    """A value as text; of a long one the part around the first difference from another."""
    text, length = repr(value), 24
    if len(text) <= length:
        return text
    start = max(0, len(commonprefix([text, repr(other)])) - length // 2)
    end = start + length
    return "..." * (start > 0) + text[start:end] + "..." * (end < len(text))
