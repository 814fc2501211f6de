"""Fields beside ``terminals`` and ``timeouts`` that tell where episodes end, by their names."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from iwsft.datasets.episodes import Flags

# Names of flags at a step at which the environment ended the episode.
TERMINAL = {"terminations", "terminateds", "terminated", "is_terminal"}
# Names of factors of the next state's value, which are 0 at such a step.
FACTORS = {"masks", "discounts"}
# Names of flags at a step after which the episode was cut.
TRUNCATED = {"truncations", "truncateds", "truncated", "TimeLimit.truncated", "timeout"}
TRUNCATED |= {"time_limits"}
# Names of flags that libraries set at the last step of an episode, or at the first one.
LAST = {"dones", "done", "ends", "last", "is_last", "dones_float", "episode_terminals"}
LAST |= {"episode_dones", "episode_ends"}
FIRST = {"first", "is_first", "is_init", "starts", "episode_starts", "initials"}
# Names of a number that an episode's steps share.
IDS = {"episode", "episodes", "episode_id", "episode_ids", "episode_index", "trajectories"}
IDS |= {"traj_id", "traj_ids", "trajectory_id", "trajectory_ids", "episode_num", "episode_number"}
IDS |= {"env_ids", "env_index", "env_indices"}
# Names of a number that counts the steps of an episode.
COUNTERS = {"step", "steps", "step_index", "timestep", "timesteps", "elapsed_steps", "frame_index"}
COUNTERS |= {"t", "time_step", "time_steps", "step_id", "step_ids", "episode_step"}
# Names of the number of steps of each episode.
LENGTHS = {"lengths", "episode_lengths", "traj_lengths", "trajectory_lengths"}
NAMES = TERMINAL | FACTORS | TRUNCATED | LAST | FIRST | IDS | COUNTERS | LENGTHS


def marked_ends(name: str, values: NDArray[np.number], rows: int, source: str) -> Flags | None:
    """Return the rows that end an episode by a field of ``NAMES``, bool ``[rows]``.

    None means that the field has another meaning, as its shape or values show.

    Raises:
        ValueError: The rows of several episodes take turns.
    """
    if values.shape[1:] == (1,):
        values = values.reshape(-1)
    if values.shape != (rows,):
        return _at_positions(name, values, rows)
    ends = np.zeros(rows, dtype=bool)
    if name in COUNTERS:
        ends[:-1] = _restarts(values)
    elif name in IDS:
        ends[:-1] = values[1:] != values[:-1]
        if ends.mean() > 0.5 and len(np.unique(values)) <= rows / 2:
            turns = "rows of several episodes take turns; write each episode's rows one after"
            raise ValueError(f"{source}: {name!r} changes at every other row: {turns} the other")
    elif name in FACTORS and values.min() >= 0 and values.max() <= 1:
        ends = values == 0
    elif not ((values == 0) | (values == 1)).all():
        return None
    elif name in FIRST:
        ends[:-1] = values[1:] != 0
        return ends
    else:
        return values != 0 if name in LAST | TERMINAL | TRUNCATED else None
    return ends if ends.mean() <= 0.5 else None  # more are numbers of rows, or unused


def _at_positions(name: str, values: NDArray[np.number], rows: int) -> Flags | None:
    """Read lengths of episodes, the rows after their last ones, or their first rows."""
    if values.ndim != 1 or not len(values) or not (values == values.round()).all():
        return None
    if name in LENGTHS:
        stops = np.cumsum(values)
    elif name == "episode_ends":
        stops = values
    elif name in FIRST and values[0] == 0:
        stops = np.append(values[1:], rows)
    else:
        return None
    if stops[-1] != rows or np.diff(stops, prepend=0).min() <= 0:
        return None
    ends = np.zeros(rows, dtype=bool)
    ends[stops.astype(np.int64) - 1] = True
    return ends


def _restarts(counts: NDArray[np.number]) -> Flags:
    """Return after which rows a counter does not take its usual step, bool ``[rows - 1]``."""
    change = np.diff(counts.astype(np.float64))
    usual = np.median(change) if len(change) else 0.0
    if usual == 0:
        return np.ones(len(change), dtype=bool)  # it does not count rows
    falls = change * usual <= 0
    if counts.dtype.kind == "f" and not (counts == counts.round()).all():
        return falls  # seconds, whose steps differ
    return falls | (change != usual)
