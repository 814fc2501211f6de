"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Write a file so that ``path`` has the old content or the new one, never a part.

    Args:
        path: The file; its folder is made where it is missing.

    Yields:
        The path of a partial file in the same folder. It replaces ``path`` when the block ends
        without an error, and is removed otherwise.

    Raises:
        OSError: No space is left; ``path`` is unchanged.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with full_disk_named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield partial
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def full_disk_named(path: Path) -> Iterator[None]:
    """Make the error of a full disk, quota or file-size limit name the file and the way out.

    Raises:
        OSError: The error, with the same number.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            reason = os.strerror(error.errno)
            raise OSError(
                error.errno,
                f"no space left to write {path} ({reason}); free some and run with --resume",
            ) from error
        raise
