"""Folders that are written whole or not at all, and checked when they are used again."""

from __future__ import annotations

import errno
import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock
from safetensors import SafetensorError

from benchmarks.runs import write_json
from iwsft.files import full_disk_named

RECORD = "record.json"


def kept(home: Path, make: Callable[[Path], Mapping[str, Any]], *, remake: str) -> Path:
    """Make the folder ``home``, unless it is there and undamaged.

    Several processes may call this at a time: one makes the folder, the others wait. Its name must
    tell apart what decides its content. ``make`` fills an empty folder and returns what is worth
    noting, for ``record.json``, which also has the SHA-256 of every file. ``remake`` says in an
    error how a user gets a damaged folder again.
    """
    with full_disk_named(home):
        home.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(home.with_name(f".{home.name}.lock")):
        if home.exists():
            _check(home, remake)
            return home
        partial = home.with_name(f".{home.name}.partial")
        # A killed process left it, as the lock is ours.
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with full_disk_named(home):
                partial.mkdir()
                notes = make(partial)
                write_json(partial / RECORD, {**notes, "sha256": _sums(partial)})
                partial.rename(home)
        # Its own error of a full disk.
        except SafetensorError as error:
            raise OSError(
                errno.EIO,
                f"{home} can't be written ({error}); see whether there is space left, and run "
                "again",
            ) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return home


def file_sha256(path: Path) -> str:
    """Compute the SHA-256 of a file's content, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _check(home: Path, remake: str) -> None:
    try:
        recorded = json.loads((home / RECORD).read_text())["sha256"]
        changed = sorted(name for name, _ in recorded.items() ^ _sums(home).items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{home / RECORD} is damaged ({type(error).__name__}: {error}); delete {home} and "
            f"{remake}"
        ) from error
    if changed:
        raise ValueError(
            f"{home} is damaged: {', '.join(dict.fromkeys(changed))} changed since it was written; "
            f"delete the folder and {remake}"
        )


def _sums(home: Path) -> dict[str, str]:
    files = (path for path in home.rglob("*") if path.is_file() and path != home / RECORD)
    return {str(path.relative_to(home)): file_sha256(path) for path in sorted(files)}
