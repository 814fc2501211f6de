"""The policies of ``--policy``."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tensordict.nn import TensorDictModuleBase
from torchrl.envs.utils import ExplorationType

from benchmarks.collect.options import RANDOM
from benchmarks.collect.simulator import Simulator
from iwsft.acting import PolicyInputs, act, acting, check_keys, check_sizes
from iwsft.fingerprint import fingerprint


@dataclass(frozen=True)
class Behaviour:
    """A policy that collects data.

    Attributes:
        name: Its name on the command line.
        policy: The policy; None for uniform actions.
        env_id: Id of the environment that it was trained in, if known.
        env_kwargs: Arguments of that environment.
    """

    name: str
    policy: TensorDictModuleBase | None
    env_id: str | None = None
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)

    def acting(self, mode: ExplorationType) -> AbstractContextManager[None]:
        """Enter :func:`iwsft.acting.acting`, which uniform actions do not need."""
        return nullcontext() if self.policy is None else acting(self.policy, mode)

    def act(self, seen: PolicyInputs) -> NDArray[np.float32]:
        """Call :func:`iwsft.acting.act`; the actions are float32, as they are recorded."""
        assert self.policy is not None
        return act(self.policy, seen, name=f"--policy {self.name}").astype(np.float32)

    @property
    def fingerprint(self) -> str:
        """Fingerprint of its parameters and buffers."""
        return "" if self.policy is None else fingerprint(dict(self.policy.state_dict()))


def load_behaviour(name: str) -> Behaviour:
    """Load a policy of ``--policy`` on the CPU.

    Raises:
        ValueError: There is no folder, module or callable of that name, or it is not a policy.
    """
    if name == RANDOM:
        return Behaviour(name, None)
    folder = Path(name).expanduser()
    env_id: str | None = None
    env_kwargs: dict[str, Any] = {}
    if folder.is_dir():
        policy, env_id, env_kwargs = _of_run(folder)
    elif ":" in name:
        policy = _of_callable(name)
    else:
        raise ValueError(
            f"--policy {name}: no folder of that name; give the folder of a finished run, "
            f"MODULE:CALLABLE, or {RANDOM!r}"
        )
    check_keys(policy, name=f"--policy {name}")
    return Behaviour(name, policy.cpu(), env_id, env_kwargs)


def _of_run(folder: Path) -> tuple[TensorDictModuleBase, str, dict[str, Any]]:
    from benchmarks.collect import sac

    if (folder / sac.POLICY).is_dir():
        return sac.load_policy(folder)
    from benchmarks.d4rl.policies import load_policy

    return load_policy(folder)


def _of_callable(name: str) -> TensorDictModuleBase:
    module, _, attribute = name.rpartition(":")
    try:
        make = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"--policy {name}: {error}; MODULE is imported from the current folder or from what is "
            "installed"
        ) from error
    try:
        policy = make()
    except TypeError as error:
        raise ValueError(f"--policy {name} is called without arguments: {error}") from error
    if not isinstance(policy, TensorDictModuleBase):
        raise ValueError(
            f"--policy {name} gave {type(policy).__name__}; called without arguments, it must "
            "return a TensorDictModule"
        )
    return policy


def check_behaviour(behaviour: Behaviour, simulator: Simulator) -> None:
    """Check a policy by calling it once.

    Raises:
        ValueError: Its sizes are not those of the environment.
    """
    if behaviour.policy is not None:
        with acting(behaviour.policy):
            check_sizes(
                behaviour.policy,
                np.zeros(simulator.observation_dim, np.float32),
                simulator.low.shape,
                simulator.env_id,
                name=f"--policy {behaviour.name}",
            )
