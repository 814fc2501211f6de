"""Files in D4RL's HDF5 layout (https://arxiv.org/abs/2004.07219), from any source.

A row per step: ``observations`` [N, obs], ``actions`` [N, act], ``rewards`` [N], ``terminals`` [N],
and optionally ``timeouts`` [N] and ``next_observations`` [N, obs]. Other fields of a file
(``infos/...``, ``metadata/...``) are ignored. The families differ:

- Locomotion v2 has both optional fields; its next observations are right at a timeout, too.
- AntMaze: a trajectory ends at its first goal step, and the stay that follows is left out; see
  :mod:`iwsft.datasets.antmaze`.
- Kitchen files have no ``timeouts``. ``terminals`` marks the last step of a demonstration,
  whether the tasks were solved or not. Of the 60 observation columns the last 30 are goals, and
  the reward of a step counts the tasks in their goal state (a return is not a number of tasks).
- Adroit: human demonstrations end with a timeout after up to 300 steps.
- Kitchen and Adroit environments clip actions to [-1, 1] themselves, so actions beyond are
  clipped in the data, too, and counted in the notes.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from iwsft.datasets import antmaze, catalog
from iwsft.datasets.dataset import OfflineDataset, fingerprint_of
from iwsft.datasets.episodes import Flags, Floats, Steps, check_actions, check_steps, cut_steps

if TYPE_CHECKING:
    import h5py

REQUIRED = ("observations", "actions", "rewards", "terminals")
# Environments whose step clips the action to [-1, 1].
_CLIPPING = ("AdroitHand", "FrankaKitchen")


def read(path: Path, *, name: str | None = None, source: str | None = None) -> OfflineDataset:
    """Read a file into packed float32 trajectories, with each array once in memory.

    The environment is the file's attribute ``env_id``, with the arguments in the attribute
    ``env_kwargs`` (a JSON object). A file without them has the environment of ``name``, or of the
    file's name, if that is D4RL's. Actions must be in [-1, 1], the range of all D4RL tasks here, or
    in the action space of another environment.

    Args:
        path: The file.
        name: Name of the dataset; the file's stem by default.
        source: Origin of the file; its path by default.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The file is damaged, or cannot be trained on; the error names field and row.
    """
    import h5py

    if not path.is_file():
        raise FileNotFoundError(_describe_missing(path))
    where = str(path)
    try:
        with h5py.File(path, "r") as file:
            env_id, env_kwargs = _read_environment(file, name or path.name)
            steps = _read_steps(file, where)
    except OSError as error:
        raise ValueError(f"{where} cannot be read as HDF5; it is damaged: {error}") from error
    check_steps(steps, where)
    steps, notes = _adapt(steps, env_id)
    trajectories = cut_steps(steps)
    _check_range(steps.actions, env_id, where)
    return OfflineDataset(
        trajectories=trajectories,
        name=name or path.stem,
        env_id=env_id,
        reference_scores=catalog.reference_scores(env_id) if env_id is not None else None,
        source=source or where,
        fingerprint=fingerprint_of(trajectories),
        env_kwargs=dict(env_kwargs),
        notes=tuple(notes),
    )


def _read_environment(file: h5py.File, name: str) -> tuple[str | None, Mapping[str, Any]]:
    """Read the file's environment and its arguments, or take D4RL's of that name."""
    env_id, arguments = file.attrs.get("env_id"), file.attrs.get("env_kwargs")
    if env_id is None:
        entry = catalog.find(name)
        return (None, {}) if entry is None else (entry.env_id, entry.env_kwargs)
    try:
        env_kwargs = {} if arguments is None else json.loads(arguments)
    except (TypeError, ValueError):
        env_kwargs = None
    if not isinstance(env_kwargs, dict):
        where = f"{file.filename}: the attribute 'env_kwargs'"
        raise ValueError(f"{where} is {arguments!r}, it must be a JSON object")
    return env_id.decode() if isinstance(env_id, bytes) else str(env_id), env_kwargs


def _adapt(steps: Steps, env_id: str | None) -> tuple[Steps, list[str]]:
    """Change steps as the environment's family needs it; returns a note on each change."""
    if env_id is None:
        return steps, []
    if env_id.startswith("AntMaze") and steps.observations.shape[1:] == (antmaze.COLUMNS,):
        return antmaze.until_goal(steps)
    if env_id.startswith(_CLIPPING):
        beyond = int((np.abs(steps.actions) > 1).any(axis=-1).sum())
        if beyond:
            np.clip(steps.actions, -1.0, 1.0, out=steps.actions)
            return steps, [f"actions of {beyond:,} rows clipped to [-1, 1], as {env_id} does"]
    return steps, []


def _read_steps(file: h5py.File, where: str) -> Steps:
    for key in REQUIRED:
        if key not in file:
            raise ValueError(f"{where} has no field {key!r}, only {', '.join(file) or 'nothing'}")
    terminals = _flags(file, "terminals", where)
    timeouts = _flags(file, "timeouts", where) if "timeouts" in file else np.zeros_like(terminals)
    following = "next_observations"
    return Steps(
        observations=_floats(file, "observations", where),
        actions=_floats(file, "actions", where),
        rewards=_column(_floats(file, "rewards", where)),
        terminals=terminals,
        timeouts=timeouts,
        next_observations=_floats(file, following, where) if following in file else None,
    )


def _field(file: h5py.File, key: str, where: str) -> h5py.Dataset:
    import h5py

    field = file[key]
    if not isinstance(field, h5py.Dataset) or not field.shape or field.dtype.kind not in "fiub":
        raise ValueError(f"{where}: {key!r} is {field}, expected numbers with one row per step")
    return field


def _floats(file: h5py.File, key: str, where: str) -> Floats:
    field = _field(file, key, where)
    values = np.empty(field.shape, dtype=np.float32)
    if field.dtype.kind == "b":
        values[...] = field[()]
    elif values.size:
        field.read_direct(values)  # HDF5 converts, without a second array of another dtype
    return values


def _flags(file: h5py.File, key: str, where: str) -> Flags:
    values = _column(_field(file, key, where)[()])
    odd = np.argwhere((values != 0) & (values != 1))
    if len(odd):
        row = int(odd[0, 0])
        raise ValueError(f"{where}: {key!r} must be 0 or 1, row {row} is {values[row]}")
    return values != 0


def _column(values: NDArray[Any]) -> NDArray[Any]:
    """Reshape ``[N, 1]`` to ``[N]``; some writers keep the second axis."""
    return values.reshape(-1) if values.shape[1:] == (1,) else values


def _check_range(actions: Floats, env_id: str | None, where: str) -> None:
    """Check actions against [-1, 1], the range of D4RL's tasks, or another environment's."""
    try:
        check_actions(actions, -1.0, 1.0, where)
    except ValueError as beyond:
        if env_id is None:
            raise ValueError(f"{beyond}, or name their environment: attribute 'env_id'") from None
        if env_id in catalog.ENV_IDS:
            raise
        from iwsft import environments

        try:
            env = environments.make(env_id)
        except (ValueError, ImportError) as error:
            raise ValueError(f"{beyond}. Or install {env_id} for its range: {error}") from error
        env.close()
        space = environments.action_space(env)
        if space.shape != actions.shape[1:]:
            columns = f"'actions' has {actions.shape[1]} columns"
            raise ValueError(f"{where}: {columns}, {env_id} takes {space}") from None
        check_actions(actions, space.low, space.high, where)


def _describe_missing(path: Path) -> str:
    if path.is_dir():
        return f"{path} is a folder; pass one of its .hdf5 files"
    if not path.parent.is_dir():
        return f"no file {path}: there is no folder {path.parent}"
    others = [p.name for p in path.parent.iterdir() if p.suffix in (".hdf5", ".h5")]
    near = difflib.get_close_matches(path.name, others, n=1)
    return f"no file {path}" + (f"; did you mean {path.parent / near[0]}?" if near else "")
