"""The range of a dataset's actions: known, checked, and mapped to [-1, 1].

All policies of this library act in [-1, 1]. :func:`scaled` maps actions of another range there, and
the environment maps them back: its argument ``action_bounds``, see :func:`iwsft.environments.make`.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from iwsft.datasets import catalog
from iwsft.datasets.dataset import WHOLE, Bounds, OfflineDataset, fingerprint_of
from iwsft.datasets.episodes import Floats, Steps, check_actions, first_row
from iwsft.trajectory import ACTION

# Arguments with which the environments of D4RL's tasks have the same spaces.
_SAME_SPACES = {"conventions", "max_episode_steps", "tasks_to_complete"}
_SAME_SPACES |= {"robot_noise_ratio", "object_noise_ratio"}


def spaces_of(
    env_id: str, env_kwargs: Mapping[str, Any], *, trusted: bool
) -> tuple[int | None, NDArray[Any], NDArray[Any]]:
    """Return the columns of an environment's observations, and the bounds ``[act]`` of its actions.

    The columns are None where the observations are not known as vectors. Modules that the id names
    are imported only if they are ``trusted``. The errors are those of
    :func:`iwsft.environments.make`.
    """
    if env_id in catalog.SIZES and not env_kwargs.keys() - _SAME_SPACES:
        size = catalog.SIZES[env_id][1]
        return catalog.SIZES[env_id][0], -np.ones(size), np.ones(size)
    from iwsft import environments

    modules = environments.modules_to_import(env_id, env_kwargs)
    if modules and not trusted:
        raise ValueError(f"{env_id!r} imports {modules}; pass trust_env_module if you trust that")
    columns: int | None = None  # unless policies need the user's flattener
    with environments.make(env_id, **env_kwargs) as env:
        bounds = environments.action_space(env)
        with suppress(ValueError):
            columns = len(environments.flattener(env)(env.observation_space.sample()))
    return columns, bounds.low, bounds.high


def find_bounds(
    steps: Steps,
    env_id: str | None,
    env_kwargs: Mapping[str, Any],
    source: str,
    *,
    trusted: bool = False,
    given: tuple[ArrayLike, ArrayLike] | None = None,
) -> tuple[Bounds, list[str]]:
    """Check that steps can be of an environment; return the bounds of their actions, and notes.

    Actions must have as many columns as the environment's, and be in the bounds ``[act]`` that are
    ``given``, else in the environment's, or in [-1, 1] where these are not known (ValueError).
    Where observations have other columns, a note is returned, with a warning: a policy can be
    scored only with a function from the environment's observations to the data's. So it is with
    actions that are all whole numbers, of no known environment.
    """
    actions, notes = steps.actions, []
    known, unknown = given, "name their environment in the file's attribute 'env_id'"
    try:
        spaces = None if env_id is None else spaces_of(env_id, env_kwargs, trusted=trusted)
    except (ValueError, TypeError, ImportError) as error:
        spaces, unknown = None, f"the range of actions is not known: {error}"
    if spaces is None:
        notes += _whole_numbers(actions, source)
        # A Minari environment that can't be made is named when a policy is scored there.
        notes += [unknown] if given is None and env_id is not None else []
    else:
        expected, low, high = spaces
        known, columns, size = given or (low, high), steps.observations.shape[1], actions.shape[1]
        if low.shape != (size,):
            problem = f"actions of size {size}, {env_id} takes size {low.size}"
            raise ValueError(f"{source} has {problem}; name its own environment as 'env_id'")
        if expected not in (None, columns):
            notes.append(f"observations of size {columns}, {env_id} gives size {expected}")
            other = "it may be the data of another one"
            warnings.warn(f"{source} has {notes[-1]}: {other}", stacklevel=5)
    if known is not None:
        return _bounds(actions, *known, source), notes
    try:
        return _bounds(actions, *WHOLE, source), notes
    except ValueError as beyond:
        raise ValueError(f"{beyond}, or {unknown}") from None


def _whole_numbers(actions: Floats, source: str) -> list[str]:
    """Note, with a warning, that actions differ and are all whole numbers."""
    fraction = first_row(actions, lambda rows: rows != np.rint(rows))
    if fraction is not None or actions.min() == actions.max():
        return []
    note = "all actions are whole numbers, and are read as points of a continuous range"
    warnings.warn(f"{source}: {note}; discrete actions need a policy of your own", stacklevel=6)
    return [note]


def _bounds(actions: Floats, low: ArrayLike, high: ArrayLike, source: str) -> Bounds:
    """Check actions ``[N, act]`` against their bounds ``[act]``; return the bounds.

    Each is one number where all numbers of an action have the same. Infinite bounds are replaced by
    the extremes of the data, or by those of [-1, 1] where the data stay inside.
    """
    low, high = np.asarray(low, np.float64).reshape(-1), np.asarray(high, np.float64).reshape(-1)
    check_actions(actions, low, high, source)
    least, most = actions.min(axis=0), actions.max(axis=0)
    beyond = bool((np.maximum(-least, most) > 1).any())
    limits = []
    for bound, seen, one in ((low, least, -1.0), (high, most, 1.0)):
        open_end = np.where(least < most, seen, seen + one) if beyond else one
        limits.append(np.where(np.isfinite(bound), bound, open_end))
    if all((limit == limit[0]).all() for limit in limits):
        return limits[0][0].item(), limits[1][0].item()
    return limits[0].tolist(), limits[1].tolist()


def scaled(data: OfflineDataset) -> OfflineDataset:
    """Map the actions of a dataset from their bounds to [-1, 1], and its environment with them."""
    low, high = (np.asarray(bound, np.float32) for bound in data.action_bounds)
    trajectories = data.trajectories.copy()
    actions = trajectories.get(ACTION).numpy()
    half = np.where(high > low, (high - low) / 2, np.float32(1.0))
    mapped = ((actions - (high + low) / 2) / half).clip(-1.0, 1.0)
    trajectories.set(ACTION, torch.from_numpy(mapped))
    reached = f"they reach from {actions.min():g} to {actions.max():g}"
    note = f"actions mapped from {describe(data.action_bounds)} to [-1, 1]; {reached}"
    return replace(
        data,
        trajectories=trajectories,
        fingerprint=fingerprint_of(trajectories),
        env_kwargs={**data.env_kwargs, "action_bounds": list(data.action_bounds)},
        action_bounds=WHOLE,
        notes=(*data.notes, note),
    )


def describe(bounds: Bounds) -> str:
    """Return bounds as text, as those of the smallest and largest number of an action."""
    return f"[{np.min(bounds[0]):g}, {np.max(bounds[1]):g}]"
