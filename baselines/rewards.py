"""Changes of the rewards that the published runs of critics make before training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from tensordict import TensorDictBase
from torch import Tensor

from iwsft.trajectory import ACTION, REWARD, Segments

Rewards = Literal["as they are", "return range", "minus one", "times 100"]


def transformed(trajectories: TensorDictBase, rewards: Rewards) -> TensorDictBase:
    """Return a shallow copy with changed rewards; the trajectories given stay as they are.

    Args:
        trajectories: Packed trajectories with rewards.
        rewards: ``"as they are"`` changes nothing. ``"return range"`` multiplies rewards by
            1000 / (largest - least return of a trajectory), so that the returns of every dataset
            span 1000 (IQL on locomotion). ``"minus one"`` subtracts 1 from each reward: 0 at the
            goal and -1 at every other step, where the data have 1 and 0 (IQL on antmaze).
            ``"times 100"`` multiplies each by 100 (ReBRAC on antmaze).

    Raises:
        ValueError: The name is unknown, or rewards are to be scaled and all returns are equal.
    """
    if rewards not in _CHANGES:
        raise ValueError(f"rewards must be one of {', '.join(_CHANGES)}, not {rewards!r}")
    out = trajectories.copy()
    out.set(REWARD, _CHANGES[rewards](trajectories))
    return out


def clipped_actions(trajectories: TensorDictBase, margin: float = 1e-5) -> TensorDictBase:
    """Return a shallow copy with actions in [-1 + margin, 1 - margin], as in IQL's code."""
    out = trajectories.copy()
    out.set(ACTION, trajectories.get(ACTION).clamp(margin - 1, 1 - margin))
    return out


def _as_they_are(trajectories: TensorDictBase) -> Tensor:
    return trajectories.get(REWARD)


def _return_range(trajectories: TensorDictBase) -> Tensor:
    reward = trajectories.get(REWARD)
    segments = Segments.of(trajectories)
    # Slots past the last trajectory are empty.
    returns = segments.sum(reward)[: int(segments.index[-1]) + 1].double()
    spread = float(returns.max() - returns.min())
    if not spread > 0:
        raise ValueError(
            f"all {len(returns)} trajectories have the return {float(returns[0]):g}, so rewards "
            "can't be scaled by the range of returns; set rewards='as they are', or check the data"
        )
    return reward * (1000 / spread)


def _minus_one(trajectories: TensorDictBase) -> Tensor:
    return trajectories.get(REWARD) - 1


def _times_100(trajectories: TensorDictBase) -> Tensor:
    return 100 * trajectories.get(REWARD)


_CHANGES: Mapping[str, Callable[[TensorDictBase], Tensor]] = {
    "as they are": _as_they_are,
    "return range": _return_range,
    "minus one": _minus_one,
    "times 100": _times_100,
}
