"""The result of every loader: trajectories and their origin."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tensordict import TensorDict

from iwsft.fingerprint import fingerprint

Bounds = tuple[float | list[float], float | list[float]]
WHOLE: Bounds = (-1.0, 1.0)


@dataclass(frozen=True, eq=False)
class OfflineDataset:
    """Trajectories in the packed layout (see :mod:`iwsft.trajectory`) and their origin.

    Attributes:
        trajectories: Packed trajectories of batch size ``[N]`` steps: ``observation`` ``[N, obs]``,
            ``action`` ``[N, act]``, ``("next", "observation")`` ``[N, obs]``, ``("next",
            "reward")`` ``[N, 1]`` (all float32), ``("next", "done" | "terminated" | "truncated")``
            ``[N, 1]`` bool, ``("collector", "traj_ids")`` ``[N]`` int64.
        name: Name without a slash, fit for a folder.
        env_id: Gymnasium environment of the data, where known, with ``env_kwargs``. Before a
            program makes an environment that its user has not named, it must ask where
            :func:`iwsft.environments.modules_to_import` is not empty.
        reference_scores: D4RL's (minimum, maximum) return in the environment, where known.
        source: File, URL or Minari id that was read.
        fingerprint: SHA-256 of the contents, independent of the path.
        env_kwargs: Arguments of :func:`iwsft.environments.make`, plain values that JSON takes.
        action_bounds: Lower and upper bound of the actions, the environment's or else the data's,
            as numbers or lists with a number per column. Policies of this library act in [-1, 1].
        notes: A sentence on each thing that the loader changed or left out.
    """

    trajectories: TensorDict
    name: str
    env_id: str | None
    reference_scores: tuple[float, float] | None
    source: str
    fingerprint: str
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    action_bounds: Bounds = WHOLE
    notes: tuple[str, ...] = ()


def fingerprint_of(trajectories: TensorDict) -> str:
    """Return the SHA-256 of all entries: keys, dtypes, shapes and values."""
    return fingerprint(dict(trajectories.flatten_keys("/").items()))
