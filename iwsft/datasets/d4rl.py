"""Files in D4RL's HDF5 layout (https://arxiv.org/abs/2004.07219), from any source.

A row per step: ``observations`` [N, obs], ``actions`` [N, act], ``rewards`` [N], ``terminals`` [N],
and optionally ``timeouts`` [N] and ``next_observations`` [N, obs]. Of the other fields only those
are read that tell where episodes end, see :mod:`iwsft.datasets.marks`. docs/data.md says how D4RL's
families differ.
"""

from __future__ import annotations

import difflib
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from iwsft.datasets import antmaze, catalog
from iwsft.datasets.actions import find_bounds
from iwsft.datasets.dataset import OfflineDataset, fingerprint_of
from iwsft.datasets.ends import find_ends, move_time_limits
from iwsft.datasets.episodes import Flags, Steps, check_steps, cut_steps, weigh_steps
from iwsft.datasets.marks import kind_of, marked_ends
from iwsft.files import HDF5_SUFFIXES

if TYPE_CHECKING:
    import h5py

REQUIRED = ("observations", "actions", "rewards", "terminals")
# Groups in which programs keep what they record beside the steps.
_BESIDE = ("infos", "info", "env_infos", "meta", "metadata")
# Environments whose step clips the action to [-1, 1].
_CLIPPING = ("AdroitHand", "FrankaKitchen")


def read(
    path: Path,
    *,
    name: str | None = None,
    source: str | None = None,
    trust_env_module: bool = False,
    data_weight: Any = None,
) -> OfflineDataset:
    """Read a file into packed float32 trajectories, with each array once in memory.

    The environment is the file's attribute ``env_id``, with the arguments in the attribute
    ``env_kwargs`` (a JSON object). A file without them has the environment of ``name``, or of the
    file's name, if that is D4RL's. Files that neither D4RL nor :mod:`iwsft.datasets.write` wrote,
    and those of D4RL without timeouts, are searched for ends of episodes that are not marked, see
    :mod:`iwsft.datasets.ends`. Actions must be in the environment's range. ``name`` and ``source``
    are those of the result; by default the file's stem and path. The other arguments and the errors
    are those of :func:`iwsft.datasets.load`.
    """
    where = str(path)
    stored, steps, marks = _read_file(path, data_weight)
    entry = None if "env_id" in stored else catalog.find(name or path.name)
    env_id, env_kwargs = (entry.env_id, entry.env_kwargs) if entry else _environment(stored, where)
    notes: list[str] = []
    columns = steps.observations.shape[1]
    if env_id is not None and env_id.startswith("AntMaze") and columns == antmaze.COLUMNS:
        steps, notes = antmaze.until_goal(steps)
    elif "sources" not in stored and (entry is None or not steps.timeouts.any()):
        limit = partial(_limit, env_id, env_kwargs)
        steps, notes = find_ends(steps, marks, limit, where)
        if entry is None:  # terminals of D4RL's kitchen files end demonstrations
            steps, moved = move_time_limits(steps, limit)
            notes += moved
        for note in notes:
            warnings.warn(f"{where}: {note}", stacklevel=4)
    if env_id is not None and env_id.startswith(_CLIPPING):
        beyond = int((np.abs(steps.actions) > 1).any(axis=-1).sum())
        np.clip(steps.actions, -1.0, 1.0, out=steps.actions)
        clipped = f"actions of {beyond:,} rows clipped to [-1, 1], as {env_id} does"
        notes += [clipped] if beyond else []
    bounds, more = find_bounds(steps, env_id, env_kwargs, where, trusted=trust_env_module)
    trajectories = cut_steps(steps)
    known = entry is not None or catalog.SIZES.get(env_id or "", (0, 0))[0] == columns
    return OfflineDataset(
        trajectories=trajectories,
        name=name or path.stem,
        env_id=env_id,
        reference_scores=catalog.reference_scores(env_id or "", env_kwargs) if known else None,
        source=source or where,
        fingerprint=fingerprint_of(trajectories),
        env_kwargs=dict(env_kwargs),
        action_bounds=bounds,
        notes=(*notes, *more),
    )


def _read_file(path: Path, data_weight: Any) -> tuple[dict[str, Any], Steps, dict[str, Flags]]:
    """Read a file's attributes, its checked steps with data weights, and further marks of ends."""
    import h5py

    if not path.is_file():
        raise FileNotFoundError(_describe_missing(path))
    where = str(path)
    with damage_named(where, "the HDF5 file"):
        file = h5py.File(path, "r")
        stored, names = dict(file.attrs), set(file)
        beside = [file.get(name) for name in _BESIDE]
    with file:
        steps = _read_steps(file, names, where)
        groups = [file, *(group for group in beside if isinstance(group, h5py.Group))]
        marks = _read_marks(groups, where, len(steps.rewards))
        if isinstance(data_weight, str):
            if data_weight not in file:
                raise ValueError(f"{where} has no field {data_weight!r} for the data weights")
            data_weight = _numbers(file, data_weight, where)
    check_steps(steps, where)
    return stored, weigh_steps(steps, data_weight, where), marks


@contextmanager
def damage_named(where: str, what: str) -> Iterator[None]:
    """Name the file and its part in errors of HDF5; with an errno, the system refuses the file."""
    try:
        yield
    except Exception as error:
        if isinstance(error.__cause__, KeyboardInterrupt):
            raise  # h5py's lock turns a Ctrl-C into a SystemError
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(f"{where} cannot be opened: {os.strerror(error.errno)}") from error
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        way_out = "delete the file and get it again"
        raise ValueError(f"{where}: {what} is damaged ({reason}); {way_out}") from error


def _environment(stored: Mapping[str, Any], where: str) -> tuple[str | None, Mapping[str, Any]]:
    """Return the environment and its arguments that a file's attributes name."""
    env_id, arguments = stored.get("env_id"), stored.get("env_kwargs")
    try:
        env_kwargs = {} if arguments is None else json.loads(arguments)
    except (TypeError, ValueError, RecursionError):
        env_kwargs = None
    if not isinstance(env_kwargs, dict):
        where = f"{where}: the attribute 'env_kwargs'"
        raise ValueError(f"{where} is {arguments!r:.80}, it must be a JSON object")
    with suppress(UnicodeDecodeError):
        env_id = env_id.decode() if isinstance(env_id, bytes) else env_id
    if not isinstance(env_id, str | None):
        raise ValueError(f"{where}: the attribute 'env_id' is {env_id!r:.80}, it must be text")
    return env_id, env_kwargs


def _limit(env_id: str | None, env_kwargs: Mapping[str, Any]) -> int | None:
    from iwsft import environments

    limit = environments.complete(env_id, env_kwargs).get("max_episode_steps") if env_id else None
    return limit if isinstance(limit, int) and limit > 0 else None


def _read_steps(file: h5py.File, names: set[str], where: str) -> Steps:
    for key in REQUIRED:
        if key not in names:
            has = ", ".join(sorted(names)) or "nothing"
            raise ValueError(f"{where} has no field {key!r}, only {has}")
    terminals = _flags(file, "terminals", where)
    timeouts = _flags(file, "timeouts", where) if "timeouts" in names else np.zeros_like(terminals)
    following = "next_observations"
    return Steps(
        observations=_numbers(file, "observations", where),
        actions=_numbers(file, "actions", where),
        rewards=_column(_numbers(file, "rewards", where)),
        terminals=terminals,
        timeouts=timeouts,
        next_observations=_numbers(file, following, where) if following in names else None,
    )


def _read_marks(groups: Sequence[h5py.Group], where: str, rows: int) -> dict[str, Flags]:
    """Read the other fields, here and in groups beside, that tell where episodes end."""
    marks = {}
    for group in groups:
        for name in sorted(filter(kind_of, group)):
            if group.name == "/" and name in ("terminals", "timeouts"):
                continue  # read already
            values = _values(group, name, where)
            ends = None if values is None else marked_ends(name, values, rows, where)
            if ends is not None:
                marks[name] = ends
    return marks


def _values(
    group: h5py.Group, key: str, where: str, *, floats: bool = False
) -> NDArray[Any] | None:
    """Read a field, as float32 if ``floats``; return None if it has no rows of numbers."""
    import h5py

    with damage_named(where, repr(key)):
        field = group[key]
        if not isinstance(field, h5py.Dataset) or not field.shape or field.dtype.kind not in "fiub":
            return None
        # HDF5 converts, without a second array of another dtype.
        return np.asarray((field.astype(np.float32) if floats else field)[()])


def _numbers(group: h5py.Group, key: str, where: str, *, floats: bool = True) -> NDArray[Any]:
    values = _values(group, key, where, floats=floats)
    if values is None:
        raise ValueError(f"{where}: {key!r} is {group[key]}, expected numbers with a row per step")
    return values


def _flags(file: h5py.File, key: str, where: str) -> Flags:
    values = _column(_numbers(file, key, where, floats=False))
    odd = np.argwhere((values != 0) & (values != 1))
    if len(odd):
        row = int(odd[0, 0])
        raise ValueError(f"{where}: {key!r} must be 0 or 1, row {row} is {values[row]}")
    return np.asarray(values != 0)


def _column(values: NDArray[Any]) -> NDArray[Any]:
    """Reshape ``[N, 1]`` to ``[N]``; some writers keep the second axis."""
    return values.reshape(-1) if values.shape[1:] == (1,) else values


def _describe_missing(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder; pass one of its .hdf5 files"
    if not path.parent.is_dir():
        return f"no file {path}: there is no folder {path.parent}"
    others = [p.name for p in path.parent.iterdir() if p.suffix in HDF5_SUFFIXES]
    near = difflib.get_close_matches(path.name, others, n=1)
    return f"no file {path}" + (f"; did you mean {path.parent / near[0]}?" if near else "")
