"""The folder of downloaded and computed files."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "IWSFT_CACHE"


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """Return the cache folder, which may not exist yet.

    It is ``cache_dir``, else the environment variable ``IWSFT_CACHE``, else ``iwsft`` in the user's
    cache (``$XDG_CACHE_HOME`` or ``~/.cache``).
    """
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    folder = os.environ.get(CACHE_VARIABLE)
    if folder:
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "iwsft"
