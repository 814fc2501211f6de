"""Changes of the rewards that the published runs of critics make before training."""

from __future__ import annotations

from typing import Literal, get_args

from tensordict import TensorDictBase

from iwsft.samplers import multiplicities
from iwsft.trajectory import ACTION, REWARD, Segments, lengths

Rewards = Literal["as they are", "return range", "minus one", "times 100"]


def transformed(trajectories: TensorDictBase, rewards: Rewards) -> TensorDictBase:
    """Return a shallow copy with changed rewards; the trajectories given stay as they are.

    Args:
        trajectories: Packed trajectories with rewards.
        rewards: ``"as they are"`` changes nothing. ``"return range"`` multiplies rewards by
            1000 / (largest - least return of a trajectory that counts), so that the returns of
            every dataset span 1000 (IQL on locomotion). ``"minus one"`` subtracts 1 from each
            reward: 0 at the goal and -1 at every other step, where the data have 1 and 0 (IQL on
            antmaze). ``"times 100"`` multiplies each by 100 (ReBRAC on antmaze).

    Raises:
        ValueError: The name is unknown, or rewards are to be scaled and all returns are equal.
    """
    out, reward = trajectories.copy(), trajectories.get(REWARD)
    if rewards == "return range":
        out.set(REWARD, reward * (1000 / _range_of_returns(trajectories)))
    elif rewards == "minus one":
        out.set(REWARD, reward - 1)
    elif rewards == "times 100":
        out.set(REWARD, 100 * reward)
    elif rewards != "as they are":
        names = ", ".join(get_args(Rewards))
        raise ValueError(f"rewards must be one of {names}, not {rewards!r}")
    return out


def clipped_actions(trajectories: TensorDictBase) -> TensorDictBase:
    """Return a shallow copy with actions at least 1e-5 short of -1 and 1, as in IQL's code."""
    edge = 1 - 1e-5
    out = trajectories.copy()
    out.set(ACTION, trajectories.get(ACTION).clamp(-edge, edge))
    return out


def _range_of_returns(trajectories: TensorDictBase) -> float:
    sizes = lengths(trajectories)
    counted = (multiplicities(trajectories, sizes) > 0).to(sizes.device)
    # Slots past the last trajectory are empty.
    returns = Segments.of(trajectories).sum(trajectories.get(REWARD))[: len(sizes)]
    returns = returns[counted].double()
    spread = float(returns.max() - returns.min())
    if not spread > 0:
        raise ValueError(
            f"all {len(returns)} trajectories have the return {float(returns[0]):g}, so rewards "
            "can't be scaled by the range of returns; set rewards='as they are', or check the data"
        )
    return spread
