"""The trajectories of AntMaze files.

D4RL recorded an ant that walks from goal to goal, and computed ``rewards`` and ``terminals``
afterwards: both are 1 at every step within 0.5 of one fixed goal, where the ant does not stop. Read
like other files, each step of a stay at the goal would be a trajectory of return 1, and curation by
return would prefer these to all real trajectories. Episodes of an evaluation end at the goal, so
the trajectories end there too.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from iwsft.datasets.episodes import Flags, Steps, shift_observations

COLUMNS = 29  # x, y, z, orientation [4], joint angles [8], velocities [14]
# A walking ant moves less than 0.5 in one action.
_JUMP = 1.0
# D4RL's resets leave each joint within 0.1 of 0; those of an ant on the ground exceed 0.5.
_RESET_ANGLE = 0.11


def until_goal(steps: Steps) -> tuple[Steps, list[str]]:
    """End each trajectory at its first goal step, and leave out the stay that follows.

    The ant was reset after row i if ``next_observations[i]`` is not the observation of row i + 1.
    Without that field (D4RL's files), it was reset if x and y jump by more than 1 or if row i + 1
    has the joints of a reset. An episode ends at resets and at timeouts, a stay only at resets, as
    the timeouts of the v0 files do not always match them. Notes on the changes are returned, too.
    """
    reset = np.append(_reset_after(steps), True)
    ends = steps.timeouts | reset
    goal = steps.terminals
    before: NDArray[np.int64] = np.cumsum(goal) - goal  # goal steps before each row
    starts = np.flatnonzero(np.append(True, reset[:-1]))
    stretch = np.cumsum(reset) - reset
    used: Flags = before == before[starts][stretch]
    following = steps.next_observations
    if following is None:
        following = shift_observations(steps.observations, ends)

    notes: list[str] = []
    left_out = int((~used).sum())
    if left_out:
        notes.append(
            f"{left_out:,} of {len(used):,} rows left out: the stay after the first goal step of "
            f"{int((goal & used).sum()):,} episodes that reach it"
        )
    unmarked = int((reset & ~steps.timeouts & ~goal & used)[:-1].sum())
    if unmarked:
        notes.append(f"{unmarked:,} episodes end where the ant was put back without a timeout")
    steps = replace(steps, timeouts=ends, next_observations=following)
    return steps.select(used) if left_out else steps, notes


def _reset_after(steps: Steps) -> Flags:
    """Return whether the ant was reset between row i and row i + 1, bool ``[N - 1]``."""
    now, then = steps.observations[:-1], steps.observations[1:]
    if steps.next_observations is not None:
        return np.asarray((steps.next_observations[:-1] != then).any(axis=1))
    jump = np.linalg.norm(then[:, :2] - now[:, :2], axis=1) > _JUMP
    return np.asarray(jump | (np.abs(then[:, 7:15]) < _RESET_ANGLE).all(axis=1))
