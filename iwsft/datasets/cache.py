"""Where downloaded and computed files are kept."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "IWSFT_CACHE"


def cache_folder(cache_dir: str | Path | None = None) -> Path:
    """The cache folder: ``cache_dir``, else the environment variable ``IWSFT_CACHE``, else
    ``iwsft`` in the user's cache (``$XDG_CACHE_HOME`` or ``~/.cache``). It may not exist yet.
    """
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    own = os.environ.get(CACHE_VARIABLE)
    if own:
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "iwsft"
