"""Downloads over HTTP: from mirrors in order, resumed, checked, and moved into place."""

from __future__ import annotations

import errno
import hashlib
import http.client
import os
import shutil
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from iwsft.fingerprint import file_sha256
from iwsft.progress import Progress

ATTEMPTS = 3
TIMEOUT_SECONDS = 30
BLOCK = 1 << 20
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class _MirrorError(Exception):
    """A mirror did not deliver the file; the message says why."""


def fetch(
    urls: Sequence[str],
    target: Path,
    *,
    sha256: str | None = None,
    signature: bytes = b"",
) -> None:
    """Download a file unless it is there already.

    Where the transfer breaks off, the next attempt, in this call or a later one, asks for the rest
    only. The complete file is checked (the first bytes, which an error page does not have, and
    SHA-256), and then moved to ``target``. Processes that want the same file wait for each other.
    ``urls`` are mirrors, in the order to try.

    Raises:
        ConnectionError: No mirror delivered the file.
        OSError: The disk is full, or the folder cannot be written.
    """
    if target.is_file():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):
        if target.is_file():  # another process has downloaded it
            return
        hashes = [hashlib.sha256(url.encode()).hexdigest()[:8] for url in urls]
        parts = [target.with_name(f"{target.name}.{digest}.part") for digest in hashes]
        failures = []
        for url, part in zip(urls, parts, strict=True):
            try:
                _download(url, part)
                _check(part, sha256, signature)
            except _MirrorError as broken:
                failures.append(f"  {url}: {broken}")
                continue
            os.replace(part, target)
            for other in parts:
                other.unlink(missing_ok=True)
            return
    way_out = f"Run it again to resume, or put the file at {target}"
    raise ConnectionError("\n".join([f"could not download {target.name}:", *failures, way_out]))


def _download(url: str, part: Path) -> None:
    for attempt in range(1, ATTEMPTS + 1):
        before = _bytes(part)
        try:
            _transfer(url, part)
            return
        except (OSError, http.client.HTTPException) as error:
            if isinstance(error, OSError) and error.errno in _DISK_FULL:
                full = f"the disk is full while downloading to {part.parent} ({error.strerror})"
                way_out = "make room and run it again, or set IWSFT_CACHE to another folder"
                raise OSError(errno.ENOSPC, f"{full}; {way_out}") from error
            if isinstance(error, PermissionError) and error.filename is not None:
                raise  # a problem of the folder, not of the mirror
            received = _bytes(part)
            if attempt < ATTEMPTS and received > before:
                continue  # it made progress
            rest = f"; {received:,} bytes came and are kept in {part}" if received else ""
            raise _MirrorError(f"{str(error) or type(error).__name__}{rest}") from error


def _transfer(url: str, part: Path) -> None:
    """Append the missing bytes to ``part``."""
    received = _bytes(part)
    headers = {"User-Agent": "iwsft"}
    if received:
        headers["Range"] = f"bytes={received}-"
    request = urllib.request.Request(url, headers=headers)
    try:
        response = urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS)
    except urllib.error.HTTPError as error:
        if error.code != http.client.REQUESTED_RANGE_NOT_SATISFIABLE or not received:
            raise
        if error.headers.get("Content-Range", "").rpartition("/")[2] == str(received):
            return  # the part is complete
        part.unlink()
        _transfer(url, part)
        return
    with response:
        if not response.headers.get("Content-Range", "").startswith(f"bytes {received}-"):
            received = 0  # the server sends the whole file
        announced = response.headers.get("Content-Length")
        total = None if announced is None else received + int(announced)
        missing, free = (total or received) - received, shutil.disk_usage(part.parent).free
        if missing > free:
            raise OSError(errno.ENOSPC, f"{missing:,} bytes are missing and {free:,} are free")
        with open(part, "ab" if received else "wb") as file, Progress() as progress:
            name = f"{part.name.removesuffix('.part')} (MB)"
            task = progress.add_task(name, total=total and total / 1e6, completed=received / 1e6)
            while block := response.read(BLOCK):
                file.write(block)
                progress.advance(task, len(block) / 1e6)
            file.flush()
            os.fsync(file.fileno())
    if total is not None and _bytes(part) < total:
        cut = f"the connection closed at {_bytes(part):,} of {total:,} bytes"
        raise http.client.HTTPException(cut)


def _check(part: Path, sha256: str | None, signature: bytes) -> None:
    """Check the complete file; a wrong one is deleted, as resuming can't mend it."""
    with open(part, "rb") as file:
        start = file.read(len(signature))
    digest = sha256 and file_sha256(part)
    if start == signature and digest == sha256:
        return
    part.unlink()
    fault = f"has SHA-256 {digest}, expected {sha256}"
    if start != signature:
        fault = "is of another format (an error page?)"
    raise _MirrorError(f"the file {fault}; it was deleted")


def _bytes(part: Path) -> int:
    return part.stat().st_size if part.exists() else 0
