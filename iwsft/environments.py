"""Gymnasium environments by id, with clear errors, and their observations as flat vectors."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import json
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from typing import Any, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray

from iwsft import d4rl_conventions
from iwsft.extras import install, named

with named():
    import gymnasium as gym
    from gymnasium.envs.registration import EnvSpec
    from gymnasium.error import DependencyNotInstalled, DeprecatedEnv, UnregisteredEnv
    from gymnasium.utils import RecordConstructorArgs

_ROBOTICS = "gymnasium_robotics"
# Starts of its ids that D4RL's tasks use.
_ROBOTICS_IDS = ("AntMaze", "AdroitHand", "FrankaKitchen", "PointMaze")
# From an environment's observation to a flat vector [obs].
Flatten = Callable[[Any], NDArray[Any]]


def make(
    env_id: str,
    /,
    *,
    conventions: Literal["d4rl"] | None = None,
    wrappers: Sequence[Mapping[str, Any]] = (),
    action_bounds: Sequence[Any] | None = None,
    **kwargs: Any,
) -> gym.Env[Any, Any]:
    """Make an environment without gymnasium's checking wrapper, which costs time at each step.

    A dataset has the arguments, plain values, as ``env_id`` and ``env_kwargs``. Ids that gymnasium
    does not know are looked up in gymnasium-robotics, which is imported only then.

    Args:
        env_id: Id registered with gymnasium, or ``module:id``.
        conventions: ``"d4rl"`` changes AntMaze and AdroitHand into D4RL's tasks, see
            :mod:`iwsft.d4rl_conventions`.
        wrappers: Wrappers from the inside out, each with an ``entry_point`` (``module:Class``) and
            ``kwargs``, as gymnasium records them.
        action_bounds: Bounds of the environment's actions, numbers or lists, to which actions in
            [-1, 1] are then mapped.
        kwargs: Arguments of the environment, and ``max_episode_steps``; they override those of the
            conventions.

    Raises:
        ValueError: The id is not registered, or the environment does not take the arguments.
        TypeError: It is something else than an id, such as an environment itself.
        ImportError: A package does not have the environment.
    """
    if not isinstance(env_id, str | EnvSpec):
        way_out = "pass its id (env.spec.id), from which each parallel environment is made"
        raise TypeError(f"a {type(env_id).__name__} is not an id of an environment; {way_out}")
    if conventions not in (None, "d4rl"):
        raise ValueError(f"conventions={conventions!r} is unknown; there is 'd4rl', or None")
    if conventions is not None:
        kwargs = {**d4rl_conventions.get_arguments(env_id), **kwargs}
    env = _make(env_id, kwargs)
    if conventions is not None:
        env = d4rl_conventions.wrap(env, env_id)
    try:
        for wrapper in wrappers:
            env = _wrap(env, wrapper)
        return env if action_bounds is None else ScaledActions(env, *action_bounds)
    except TypeError as error:
        raise ValueError(f"{wrappers=} or {action_bounds=} has another form: {error}") from error


def _make(env_id: str, kwargs: Mapping[str, Any]) -> gym.Env[Any, Any]:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message=r".*The environment \S+ is out of date", category=DeprecationWarning
        )
        try:
            return gym.make(env_id, disable_env_checker=True, **kwargs)
        except UnregisteredEnv as error:
            if _register_robotics():
                return _make(env_id, kwargs)
            if _ROBOTICS not in sys.modules and env_id.startswith(_ROBOTICS_IDS):
                raise ImportError(f"{env_id!r} needs {_ROBOTICS}: {install(_ROBOTICS)}") from None
            raise ValueError(f"unknown environment {env_id!r}. {_nearest(env_id)}") from error
        except DeprecatedEnv as error:
            raise ValueError(f"{error} {_nearest(env_id)}") from error
        except (DependencyNotInstalled, ImportError) as error:
            # Gymnasium raises a plain ImportError for ids that moved elsewhere.
            ours = "imageio", "mujoco"
            lacks = isinstance(error, DependencyNotInstalled) or error.name in ours
            # Versions before v4 need a package that can no longer be installed.
            lacks = lacks and "mujoco_py" not in str(error)
            hint = install("mujoco") if lacks else _nearest(env_id)
            reason = f"{str(error).rstrip('.')}. {hint}"
            raise ImportError(f"environment {env_id!r} cannot be made: {reason}") from error
        except Exception as error:  # the constructor may raise anything
            reason = " ".join(f"{type(error).__name__}: {error.__cause__ or error}".split())
            fault = "does not take" if isinstance(error, TypeError) else "cannot be made with"
            raise ValueError(f"{env_id} {fault} {dict(kwargs)}: {reason}") from error


def _register_robotics() -> bool:
    """Register gymnasium-robotics; returns False where that is done, or it is not installed."""
    if _ROBOTICS in sys.modules or importlib.util.find_spec(_ROBOTICS) is None:
        return False
    gym.register_envs(importlib.import_module(_ROBOTICS))
    return True


def _wrap(env: gym.Env[Any, Any], wrapper: Mapping[str, Any]) -> gym.Env[Any, Any]:
    try:
        module, _, name = wrapper["entry_point"].partition(":")
        kind, kwargs = getattr(importlib.import_module(module), name), wrapper["kwargs"]
        if kwargs is None:
            raise ValueError("its arguments were not recorded")
        if not issubclass(kind, gym.Wrapper):
            raise ValueError("it is not a wrapper of gymnasium")
        return kind(env, **kwargs)
    except Exception as error:  # the constructor may raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"{wrapper} cannot wrap {id_of(env)}: {reason}") from error


class ScaledActions(gym.ActionWrapper[Any, Any, Any], RecordConstructorArgs):
    """``env`` with actions in [-1, 1]: -1 is the lower bound of each number, 1 the upper one.

    The bounds, numbers or ``[act]``, must be those of ``env``, unless it has none (ValueError).
    """

    def __init__(self, env: gym.Env[Any, Any], low: Any, high: Any) -> None:
        RecordConstructorArgs.__init__(self, low=low, high=high)
        super().__init__(env)
        space = action_space(env)
        for given, own in ((low, space.low), (high, space.high)):
            finite = np.isfinite(own)
            if not np.allclose(np.broadcast_to(given, own.shape)[finite], own[finite]):
                raise ValueError(f"action_bounds={[low, high]}, but {id_of(env)} takes {space}")
        self._middle = (np.float64(high) + np.float64(low)) / 2
        self._half = (np.float64(high) - np.float64(low)) / 2
        self._space = space
        self.action_space = gym.spaces.Box(-1.0, 1.0, space.shape, np.float32)

    def action(self, action: NDArray[Any]) -> NDArray[Any]:
        scaled = self._middle + self._half * np.clip(action, -1.0, 1.0)
        return in_dtype(scaled, self._space.dtype)


def arguments_of(spec: EnvSpec) -> tuple[str, dict[str, Any]]:
    """Return the id and the arguments with which :func:`make` makes a recorded environment.

    Arguments and wrappers that the id is registered with are left out. An id that is not
    registered gets the module of its entry point: ``module:id``.
    """
    env_id, arguments = spec.id, {k: v for k, v in spec.kwargs.items() if k != "render_mode"}
    if env_id not in gym.registry:
        _register_robotics()
    known = gym.registry.get(env_id)
    if known is None:
        known = EnvSpec(env_id)
        env_id = f"{str(spec.entry_point).partition(':')[0]}:{env_id}"
    registered = json.loads(json.dumps(known.kwargs, default=str))
    arguments = {k: v for k, v in arguments.items() if k not in registered or registered[k] != v}
    if spec.max_episode_steps != known.max_episode_steps:
        arguments["max_episode_steps"] = spec.max_episode_steps or -1  # -1: no limit
    wrappers = spec.additional_wrappers[len(known.additional_wrappers) :]
    if wrappers:
        arguments["wrappers"] = [
            {"entry_point": wrapper.entry_point, "kwargs": wrapper.kwargs} for wrapper in wrappers
        ]
    return env_id, arguments


def complete(env_id: str, env_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Add the arguments that the id's registration, its step limit and the conventions imply."""
    name = env_id.rpartition(":")[2]
    if name not in gym.registry:
        _register_robotics()
    spec = gym.registry.get(name)
    known = {} if spec is None else {"max_episode_steps": spec.max_episode_steps, **spec.kwargs}
    if env_kwargs.get("conventions") == "d4rl" and name in d4rl_conventions.ENV_IDS:
        known |= d4rl_conventions.get_arguments(name)
    return {**known, **env_kwargs}


def modules_to_import(env_id: str, env_kwargs: Mapping[str, Any]) -> list[str]:
    """Return the modules that :func:`make` imports because the id or a wrapper names them.

    Those of gymnasium and of this library, and those already imported, are left out. A program
    must ask its user before it imports them.
    """
    wrappers = env_kwargs.get("wrappers", ())
    points = [dict(wrapper).get("entry_point") for wrapper in wrappers]
    names = [env_id.rpartition(":")[0], *(str(point).partition(":")[0] for point in points)]
    own = ("", "gymnasium", _ROBOTICS, "iwsft")
    return [name for name in names if name.split(".")[0] not in own and name not in sys.modules]


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


def moving_wrappers(env: gym.Env[Any, Any]) -> str:
    """Return the names of wrappers whose running statistics change with each step, or ""."""
    names = []
    while isinstance(env, gym.Wrapper):
        if getattr(env, "update_running_mean", False) is True:
            names.append(type(env).__name__)
        env = env.env
    return ", ".join(names)


def action_space(env: gym.Env[Any, Any]) -> gym.spaces.Box:
    """Return the action space of ``env``, a vector between bounds; others are refused."""
    space = env.action_space
    if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
        raise ValueError(f"{id_of(env)} has the action space {space}; only vectors (Box) are taken")
    return space


def in_dtype(actions: NDArray[Any], dtype: DTypeLike) -> NDArray[Any]:
    """Return actions in the dtype of a space, rounded where that holds whole numbers."""
    whole = np.issubdtype(dtype, np.integer)
    return (np.rint(actions) if whole else actions).astype(dtype)


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
