"""Minari datasets (https://minari.farama.org), from the local store or the remote one.

Minari's ``mujoco/*`` datasets are new data from v5 environments. Their scores can't be compared
with D4RL's. They have reference scores only where Minari has them.
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from iwsft.datasets.actions import find_bounds
from iwsft.datasets.d4rl import damage_named
from iwsft.datasets.dataset import OfflineDataset, fingerprint_of
from iwsft.datasets.episodes import Floats, Steps, check_steps, cut_steps, weigh_steps
from iwsft.extras import require

if TYPE_CHECKING:
    import gymnasium
    from minari import MinariDataset

ID = re.compile(r"([\w-]+/)*[\w-]+-v\d+")


def check_id(dataset_id: str) -> None:
    """Check the form of an id (ValueError), and that minari is installed (ImportError)."""
    if not ID.fullmatch(dataset_id):
        raise ValueError(f"{dataset_id!r} is not a Minari id, such as 'namespace/name-v0'")
    require("minari")


def read(dataset_id: str, *, data_weight: Any = None) -> OfflineDataset:
    """Read a Minari dataset into packed trajectories; download it if it is not in the local store.

    Dictionaries and tuples of boxes become one vector, as by gymnasium's ``FlattenObservation``. An
    episode whose last step has neither flag ends truncated. The local store is the folder
    ``MINARI_DATASETS_PATH``. The arguments and errors are those of :func:`iwsft.datasets.load`.
    """
    source = f"minari:{dataset_id}"
    check_id(dataset_id)
    data = _open(dataset_id)
    for space, what in ((data.observation_space, "observation"), (data.action_space, "action")):
        _require_boxes(space, what, source)
    steps = _read_steps(data, source)
    check_steps(steps, source)
    steps = weigh_steps(steps, data_weight, source)
    env_id, env_kwargs = _environment(data)
    given = (data.action_space.low, data.action_space.high)
    bounds, notes = find_bounds(steps, env_id, env_kwargs, source, given=given)
    notes += _normalizers(env_kwargs, source)
    trajectories = cut_steps(steps)
    scores = [data.storage.metadata.get(f"ref_{end}_score") for end in ("min", "max")]
    return OfflineDataset(
        trajectories=trajectories,
        name=dataset_id.replace("/", "-"),
        env_id=env_id,
        reference_scores=None if None in scores else (float(scores[0]), float(scores[1])),
        source=source,
        fingerprint=fingerprint_of(trajectories),
        env_kwargs=env_kwargs,
        action_bounds=bounds,
        notes=tuple(notes),
    )


def _environment(data: MinariDataset) -> tuple[str | None, dict[str, Any]]:
    """Return the environment to score in: what this library or Minari has recorded, flattened."""
    from gymnasium.spaces import Box

    from iwsft import environments

    metadata = data.storage.metadata
    if "env_id" in metadata:  # written by :mod:`iwsft.datasets.write`
        return str(metadata["env_id"]), json.loads(str(metadata.get("env_kwargs", "{}")))
    # Minari gives the environment to evaluate in only as something made.
    spec = getattr(data, "_eval_env_spec", None) or data.env_spec
    if spec is None:
        return None, {}
    env_id, env_kwargs = environments.arguments_of(spec)
    if not isinstance(data.observation_space, Box):
        flatten = {"entry_point": "gymnasium.wrappers:FlattenObservation", "kwargs": {}}
        env_kwargs["wrappers"] = [*env_kwargs.get("wrappers", ()), flatten]
    return env_id, env_kwargs


def _normalizers(env_kwargs: Mapping[str, Any], source: str) -> list[str]:
    """Note wrappers whose running statistics are the recording's, which the data do not hold."""
    names = [wrapper["entry_point"] for wrapper in env_kwargs.get("wrappers", ())]
    names = [name.rpartition(":")[2] for name in names if "Normalize" in name]
    note = "has statistics of its own: scores are not those of the recorded environment"
    notes = [f"{name} {note}" for name in names]
    for each in notes:
        warnings.warn(f"{source}: {each}", stacklevel=4)
    return notes


def _open(dataset_id: str) -> MinariDataset:
    import minari
    from minari.storage.datasets_root_dir import get_dataset_path

    folder = Path(get_dataset_path(dataset_id))
    try:
        if not (folder / "data").exists() and "MINARI_REMOTE" not in os.environ:
            from huggingface_hub import constants, get_session

            # Without a network, the requests of a download are repeated for most of a minute.
            get_session().head(constants.ENDPOINT, timeout=10)
        return minari.load_dataset(dataset_id, download=True)
    except Exception as error:  # a damaged file and a request that fails may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if (folder / "data").exists():
            raise ValueError(f"cannot read the Minari dataset {dataset_id!r}: {reason}") from error
        problem = f"the Minari dataset {dataset_id!r} is not in the local store ({folder})"
        raise ConnectionError(f"{problem}, and could not be downloaded: {reason}") from error


def _require_boxes(space: gymnasium.Space[Any], what: str, source: str) -> None:
    from gymnasium.spaces import Box, Dict, Tuple

    if isinstance(space, Dict | Tuple) and what == "observation":
        for part in space.values() if isinstance(space, Dict) else space:
            _require_boxes(part, what, source)
    elif not isinstance(space, Box):
        raise ValueError(f"{source}: the {what} space holds {space}, it must consist of boxes")


def _read_steps(data: MinariDataset, source: str) -> Steps:
    from gymnasium.spaces.utils import flatdim

    where = f"{source} in {data.storage.data_path}"
    with damage_named(where, "total_steps"):
        rows = int(data.total_steps)
        observations: Floats = np.empty((rows, flatdim(data.observation_space)), dtype=np.float32)
    following = np.empty_like(observations)
    actions: Floats = np.empty((rows, flatdim(data.action_space)), dtype=np.float32)
    rewards: Floats = np.empty(rows, dtype=np.float32)
    terminals, timeouts = np.zeros(rows, dtype=bool), np.zeros(rows, dtype=bool)
    episodes, stop = data.iterate_episodes(), 0
    while True:
        with damage_named(where, f"the episode after step {stop}"):
            episode = next(episodes, None)
        if episode is None:
            break
        start, steps = stop, len(episode.rewards)
        stop += steps
        if steps == 0 or stop > rows:
            continue
        name = f"{source}: episode {episode.id}"
        if np.size(episode.rewards) != steps:
            shape = list(np.shape(episode.rewards))
            raise ValueError(f"{name} has rewards of shape {shape}, expected [{steps}]")
        seen = _flatten(episode.observations, data.observation_space, steps + 1, name)
        observations[start:stop], following[start:stop] = seen[:-1], seen[1:]
        actions[start:stop] = _flatten(episode.actions, data.action_space, steps, name)
        rewards[start:stop] = np.reshape(episode.rewards, -1)
        for flags, values in ((terminals, episode.terminations), (timeouts, episode.truncations)):
            if np.size(values) != steps:
                raise ValueError(f"{name} has {np.size(values)} flags for {steps} steps")
            if not np.isin(values, (0, 1)).all():
                raise ValueError(f"{name} has flags of an end other than 0 and 1; correct them")
            flags[start:stop] = np.reshape(values, -1)
        timeouts[stop - 1] |= not terminals[stop - 1]
    if stop != rows:
        raise ValueError(f"{source}: the episodes have {stop} steps, the metadata say {rows}")
    return Steps(observations, actions, rewards, terminals, timeouts, following)


def _flatten(values: Any, space: Any, rows: int, name: str) -> Floats:
    """Return the leaves of ``values`` side by side, ``[rows, features]``."""
    from gymnasium.spaces import Box, Dict

    if isinstance(space, Box):
        leaf = np.asarray(values)
        if len(leaf) != rows or leaf[0].size != np.prod(space.shape, dtype=int):
            shape = [rows, *space.shape]
            raise ValueError(f"{name} has an array of shape {list(leaf.shape)}, expected {shape}")
        return leaf.reshape(rows, -1).astype(np.float32)
    parts = space.items() if isinstance(space, Dict) else enumerate(space)
    return np.concatenate([_flatten(values[key], part, rows, name) for key, part in parts], axis=1)
