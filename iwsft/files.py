"""The cache folder, files that are written whole or not at all, and locks of folders."""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

# Of files in D4RL's layout.
HDF5_SUFFIXES = (".hdf5", ".h5")
_A_DAY = 24 * 60 * 60.0
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Return the folder of downloaded and computed files, which may not exist yet.

    It is ``cache_dir``, else the environment variable ``IWSFT_CACHE``, else ``iwsft`` in the user's
    cache (``$XDG_CACHE_HOME`` or ``~/.cache``).
    """
    chosen = cache_dir or os.environ.get("IWSFT_CACHE")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "iwsft"


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Write a file so that ``path`` has the old content or the new one, never a part.

    Its folder is made where it is missing. The block gets the path of a partial file in the same
    folder, which replaces ``path`` when the block ends without an error, and is removed otherwise.
    Partial files of ``path`` that a kill left behind are removed first.
    """
    with full_disk_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = new_partial(path)
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


def write(path: Path, content: str | bytes | memoryview) -> None:
    """Write a file of this content, whole or not at all."""
    with written_whole(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    write(path, json.dumps(content, indent=1) + "\n")


def write_json_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write a file with a line of JSON for each row, whole or not at all."""
    with written_whole(path) as partial, partial.open("w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


@contextmanager
def alone_in(folder: Path, *, wait: bool) -> Iterator[None]:
    """Keep other processes out of a folder, which this one may enter again.

    A folder in which this process may not write is read without a lock.
    """
    # Here, so that `import iwsft` stays light.
    from filelock import FileLock, Timeout

    with full_disk_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        yield
        return
    try:
        lock = FileLock(folder / ".lock", is_singleton=True).acquire(timeout=-1 if wait else 0)
    except Timeout as error:
        way_out = "wait for it or end it, then resume"
        raise FileExistsError(f"another process works in {folder}; {way_out}") from error
    with lock:
        yield


def new_partial(path: Path) -> Path:
    """Return a name beside ``path`` for this writer; remove what killed writers left at theirs."""
    for other in path.parent.glob(f".{glob.escape(path.name)}.*.partial"):
        if _abandoned(other):
            if other.is_dir():
                shutil.rmtree(other, ignore_errors=True)
            else:
                other.unlink(missing_ok=True)
    machine, process = _writer()
    # Threads, and processes of containers on a shared disk, may have the same process id.
    token = f"{machine}-{process}-{secrets.token_hex(4)}"
    return path.with_name(f".{path.name}.{token}.partial")


def _writer() -> tuple[str, int]:
    """Return this machine or container, and the id of this process there."""
    machine, process = os.uname().nodename, os.getpid()
    with suppress(OSError):
        machine += str(os.stat("/proc/self/ns/pid").st_ino)
        process = int(os.readlink("/proc/self"))
    return hashlib.blake2s(machine.encode(), digest_size=4).hexdigest(), process


def _abandoned(partial: Path) -> bool:
    """Whether the writer of a partial file is gone; elsewhere, whether it was silent for a day."""
    machine, _, process = partial.name.split(".")[-2].partition("-")
    number = process.partition("-")[0]
    try:
        if machine != _writer()[0] or not number.isdecimal():
            return time.time() - partial.stat().st_mtime > _A_DAY
        os.kill(int(number), 0)
    except (ProcessLookupError, FileNotFoundError):
        return True
    except PermissionError:
        # A living process of another user.
        pass
    return False


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Make the error of a full disk, quota or file-size limit name the file and the way out."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        problem = f"no space left to write {path} ({os.strerror(error.errno)})"
        raise OSError(error.errno, f"{problem}; free some and run with --resume") from error
