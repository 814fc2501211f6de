"""Writes trajectories as datasets that :func:`iwsft.datasets.load` reads back bit for bit.

    write.to_hdf5(Path("mine.hdf5"), trajectories, Provenance("Hopper-v4", seed=0))
    write.to_minari("mine/hopper/mixed-v0", trajectories, Provenance("Hopper-v4", seed=0))

A dataset is written whole or not at all, and never replaces another one.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from tensordict import TensorDictBase

from iwsft import environments, files
from iwsft.datasets.catalog import reference_scores
from iwsft.datasets.episodes import check_actions
from iwsft.datasets.minari_store import check_id
from iwsft.files import HDF5_SUFFIXES, full_disk_named, new_partial
from iwsft.trajectory import (
    ACTION,
    DATA_WEIGHT,
    MASK,
    MULTIPLICITY,
    NEXT_OBSERVATION,
    OBSERVATION,
    REWARD,
    TERMINATED,
    TRUNCATED,
    lengths,
)
from iwsft.validation import validate

if TYPE_CHECKING:
    from minari.data_collector import EpisodeBuffer

_ROWS_A_CHUNK = 8192
# HDF5's overhead for the seven arrays of a Minari episode, and its last observation.
_BYTES_AN_EPISODE = 24_000
_INFOS = "infos/"
Fields = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Provenance:
    """The origin of the data, stored as attributes of the file.

    ``sources`` are plain values of each part, in their order, such as policy, noise and episodes.
    """

    env_id: str | None = None
    seed: int | None = None
    sources: Sequence[Mapping[str, Any]] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def attributes(self) -> dict[str, str | int]:
        """Return the attributes of the file; unknown ones are left out."""
        values: dict[str, str | int | None] = {"env_id": self.env_id, "seed": self.seed}
        values["sources"] = json.dumps([*map(dict, self.sources)])
        values["versions"] = json.dumps(dict(self.versions))
        values["env_kwargs"] = json.dumps(dict(self.env_kwargs)) if self.env_kwargs else None
        return {name: value for name, value in values.items() if value is not None}


def to_hdf5(
    path: str | Path,
    trajectories: TensorDictBase,
    provenance: Provenance | None = None,
    *,
    infos: Mapping[str, NDArray[Any]] | None = None,
) -> None:
    """Write a file in D4RL's layout (see :mod:`iwsft.datasets.d4rl`), compressed.

    Args:
        path: New file that ends in ``.hdf5`` or ``.h5``.
        trajectories: Packed trajectories with the keys of a loader. One whose last step has neither
            flag gets a timeout there, as it was cut.
        provenance: Attributes of the file.
        infos: Further fields with a row per step; they are stored as ``infos/NAME``.

    Raises:
        OSError: The file exists, or the disk is full.
        ValueError: The suffix is another one, trajectories or ``infos`` are not valid, or
            trajectories count several times or have data weights, which a file does not keep.
        TypeError: ``provenance`` is of another kind, such as a dict.
    """
    import h5py

    path = Path(path)
    if path.suffix.lower() not in HDF5_SUFFIXES:
        raise ValueError(f"{path} must end in .hdf5 or .h5, or datasets.load can't read it")
    if path.exists():
        raise FileExistsError(f"{path} exists; choose another name")
    attributes = _checked(provenance).attributes()
    fields = _fields(trajectories, infos or {})
    # Through memory: on a full disk, HDF5 ends the process instead of raising.
    image = io.BytesIO()
    with h5py.File(image, "w") as file:
        for name, values in fields.items():
            chunks = (min(_ROWS_A_CHUNK, len(values)), *values.shape[1:])
            file.create_dataset(name, data=values, chunks=chunks, compression="gzip", shuffle=True)
        file.attrs.update(attributes)
    files.write(path, image.getbuffer())


def to_minari(
    dataset_id: str,
    trajectories: TensorDictBase,
    provenance: Provenance | None = None,
    *,
    infos: Mapping[str, NDArray[Any]] | None = None,
) -> None:
    """Write a Minari dataset into the local store (``MINARI_DATASETS_PATH``); no network.

    Observations are flat float32 boxes. The action space, the environment's description and D4RL's
    reference scores are those of ``provenance.env_id``; without it, the action space is [-1, 1].
    Minari's ``infos`` have T + 1 rows; an episode's first is 0.

    Raises:
        ValueError: As for :func:`to_hdf5`; or the id is malformed, actions are outside the space,
            or a next observation is not the observation of the next step (Minari stores it once).
        OSError: The store has this dataset already, or the disk is full.
    """
    folder = minari_folder(dataset_id)
    from minari.dataset.minari_dataset import parse_dataset_id
    from minari.namespace import create_namespace, list_local_namespaces

    if folder.exists():
        raise FileExistsError(f"minari:{dataset_id} exists ({folder}); choose another name")
    provenance = _checked(provenance)
    fields = _fields(trajectories, infos or {})
    buffers = _buffers(fields, lengths(trajectories).tolist())
    store = Path(str(folder).removesuffix(dataset_id))
    partial = new_partial(store / dataset_id.replace("/", "-"))
    with full_disk_named(folder):
        try:
            _reserve(partial, fields, len(buffers))
            with store_at(partial):
                _create(dataset_id, buffers, fields, provenance)
            namespace = parse_dataset_id(dataset_id)[0]
            if namespace is not None and namespace not in list_local_namespaces():
                create_namespace(namespace)
            folder.parent.mkdir(parents=True, exist_ok=True)
            os.replace(partial / dataset_id, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def minari_folder(dataset_id: str) -> Path:
    """Return the folder of a dataset in Minari's local store; the errors are those of its id."""
    check_id(dataset_id)
    from minari.storage.datasets_root_dir import get_dataset_path

    return Path(get_dataset_path(dataset_id))


def _checked(provenance: Provenance | None) -> Provenance:
    """The provenance, empty for None; a TypeError says what another value must be."""
    if isinstance(provenance, Provenance | None):
        return provenance or Provenance()
    way_out = "Provenance('Hopper-v4', seed=0), of iwsft.datasets.write"
    raise TypeError(f"provenance={provenance!r:.60} must be None or such as {way_out}")


def _fields(trajectories: TensorDictBase, infos: Mapping[str, NDArray[Any]]) -> Fields:
    """Return D4RL's fields with a row per step, as float32 and bool, and those of infos."""
    if trajectories.batch_dims != 1 or MASK in trajectories.keys(True):
        raise ValueError("only packed trajectories are written; see iwsft.trajectory.pack")
    multiplicity = trajectories.get(MULTIPLICITY, default=None)
    if multiplicity is not None and bool((multiplicity != 1).any()):
        way_out = "write the data that they were curated from, and curate what is read back"
        raise ValueError(f"{MULTIPLICITY!r} has no place in a dataset; {way_out}")
    weight = trajectories.get(DATA_WEIGHT, default=None)
    if weight is not None and bool((weight != 1).any()):
        way_out = "pass it in infos={'weight': ...}, exclude it here, and load 'infos/weight'"
        raise ValueError(f"{DATA_WEIGHT!r} has no field of its own in a dataset; {way_out}")
    keys = (OBSERVATION, ACTION, REWARD, NEXT_OBSERVATION)
    validate(trajectories, keys=keys)
    arrays = [trajectories.get(key).float().numpy(force=True) for key in keys]
    names = ("observations", "actions", "rewards", "next_observations")
    fields: Fields = dict(zip(names, arrays, strict=True))
    fields["rewards"] = fields["rewards"].reshape(-1)
    ends = np.zeros(len(trajectories), dtype=bool)
    ends[lengths(trajectories).cumsum(0).numpy(force=True) - 1] = True
    for name, key in (("terminals", TERMINATED), ("timeouts", TRUNCATED)):
        flags = trajectories.get(key).numpy(force=True).reshape(-1).astype(bool)
        inside = np.flatnonzero(flags & ~ends)
        if len(inside):
            flag = f"step {int(inside[0])} has the flag {key[1]!r}"
            raise ValueError(f"{flag}, but is not the last of its trajectory")
        fields[name] = flags
    fields["timeouts"] = fields["timeouts"] | (ends & ~fields["terminals"])
    for name, values in infos.items():
        if len(values) != len(ends):
            raise ValueError(f"infos {name!r} has {len(values)} rows, the data {len(ends)} steps")
        fields[_INFOS + name] = np.asarray(values)
    return fields


def _reserve(folder: Path, fields: Fields, episodes: int) -> None:
    """Check the room on the disk: on a full one, HDF5 ends the process instead of raising."""
    size = sum(values.nbytes for values in fields.values()) + episodes * _BYTES_AN_EPISODE
    folder.mkdir(parents=True)
    if hasattr(os, "posix_fallocate"):
        with (folder / "reserved").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)
        (folder / "reserved").unlink()


def _buffers(fields: Fields, sizes: list[int]) -> list[EpisodeBuffer]:
    """Return Minari's episodes: T + 1 observations and infos, T rows of all other fields."""
    from minari.data_collector import EpisodeBuffer

    now, then = fields["observations"], fields["next_observations"]
    infos = {k.removeprefix(_INFOS): x for k, x in fields.items() if k.startswith(_INFOS)}
    buffers, start = [], 0
    for size in sizes:
        stop = start + size
        differ = (now[start + 1 : stop] != then[start : stop - 1]).any(axis=1)
        if differ.any():
            step = f"the next observation of step {start + int(differ.argmax())}"
            rule = "is not the observation of the step after it, as Minari needs"
            raise ValueError(f"{step} {rule}; write an HDF5 file instead")
        buffers.append(
            EpisodeBuffer(
                observations=np.concatenate((now[start:stop], then[stop - 1 : stop])),
                actions=fields["actions"][start:stop],
                rewards=fields["rewards"][start:stop],
                terminations=fields["terminals"][start:stop],
                truncations=fields["timeouts"][start:stop],
                infos={k: np.insert(x[start:stop], 0, 0, axis=0) for k, x in infos.items()} or None,
            )
        )
        start = stop
    return buffers


def _create(
    dataset_id: str, buffers: list[EpisodeBuffer], fields: Fields, provenance: Provenance
) -> None:
    import gymnasium as gym
    import minari

    columns = fields["observations"].shape[1]
    action_space: gym.spaces.Box = gym.spaces.Box(-1.0, 1.0, fields["actions"].shape[1:])
    env, scores = None, None
    if provenance.env_id is not None:
        env = environments.make(provenance.env_id, **provenance.env_kwargs)
        action_space = environments.action_space(env)
        scores = reference_scores(provenance.env_id, provenance.env_kwargs)
    with nullcontext() if env is None else env:
        low, high = action_space.low, action_space.high
        check_actions(fields["actions"], low, high, f"minari:{dataset_id}")
        with warnings.catch_warnings():
            # Author, permalink and the like are the user's to add.
            warnings.filterwarnings("ignore", message=".* is (set to )?None")
            data = minari.create_dataset_from_buffers(
                dataset_id=dataset_id,
                buffer=buffers,
                env=env,
                observation_space=gym.spaces.Box(-np.inf, np.inf, (columns,), np.float32),
                action_space=action_space,
                ref_min_score=None if scores is None else scores[0],
                ref_max_score=None if scores is None else scores[1],
                data_format="hdf5",
            )
        data.storage.update_metadata(provenance.attributes())


@contextmanager
def store_at(folder: Path) -> Iterator[None]:
    """Make ``folder`` Minari's local store meanwhile, by the only way that Minari has."""
    name = "MINARI_DATASETS_PATH"
    before = os.environ.get(name)
    os.environ[name] = str(folder)
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before
