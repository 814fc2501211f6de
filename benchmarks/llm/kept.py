"""Folders that are written whole or not at all, and checked when they are used again."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock

from iwsft.files import full_disk_named, written_whole

RECORD = "record.json"
_SUMS = "sha256"


def kept(home: Path, make: Callable[[Path], Mapping[str, Any]], *, remake: str) -> Path:
    """The folder ``home``, made by ``make`` unless it is there and undamaged.

    Several processes may ask at a time: one makes it, the others wait.

    Args:
        home: the folder; what decides its content belongs into its name.
        make: fills an empty folder and returns what is worth noting; kept in ``record.json``
            beside the SHA-256 of every file.
        remake: how a user gets a damaged folder again, for the error.

    Raises:
        ValueError: a file of the folder is damaged, missing or new.
        OSError: the folder can't be written; nothing half-written takes its name.
    """
    with full_disk_named(home):
        home.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(home.with_name(f".{home.name}.lock")):
        if not home.exists():
            _make(home, make)
        else:
            _check(home, remake)
    return home


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _make(home: Path, make: Callable[[Path], Mapping[str, Any]]) -> None:
    partial = home.with_name(f".{home.name}.partial")
    # Of a process that was killed, as the lock is ours.
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with full_disk_named(home):
            partial.mkdir()
            notes = make(partial)
            with written_whole(partial / RECORD) as file:
                file.write_text(json.dumps({**notes, _SUMS: _sums(partial)}, indent=1) + "\n")
            partial.rename(home)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check(home: Path, remake: str) -> None:
    try:
        sums = json.loads((home / RECORD).read_text())[_SUMS]
        found = _sums(home)
        damaged = sorted(
            name for name in {*sums, *found} if sums.get(name) != found.get(name, "missing")
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{home / RECORD} is damaged ({type(error).__name__}: {error}); delete {home} and "
            f"{remake}"
        ) from error
    if damaged:
        raise ValueError(
            f"{home} is damaged: {', '.join(damaged)} changed since it was written; delete the "
            f"folder and {remake}"
        )


def _sums(home: Path) -> dict[str, str]:
    paths = sorted(path for path in home.rglob("*") if path.is_file() and path != home / RECORD)
    return {str(path.relative_to(home)): file_sha256(path) for path in paths}
