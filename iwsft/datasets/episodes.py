"""From recorded steps to packed trajectories: first the checks, then the cuts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict

from iwsft.trajectory import (
    ACTION,
    DATA_WEIGHT,
    DONE,
    NEXT_OBSERVATION,
    OBSERVATION,
    REWARD,
    TERMINATED,
    TRUNCATED,
    from_steps,
)
from iwsft.validation import check_data_weights

Floats = NDArray[np.float32]
Flags = NDArray[np.bool_]

# Rounding to float32 and a simulator's own clipping stay below this.
ACTION_TOLERANCE = 1e-4
# Rows that are checked together, so that the masks of a check stay small.
CHUNK = 65_536


@dataclass(frozen=True)
class Steps:
    """Fields of ``N`` steps in the order of recording: float32 ``[N, ...]``, flags bool ``[N]``.

    ``terminals`` tells where the environment ended the episode, ``timeouts`` after which step it
    was cut. A step with both flags counts as terminated only.

    Without ``next_observations`` they are those of the trajectory's next row. At its last step,
    whose successor was not recorded, it is the step's own observation, so that a critic that
    bootstraps there sees a real state. ``data_weight``, float32 ``[N]``, is None if the data give
    none.
    """

    observations: Floats
    actions: Floats
    rewards: Floats
    terminals: Flags
    timeouts: Flags
    next_observations: Floats | None = None
    data_weight: Floats | None = None

    @property
    def ends(self) -> Flags:
        """Whether a row ends an episode, bool ``[N]``."""
        return self.terminals | self.timeouts

    def select(self, rows: Flags) -> Steps:
        """Return the steps of these rows."""
        fields: Any = {name: x if x is None else x[rows] for name, x in vars(self).items()}
        return Steps(**fields)


def pack_steps(steps: Steps, source: str) -> TensorDict:
    """Check steps of this origin, and cut them, see :func:`check_steps` and :func:`cut_steps`."""
    check_steps(steps, source)
    return cut_steps(steps)


def check_steps(steps: Steps, source: str) -> None:
    """Check that there are steps, and that their fields fit together and are finite."""
    rows = len(steps.observations)
    if rows == 0:
        raise ValueError(f"{source} holds no steps: 'observations' has 0 rows")
    for field in ("observations", "actions", "rewards", "terminals", "timeouts"):
        shape = getattr(steps, field).shape
        expected = "[steps, features]" if field in ("observations", "actions") else "[steps]"
        if len(shape) != 1 + expected.count(",") or shape[0] != rows or 0 in shape:
            wrong = f"has shape {list(shape)}, expected {expected} with {rows} rows"
            raise ValueError(f"{source}: {field!r} {wrong}")
    following, shape = steps.next_observations, steps.observations.shape
    if following is not None and following.shape != shape:
        wrong = f"has shape {list(following.shape)}, expected that of 'observations', {list(shape)}"
        raise ValueError(f"{source}: 'next_observations' {wrong}")
    for field in ("observations", "actions", "rewards", "next_observations"):
        values = getattr(steps, field)
        row = None if values is None else first_row(values, lambda chunk: ~np.isfinite(chunk))
        if row is not None:
            # What is read as float32 no longer tells infinity from a large float64.
            wrong, way_out = "infinite or beyond float32 (3.4e38)", "scale it, or repair"
            if np.isnan(values[row]).any():
                wrong, way_out = "NaN", "repair"
            wrong = f"{field!r} is {wrong} at row {row}"
            raise ValueError(f"{source}: {wrong}; {way_out} or drop its episode")


def weigh_steps(steps: Steps, weight: Any, source: str) -> Steps:
    """Give each step its data weight, from an array with a number for each; None gives none."""
    if weight is None:
        return steps
    name, rows = f"{source}: the data weight", len(steps.rewards)
    given = np.asarray(weight)
    if given.dtype.kind not in "fiub" or given.shape not in ((rows,), (rows, 1)):
        has = f"of type {given.dtype} and shape {list(given.shape)}"
        raise ValueError(f"{name} is {has}, it must be a number for each of the {rows} steps")
    with np.errstate(over="ignore"):  # the check names it
        values = given.astype(np.float32).reshape(-1)
    check_data_weights(torch.from_numpy(values), name)
    return replace(steps, data_weight=values)


def cut_steps(steps: Steps) -> TensorDict:
    """Cut checked steps into packed trajectories, without a copy of the arrays.

    A trajectory ends with a row where ``terminals | timeouts``. Rows after the last such row, where
    the recording stopped within an episode, are one more trajectory, truncated.
    """
    terminated = steps.terminals
    truncated = steps.timeouts & ~terminated
    truncated[-1] |= not terminated[-1]
    done = terminated | truncated
    following = steps.next_observations
    if following is None:
        following = shift_observations(steps.observations, done)
    weight = steps.data_weight
    return from_steps(
        {
            **({} if weight is None else {DATA_WEIGHT: torch.from_numpy(weight)}),
            OBSERVATION: torch.from_numpy(steps.observations),
            ACTION: torch.from_numpy(steps.actions),
            NEXT_OBSERVATION: torch.from_numpy(following),
            REWARD: torch.from_numpy(steps.rewards).unsqueeze(-1),
            DONE: torch.from_numpy(done).unsqueeze(-1),
            TERMINATED: torch.from_numpy(terminated).unsqueeze(-1),
            TRUNCATED: torch.from_numpy(truncated).unsqueeze(-1),
        },
        torch.from_numpy(np.cumsum(done, dtype=np.int64) - done),
    )


def check_actions(
    actions: Floats, low: float | NDArray[Any], high: float | NDArray[Any], source: str
) -> None:
    """Check that actions are in ``[low, high]``, up to rounding; the error names a row outside."""
    least, most = low - ACTION_TOLERANCE, high + ACTION_TOLERANCE
    row = first_row(actions, lambda chunk: (chunk < least) | (chunk > most))
    if row is not None:
        column = int(np.argmax((actions[row] < least) | (actions[row] > most)))
        sides = (np.broadcast_to(side, actions.shape[1:])[column] for side in (low, high))
        at = f"at row {row}, column {column} ({actions[row, column]:g})"
        bounds = " to ".join(f"{side:g}" for side in sides)
        raise ValueError(f"{source}: 'actions' is out of range {at}; clip or scale it to {bounds}")


def first_row(values: Floats, bad: Callable[[Floats], Flags]) -> int | None:
    """Return the first row of which ``bad`` marks a number, without masks of all rows."""
    for start in range(0, len(values), CHUNK):
        flags = bad(values[start : start + CHUNK])
        rows = np.flatnonzero(flags.reshape(len(flags), -1).any(axis=1))
        if len(rows):
            return start + int(rows[0])
    return None


def shift_observations(observations: Floats, done: Flags) -> Floats:
    """Return the observation of each row's next row; where done, and at the end, the row's own."""
    following = np.empty_like(observations)
    following[:-1] = observations[1:]
    following[-1] = observations[-1]
    following[done] = observations[done]
    return following
