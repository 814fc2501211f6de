"""The range of a dataset's actions: known, checked, and mapped to [-1, 1].

All policies of this library act in [-1, 1]. Actions of another range are mapped when data are
loaded, and mapped back by the environment: its argument ``action_bounds``, see
:func:`iwsft.environments.make`. Nothing changes where the range is [-1, 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from iwsft.datasets import catalog
from iwsft.datasets.episodes import Floats, check_actions


def bounds_of(
    env_id: str, env_kwargs: Mapping[str, Any], size: int, *, trusted: bool
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the bounds of an environment's actions.

    Args:
        env_id: Id of the environment, see :func:`iwsft.environments.make`.
        env_kwargs: Its arguments.
        size: Number of columns of the data's actions.
        trusted: Whether modules that the id names may be imported.

    Raises:
        ValueError: The environment cannot be made, or takes other actions.
        ImportError: A package of the environment is not installed.
    """
    if env_id in catalog.ENV_IDS and not {"wrappers", "action_bounds"} & env_kwargs.keys():
        return -np.ones(size), np.ones(size)
    from iwsft import environments

    modules = environments.modules_to_import(env_id, env_kwargs)
    if modules and not trusted:
        raise ValueError(f"{env_id!r} imports {modules}; pass trust_env_module if you trust that")
    with environments.make(env_id, **env_kwargs) as env:
        space = environments.action_space(env)
    if space.shape != (size,):
        raise ValueError(f"{env_id} takes actions of shape {space.shape}")
    return space.low, space.high


def scale_actions(
    actions: Floats, low: ArrayLike, high: ArrayLike, source: str
) -> tuple[dict[str, Any], list[str]]:
    """Check actions against their bounds, and map them from these to [-1, 1] in place.

    Where there is no bound, and actions leave [-1, 1], the extremes of the data are the bounds.

    Args:
        actions: Actions, float32 ``[N, act]``.
        low: Lower bounds, ``[act]``.
        high: Upper bounds.
        source: Name of the data in errors.

    Returns:
        The argument ``action_bounds`` of the environment, if it needs one, and a note on it.

    Raises:
        ValueError: An action lies outside the bounds.
    """
    low, high = np.asarray(low, np.float64).reshape(-1), np.asarray(high, np.float64).reshape(-1)
    check_actions(actions, low, high, source)
    least, most = actions.min(axis=0), actions.max(axis=0)
    beyond = bool((np.maximum(-least, most) > 1).any())
    limits = []
    for bound, seen, one in ((low, least, -1.0), (high, most, 1.0)):
        open_end = np.where(least < most, seen, seen + one) if beyond else one
        limits.append(np.where(np.isfinite(bound), bound, open_end))
    low, high = limits
    if (low == -1).all() and (high == 1).all():
        return {}, []
    actions -= np.asarray((high + low) / 2, np.float32)
    actions /= np.asarray(np.where(high > low, (high - low) / 2, 1.0), np.float32)
    np.clip(actions, -1.0, 1.0, out=actions)
    equal = (low == low[0]).all() and (high == high[0]).all()
    bounds = [x[0].item() if equal else x.tolist() for x in (low, high)]
    text = " to ".join(f"{x:g}" for x in bounds) if equal else f"{bounds[0]} to {bounds[1]}"
    reached = f"they reach from {least.min():g} to {most.max():g}"
    return {"action_bounds": bounds}, [f"actions mapped from {text} to [-1, 1]; {reached}"]
