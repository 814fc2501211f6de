"""Minari datasets (https://minari.farama.org), from the local store or the remote one.

Minari's ``mujoco/*`` datasets are new data from v5 environments. Their scores can't be compared
with D4RL's. They have reference scores only where Minari has them.
"""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from iwsft.datasets.dataset import OfflineDataset, fingerprint_of
from iwsft.datasets.episodes import Floats, Steps, check_actions, pack_steps

if TYPE_CHECKING:
    import gymnasium
    from minari import MinariDataset

ID = re.compile(r"([\w-]+/)*[\w-]+-v\d+")


def check_id(dataset_id: str) -> None:
    """Check the form of an id, and that minari is installed.

    Raises:
        ValueError: The id is malformed.
        ImportError: minari is not installed.
    """
    if not ID.fullmatch(dataset_id):
        raise ValueError(f"{dataset_id!r} is not a Minari id, such as 'namespace/name-v0'")
    if importlib.util.find_spec("minari") is None:
        raise ImportError(f"{dataset_id!r} needs the package minari: pip install 'minari[hdf5,hf]'")


def read(dataset_id: str) -> OfflineDataset:
    """Read a Minari dataset into packed trajectories; download it if it is not in the local store.

    Minari stores the T + 1 observations of an episode of T steps; the last T are the next
    observations. Dictionaries and tuples of boxes become one vector, joined in the order of the
    space, as by gymnasium's ``FlattenObservation``. An episode whose last step has neither flag
    ends truncated.

    Args:
        dataset_id: Id of the form ``namespace/name-v0``; the local store is the folder
            ``MINARI_DATASETS_PATH``.

    Raises:
        ImportError: minari is not installed.
        ConnectionError: The dataset is not in the local store and could not be downloaded.
        ValueError: The id is malformed, the file is damaged, or it cannot be trained on.
    """
    source = f"minari:{dataset_id}"
    check_id(dataset_id)
    data = _open(dataset_id)
    for space, what in ((data.observation_space, "observation"), (data.action_space, "action")):
        _require_boxes(space, what, source)
    try:
        steps = _read_steps(data)
    except OSError as error:
        damaged = f"{source} in {data.storage.data_path} is damaged; delete that folder"
        raise ValueError(f"{damaged}: {error}") from error
    trajectories = pack_steps(steps, source)
    space = data.action_space
    check_actions(steps.actions, space.low.reshape(-1), space.high.reshape(-1), source)
    scores = [data.storage.metadata.get(f"ref_{end}_score") for end in ("min", "max")]
    return OfflineDataset(
        trajectories=trajectories,
        name=dataset_id.replace("/", "-"),
        env_id=data.env_spec.id if data.env_spec is not None else None,
        reference_scores=None if None in scores else (float(scores[0]), float(scores[1])),
        source=source,
        fingerprint=fingerprint_of(trajectories),
    )


def _open(dataset_id: str) -> MinariDataset:
    import minari

    try:
        return minari.load_dataset(dataset_id)
    except FileNotFoundError:
        pass  # ask the remote store
    except ValueError as error:
        raise ValueError(f"cannot read the Minari dataset {dataset_id!r}: {error}") from error
    from huggingface_hub.errors import HfHubHTTPError
    from minari.storage.datasets_root_dir import get_dataset_path

    # The bases of the hub's error are those of any failed request: OSError, its HTTP client's.
    transport = (base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))
    unavailable: tuple[type[Exception], ...] = (ValueError, ImportError, OSError, *transport)
    try:
        return minari.load_dataset(dataset_id, download=True)
    except unavailable as error:
        raise ConnectionError(
            f"the Minari dataset {dataset_id!r} is not in the local store "
            f"({get_dataset_path(dataset_id)}), and could not be downloaded: {error}"
        ) from error


def _require_boxes(space: gymnasium.Space[Any], what: str, source: str) -> None:
    from gymnasium.spaces import Box, Dict, Tuple

    if isinstance(space, Dict | Tuple) and what == "observation":
        for part in space.values() if isinstance(space, Dict) else space:
            _require_boxes(part, what, source)
    elif not isinstance(space, Box):
        raise ValueError(f"{source}: the {what} space holds {space}, it must consist of boxes")


def _read_steps(data: MinariDataset) -> Steps:
    from gymnasium.spaces.utils import flatdim

    rows = int(data.total_steps)
    observations: Floats = np.empty((rows, flatdim(data.observation_space)), dtype=np.float32)
    following = np.empty_like(observations)
    actions: Floats = np.empty((rows, flatdim(data.action_space)), dtype=np.float32)
    rewards: Floats = np.empty(rows, dtype=np.float32)
    terminals, timeouts = np.zeros(rows, dtype=bool), np.zeros(rows, dtype=bool)
    start = 0
    for episode in data.iterate_episodes():
        stop = start + len(episode)
        if stop == start:
            continue
        for rows_of, out in ((slice(0, -1), observations), (slice(1, None), following)):
            _flatten(episode.observations, data.observation_space, rows_of, out[start:stop])
        _flatten(episode.actions, data.action_space, slice(None), actions[start:stop])
        rewards[start:stop] = episode.rewards
        terminals[start:stop] = episode.terminations
        timeouts[start:stop] = episode.truncations
        timeouts[stop - 1] |= not terminals[stop - 1]
        start = stop
    return Steps(observations, actions, rewards, terminals, timeouts, following)


def _flatten(values: Any, space: Any, rows: slice, out: Floats) -> None:
    """Write these rows of the leaves of ``values`` side by side into ``out`` [T, features]."""
    from gymnasium.spaces import Box, Dict
    from gymnasium.spaces.utils import flatdim

    if isinstance(space, Box):
        out[:] = values[rows].reshape(len(out), -1)
        return
    parts = space.items() if isinstance(space, Dict) else enumerate(space)
    column = 0
    for key, part in parts:
        width = flatdim(part)
        _flatten(values[key], part, rows, out[:, column : column + width])
        column += width
