"""Gymnasium environments by id, with clear errors, and their observations as flat vectors."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.error import DependencyNotInstalled, DeprecatedEnv, UnregisteredEnv
from numpy.typing import NDArray

from iwsft import d4rl_conventions

_INSTALL = "pip install 'iwsft[control]' installs the packages of D4RL's tasks"
_ROBOTICS = "gymnasium_robotics"
# Starts of its ids that D4RL's tasks use.
_ROBOTICS_IDS = ("AntMaze", "AdroitHand", "FrankaKitchen", "PointMaze")
# From an environment's observation to a flat vector [obs].
Flatten = Callable[[Any], NDArray[Any]]


def make(
    env_id: str, *, conventions: Literal["d4rl"] | None = None, **kwargs: Any
) -> gym.Env[Any, Any]:
    """Make an environment without gymnasium's checking wrapper, which costs time at each step.

    Ids that gymnasium does not know are looked up in gymnasium-robotics (FrankaKitchen, AntMaze,
    AdroitHand), which is imported only then. D4RL's locomotion scores belong to the ``-v4``
    environments (v5 changed physics and rewards), so gymnasium's advice to upgrade is not shown.

    Args:
        env_id: Id registered with gymnasium, or ``module:id``.
        conventions: ``"d4rl"`` changes AntMaze and AdroitHand into D4RL's tasks, see
            :mod:`iwsft.d4rl_conventions`.
        kwargs: Arguments of the environment; they override those of the conventions.

    Raises:
        ValueError: The id is not registered (the error names the nearest known ids), or the
            conventions are unknown, or unknown for this environment.
        ImportError: A package of the environment is not installed, or the environment's code is no
            longer shipped.
    """
    if conventions is None:
        return _make(env_id, kwargs)
    if conventions != "d4rl":
        raise ValueError(f"conventions={conventions!r} is unknown; there is 'd4rl', or None")
    env = _make(env_id, {**d4rl_conventions.get_arguments(env_id), **kwargs})
    return d4rl_conventions.wrap(env, env_id)


def _make(env_id: str, kwargs: Mapping[str, Any]) -> gym.Env[Any, Any]:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r".*The environment \S+ is out of date", category=DeprecationWarning
        )
        try:
            return gym.make(env_id, disable_env_checker=True, **kwargs)
        except UnregisteredEnv as error:
            robotics = importlib.util.find_spec(_ROBOTICS) is not None
            if robotics and _ROBOTICS not in sys.modules:
                gym.register_envs(importlib.import_module(_ROBOTICS))
                return _make(env_id, kwargs)
            if not robotics and env_id.startswith(_ROBOTICS_IDS):
                raise ImportError(f"{env_id!r} needs gymnasium-robotics: {_INSTALL}") from None
            raise ValueError(f"unknown environment {env_id!r}. {_nearest(env_id)}") from error
        except DeprecatedEnv as error:
            raise ValueError(f"{error} {_nearest(env_id)}") from error
        except (DependencyNotInstalled, ImportError) as error:
            hint = _nearest(env_id) if isinstance(error, ImportError) else _INSTALL
            raise ImportError(f"environment {env_id!r} cannot be made: {error} {hint}") from error


def _nearest(env_id: str) -> str:
    by_lower = {known.lower(): known for known in gym.registry if known != env_id}
    close = difflib.get_close_matches(env_id.lower(), by_lower, n=3)
    if close:
        return f"Did you mean {', '.join(by_lower[name] for name in close)}?"
    return "Install or import the package that registers it, or pass it as 'module:id'."


def flattener(env: gym.Env[Any, Any]) -> Flatten:
    """Return the function from observations of ``env`` to the vectors that a policy takes.

    Vectors stay unchanged. Dict observations get the columns of D4RL's files:

    - AntMaze: ``achieved_goal`` (x, y), then ``observation``: 29 numbers, without the goal. The
      origin of x and y is D4RL's only with ``conventions="d4rl"``.
    - FrankaKitchen: the 9 robot and 21 object positions, then the 30 goal positions, 0 where an
      element has no goal: 60 numbers. The velocities are dropped, as in D4RL.

    Raises:
        ValueError: The observation space is of another kind.
    """
    space, env_id = env.observation_space, id_of(env)
    if isinstance(space, gym.spaces.Box) and len(space.shape) == 1:
        return np.asarray
    if isinstance(space, gym.spaces.Dict):
        if env_id.startswith("AntMaze"):
            return lambda seen: np.concatenate((seen["achieved_goal"], seen["observation"]))
        if env_id.startswith("FrankaKitchen"):
            return _franka_kitchen
    raise ValueError(f"observations of {env_id} are {space}: pass observation=, their flattener")


def _franka_kitchen(observation: dict[str, Any]) -> NDArray[Any]:
    from gymnasium_robotics.envs.franka_kitchen.kitchen_env import OBS_ELEMENT_INDICES

    state = observation["observation"]  # robot q [9], robot v [9], objects q [21], objects v [20]
    goal = np.zeros(30)
    for element, value in observation["desired_goal"].items():
        goal[OBS_ELEMENT_INDICES[element]] = value
    return np.concatenate((state[:9], state[18:39], goal))


def id_of(env: gym.Env[Any, Any]) -> str:
    """Return the full id of ``env``, version included (``make("Hopper")`` takes the latest)."""
    return env.spec.id if env.spec is not None else type(env.unwrapped).__name__


def action_space(env: gym.Env[Any, Any]) -> gym.spaces.Box:
    """Return the action space of ``env``, a vector between bounds.

    Raises:
        ValueError: The action space is of another kind.
    """
    space = env.action_space
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        raise ValueError(f"{id_of(env)} has the action space {space}; only vectors (Box) are taken")
    return space


def success(info: Mapping[str, Any]) -> bool | None:
    """Return whether a step's ``info`` reports success; None where it does not mention it."""
    value = info.get("success", info.get("is_success"))
    return None if value is None else bool(value)


def versions(env: gym.Env[Any, Any]) -> dict[str, str]:
    """Return the versions of the packages that decide the numbers of ``env``."""
    packages = ["gymnasium", "mujoco"]
    if type(env.unwrapped).__module__.startswith(_ROBOTICS):
        packages.append("gymnasium-robotics")
    return {name: version(name) for name in packages}
