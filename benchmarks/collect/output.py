"""The dataset of ``--out``, a file or in Minari's store, and the parts of it collected so far."""

from __future__ import annotations

import io
import json
import re
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray
from tensordict import TensorDict

from iwsft import files
from iwsft.checkpoint import CheckpointError, differences
from iwsft.datasets import write
from iwsft.datasets.episodes import Steps, pack_steps
from iwsft.files import HDF5_SUFFIXES, write_json

# D4RL's fields of whole episodes, and "success" where the environment reports it.
Fields = dict[str, NDArray[Any]]
_MINARI = "minari:"
_PART = re.compile(r"part-\d{6,}\.npz")


@dataclass(frozen=True)
class Output:
    """The dataset of ``--out``."""

    name: str  # for ``datasets.load``
    path: Path  # the file, or the folder in Minari's store

    @classmethod
    def of(cls, out: str) -> Output:
        """Read ``--out``."""
        if out.startswith(_MINARI):
            return cls(out, write.minari_folder(out.removeprefix(_MINARI)))
        path = Path(out).expanduser()
        if path.suffix.lower() not in HDF5_SUFFIXES:
            ways = "a file ending in .hdf5 or .h5, nor minari:NAMESPACE/NAME-v0"
            raise ValueError(f"--out {out}: neither {ways}")
        return cls(str(path), path)

    @property
    def partial(self) -> Path:
        """Folder of the parts collected so far."""
        return self.path.with_name(f"{self.path.name}.partial")

    @property
    def run(self) -> Path:
        """Folder of the online run's learning curve and policy."""
        stem = self.path.stem if self.path.suffix.lower() in HDF5_SUFFIXES else self.path.name
        return self.path.with_name(f"{stem}.sac")

    def recorded(self) -> tuple[dict[str, Any], int]:
        """Return the provenance that the finished dataset has, and its number of steps."""
        if self.name.startswith(_MINARI):
            stored = json.loads((self.path / "data" / "metadata.json").read_text())
            size = stored.get("total_steps", 0)
        else:
            with h5py.File(self.path) as file:
                stored, size = dict(file.attrs), len(file.get("rewards", ()))
        if "sources" not in stored:
            problem = f"{self.path} is not a dataset that this command has collected"
            raise FileExistsError(f"{problem}; choose another --out")
        kept = {"env_id": str(stored["env_id"]), "seed": int(stored["seed"])}
        lists = {name: json.loads(stored.get(name, "{}")) for name in ("sources", "env_kwargs")}
        return kept | lists, size

    def rehearse(self, fields: Fields, provenance: write.Provenance) -> None:
        """Write a few steps elsewhere, so that what can't be written fails before collecting."""
        with tempfile.TemporaryDirectory() as folder, write.store_at(Path(folder)):
            path = self.path if self.name.startswith(_MINARI) else Path(folder) / self.path.name
            replace(self, path=path).write(fields, provenance)

    def write(self, fields: Fields, provenance: write.Provenance) -> None:
        """Write the dataset, whole or not at all."""
        infos = {"success": fields["success"]} if "success" in fields else None
        trajectories = packed(fields, self.name)
        if self.name.startswith(_MINARI):
            write.to_minari(self.name.removeprefix(_MINARI), trajectories, provenance, infos=infos)
        else:
            write.to_hdf5(self.path, trajectories, provenance, infos=infos)


class Parts:
    """The parts of a dataset collected so far: files of whole episodes, in their order.

    All parts must have been made with the same settings, which are plain values.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self._folder = folder
        path = folder / "settings.json"
        if path.exists():
            differ = differences(json.loads(path.read_text()), settings)
            if differ:
                problem = f"{folder} holds a collection with other settings: {differ}"
                raise CheckpointError(f"{problem}; use those, delete it, or choose another --out")
        else:
            write_json(path, settings)

    def __len__(self) -> int:
        return len(self._paths())

    def append(self, episodes: list[Fields], progress: Mapping[str, Any]) -> None:
        """Write some episodes, and the progress made with them, to one file."""
        buffer = io.BytesIO()
        arrays: dict[str, Any] = {"progress": np.array(json.dumps(dict(progress)))}
        np.savez(buffer, **arrays | joined(episodes))
        files.write(self._folder / f"part-{len(self):06d}.npz", buffer.getbuffer())

    def progress(self) -> dict[str, Any] | None:
        """Return the progress of the last part; None before the first."""
        paths = self._paths()
        return json.loads(str(_read(paths[-1])["progress"])) if paths else None

    def keep(self, count: int) -> None:
        """Delete all parts but the first ``count``."""
        paths = self._paths()
        if len(paths) < count:
            raise CheckpointError(f"{self._folder} has lost parts; delete it and start afresh")
        for path in paths[count:]:
            path.unlink()

    def fields(self) -> Fields:
        """Return all episodes."""
        return joined([_read(path) for path in self._paths()])

    def _paths(self) -> list[Path]:
        names = {path.name for path in self._folder.iterdir() if _PART.fullmatch(path.name)}
        paths = [self._folder / f"part-{number:06d}.npz" for number in range(len(names))]
        for path in paths:
            if path.name not in names:
                way_out = "put it back, or delete the later parts, which are then collected again"
                raise CheckpointError(f"{path} is missing; {way_out}")
        return paths


def joined(episodes: list[Fields]) -> Fields:
    """Return episodes back to back; without a report of success an episode has none."""
    if any("success" in part for part in episodes):
        episodes = [{"success": np.zeros(len(part["rewards"]), bool), **part} for part in episodes]
    names = [name for name in episodes[0] if name != "progress"]
    return {name: np.concatenate([part[name] for part in episodes]) for name in names}


def packed(fields: Fields, source: str) -> TensorDict:
    """Return episodes of this origin as packed trajectories."""
    steps = {name: values for name, values in fields.items() if name != "success"}
    return pack_steps(Steps(**steps), source)


def _read(path: Path) -> Fields:
    try:
        with np.load(path) as file:
            return dict(file)
    except (EOFError, ValueError, zipfile.BadZipFile) as error:
        problem = f"{path} is damaged ({error}); delete {path.parent} and start afresh"
        raise CheckpointError(problem) from error
