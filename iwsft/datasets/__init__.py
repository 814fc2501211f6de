"""Offline datasets: bundled ones, those of the results, D4RL by name or file, Minari.

    from iwsft import datasets

    data = datasets.load("hopper-replay-mini")            # bundled, no network; or "door-human"
    data = datasets.load("hopper-medium-expert")          # built by `iwsft collect sets`
    data = datasets.load("hopper-medium-replay-v2")       # D4RL: downloaded, checked and cached
    data = datasets.load("runs/mine.hdf5")                # a file in D4RL's layout
    data = datasets.load("mujoco/hopper/medium-v0")       # Minari (or "minari:NAME-v0")

A new source is one more module here whose ``read`` returns an :class:`OfflineDataset`.
"""

from __future__ import annotations

import difflib
import os.path
import warnings
from importlib import resources
from pathlib import Path
from typing import Any

from iwsft.datasets import d4rl, minari_store
from iwsft.datasets.actions import describe, scaled
from iwsft.datasets.catalog import CATALOG, reference_scores
from iwsft.datasets.dataset import WHOLE, OfflineDataset
from iwsft.files import HDF5_SUFFIXES, cache_folder

__all__ = [
    "BUNDLED",
    "COLLECTED",
    "DEFAULT",
    "OfflineDataset",
    "available",
    "cache_folder",
    "collected_file",
    "load",
    "reference_scores",
]

DEFAULT = "hopper-replay-mini"
BUNDLED = (DEFAULT, "door-human")
# Those of the results; ``iwsft collect sets`` builds them.
COLLECTED = (
    "hopper-replay",
    "halfcheetah-replay",
    "walker2d-replay",
    "hopper-medium-expert",
    "halfcheetah-medium-expert",
    "walker2d-medium-expert",
)

_HDF5_SIGNATURE = b"\x89HDF\r\n\x1a\n"
_MINARI_PREFIX = "minari:"


def available() -> list[str]:
    """Return the names of the bundled datasets, of those of the results, then those of D4RL."""
    return [*BUNDLED, *COLLECTED, *CATALOG]


def collected_file(name: str, cache_dir: str | Path | None = None) -> Path:
    """Return the file of one of ``COLLECTED`` in the cache folder, where it may not exist yet."""
    return cache_folder(cache_dir) / "collected" / f"{name}.hdf5"


def load(
    name_or_path: str | Path,
    *,
    cache_dir: str | Path | None = None,
    trust_env_module: bool = False,
    scale_actions: bool = False,
    data_weight: Any = None,
) -> OfflineDataset:
    """Load an offline dataset as packed trajectories.

    Args:
        name_or_path: Name of a bundled dataset, of the results or of D4RL, a Minari id such as
            ``mujoco/hopper/medium-v0`` (with the prefix ``minari:`` where the id has no slash), or
            a file in D4RL's HDF5 layout.
        cache_dir: Folder of downloads, see :func:`cache_folder`. Minari has its own store.
        trust_env_module: Whether a file may import the module that its ``env_id`` names
            (``module:id``), to learn the range of its actions.
        scale_actions: Whether to map actions of another range to [-1, 1], in which the policies of
            this library act. The environment of the dataset then maps them back: its
            ``env_kwargs`` have the bounds. Without it, a warning tells of another range.
        data_weight: Data weight of each step, which the loss reads: the name of a field of the
            file, such as ``infos/quality``, or an array with a number for each row (any float).

    Raises:
        ValueError: The name is unknown, or the contents cannot be trained on.
        FileNotFoundError: The file does not exist, or the set of the results is not built yet.
        ConnectionError: A download broke off; its part is kept.
    """
    data = _read(name_or_path, cache_dir, trust_env_module, data_weight)
    if data.action_bounds == WHOLE:
        return data
    if scale_actions:
        return scaled(data)
    bounds = f"the actions of {data.name} have the bounds {describe(data.action_bounds)}"
    warnings.warn(f"{bounds}, policies act in [-1, 1]: pass scale_actions=True", stacklevel=2)
    return data


def _read(
    name_or_path: str | Path, cache_dir: str | Path | None, trust_env_module: bool, weight: Any
) -> OfflineDataset:
    check_name(name_or_path, cache_dir)
    name = str(name_or_path)
    if name in BUNDLED:
        file = resources.files("iwsft.datasets") / "data" / f"{name}.hdf5"
        with resources.as_file(file) as path:
            source = f"iwsft.datasets/data/{name}.hdf5"
            return d4rl.read(path, name=name, source=source, data_weight=weight)
    if name in COLLECTED:
        path = collected_file(name, cache_dir)
        source = f"the set {name} of benchmarks.collect"
        return d4rl.read(path, name=name, source=source, data_weight=weight)
    if name in CATALOG:
        from iwsft.datasets import download  # network and progress code only where it is used

        entry = CATALOG[name]
        path = cache_folder(cache_dir) / "d4rl" / entry.filename
        download.fetch(entry.urls, path, sha256=entry.sha256, signature=_HDF5_SIGNATURE)
        return d4rl.read(path, name=name, source=entry.url, data_weight=weight)
    if isinstance(name_or_path, Path) or name.lower().endswith(HDF5_SUFFIXES):
        path = Path(os.path.expanduser(name_or_path))
        return d4rl.read(path, trust_env_module=trust_env_module, data_weight=weight)
    return minari_store.read(name.removeprefix(_MINARI_PREFIX), data_weight=weight)


def check_name(name_or_path: str | Path, cache_dir: str | Path | None = None) -> None:
    """Refuse what :func:`load` can't find by its name alone, before anything is read."""
    name = str(name_or_path)
    if name in COLLECTED and not (path := collected_file(name, cache_dir)).is_file():
        command = f"`iwsft collect sets {name}` builds it"
        raise FileNotFoundError(f"{name} is not at {path} yet; {command}")
    is_file = isinstance(name_or_path, Path) or name.lower().endswith(HDF5_SUFFIXES)
    is_minari = name.startswith(_MINARI_PREFIX) or ("/" in name and minari_store.ID.fullmatch(name))
    if is_file or is_minari or name in available():
        return
    near = difflib.get_close_matches(name, available(), n=3)
    hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else "."
    if Path(name).exists():
        hint = f"; {name} exists on disk, but a file must end in {' or '.join(HDF5_SUFFIXES)}."
    raise ValueError(
        f"unknown dataset {name!r}{hint} Pass the path of a .hdf5 file in D4RL's layout, a Minari "
        f"id ('{_MINARI_PREFIX}NAME-v0'), or a name that iwsft.datasets.available() lists"
    )
