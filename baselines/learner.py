"""The interface of a baseline: settings, a policy that acts, and the parts of its training."""

from __future__ import annotations

import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import TargetNetUpdater

from iwsft import training
from iwsft.datasets.episodes import ACTION_TOLERANCE
from iwsft.training import Cost, Sampler, Schedule, Training
from iwsft.trajectory import ACTION, DATA_WEIGHT, DONE, REWARD, TERMINATED, Segments, fit, layout
from iwsft.validation import validate


@dataclass(frozen=True)
class Learner:
    """The arguments of :func:`iwsft.training.fit`, and the policy that it trains.

    Attributes:
        policy: Policy for :func:`iwsft.evaluate`. It reads ``observation`` as the environment
            gives it, writes ``action`` in the environment's range, and shares its parameters with
            ``loss``.
        loss: TorchRL loss; the sum of its ``loss...`` outputs is minimised.
        sampler: Sampler of the batches.
        schedule: Schedule of the updates, or one for each network of the loss.
        updater: Updater of the target networks.
        limits: Limits of the loss's outputs, beyond which a critic has diverged.
    """

    policy: TensorDictModuleBase
    loss: LossModule
    sampler: Sampler
    schedule: Schedule | Mapping[str, Schedule]
    updater: TargetNetUpdater | None = None
    limits: Mapping[str, float] = field(default_factory=dict)

    def fit(self, **options: Any) -> Cost:
        """Train the policy; the options are the further ones of :func:`iwsft.training.fit`."""
        return training.fit(**self._parts, **options)

    def training(self, **options: Any) -> Training:
        """Return the training of one seed of :func:`iwsft.training.fit_stack`."""
        return Training(**self._parts, **options)

    @property
    def _parts(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "policy"}

    def __deepcopy__(self, memo: dict[int, Any]) -> Learner:
        """Return a copy whose policy shares its parameters with its loss, as here."""
        # A TensorDict's own deepcopy clones, without looking at what has been copied already.
        return pickle.loads(pickle.dumps(self))


def check_finite(settings: Any, *, but: str = "") -> None:
    """Refuse settings, a dataclass, with a NaN or infinite number; ``but`` may be infinite."""
    for name, value in vars(settings).items():
        allowed = name == but and value == math.inf
        if isinstance(value, float) and not math.isfinite(value) and not allowed:
            raise ValueError(f"{name}={value} must be finite")


def read_steps(trajectories: TensorDictBase, keys: Sequence[NestedKey]) -> TensorDictBase:
    """Check trajectories, and return a shallow copy in the form that all baselines read.

    Numbers have torch's default dtype, rewards and ends are ``[N, 1]`` where those given are
    ``[N]``, and ends are bool. ``keys`` are the entries that the algorithm learns from.

    Raises:
        KeyError: An entry is missing.
        ValueError: The trajectories are padded or have data weights, which no baseline reads; an
            entry is not a vector for each step, or not finite; or an action is beyond [-1, 1], in
            which all policies act.
    """
    if trajectories.get(DATA_WEIGHT, default=None) is not None:
        raise ValueError(f"a baseline does not read {DATA_WEIGHT!r}; load the data without it")
    validate(trajectories, keys=keys)
    data, shape = trajectories.copy(), layout(trajectories)
    if len(shape) != 1:
        raise ValueError("these trajectories are padded; use trajectory.pack(trajectories)")
    for key in (*keys, DONE, TERMINATED):
        value = data.get(key, default=None)
        if value is None:
            continue
        if key in (REWARD, DONE, TERMINATED):
            value = fit(value, shape, repr(key)).unsqueeze(-1)
        elif value.ndim != 2:
            found, needed = list(value.shape), f"[{shape[0]}, size]"
            raise ValueError(f"{key!r} has shape {found}; a baseline reads vectors, {needed}")
        ends = key in (DONE, TERMINATED)
        data.set(key, value.bool() if ends else value.to(torch.get_default_dtype()))
    beyond = float(data.get(ACTION)[Segments.of(data).valid].abs().max())
    if beyond > 1 + ACTION_TOLERANCE:
        way_out = "load the data with scale_actions=True, or map them there"
        raise ValueError(f"actions reach {beyond:g}, and all policies act in [-1, 1]: {way_out}")
    return data


class Baseline(Protocol):
    """A module of this package: one algorithm.

    Its ``Settings`` are a frozen dataclass of plain values, one of which is ``steps``, the
    published number of updates.
    """

    @property
    def Settings(self) -> type[Any]:
        """The dataclass of the settings."""

    def published(self, dataset: str) -> tuple[Any, str]:
        """Return the published settings for a dataset, and their source in words."""

    def policy(self, observation_dim: int, action_dim: int, settings: Any) -> TensorDictModuleBase:
        """Return an untrained policy, which can load the ``state_dict`` of a trained one."""

    def build(self, trajectories: TensorDictBase, settings: Any, *, seed: int) -> Learner:
        """Return networks, loss and sampler for packed trajectories, on their device.

        Raises:
            KeyError: An entry that the algorithm learns from is missing.
            ValueError: Settings are out of range, or the algorithm can't learn from the data.
        """
