"""Where episodes end: what a recording shows beyond its ``terminals`` and ``timeouts``.

Files often lack ``timeouts``, or keep the ends under another name. Episodes that are read as one
would have returns that no policy can reach, and curation would prefer them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from iwsft.datasets.episodes import CHUNK, Flags, Floats, Steps

# Names of flags that libraries set at the last step of an episode, or at the first one.
LAST = {"dones", "done", "ends", "last", "is_last", "is_terminal", "timeout", "time_limits"}
LAST |= {"truncations", "truncateds", "truncated", "TimeLimit.truncated", "episode_terminals"}
LAST |= {"terminations", "terminateds", "terminated", "episode_dones", "episode_ends"}
LAST |= {"dones_float"}
FIRST = {"first", "is_first", "is_init", "starts", "episode_starts", "initials"}
# Names of a number that an episode's steps share.
IDS = {"episode", "episodes", "episode_id", "episode_ids", "episode_index", "trajectories"}
IDS |= {"traj_id", "traj_ids", "trajectory_id", "trajectory_ids"}
# Names of a number that counts the steps of an episode.
COUNTERS = {"step", "steps", "step_index", "timestep", "timesteps", "elapsed_steps", "frame_index"}
# Names of the number of steps of each episode.
LENGTHS = {"lengths", "episode_lengths", "traj_lengths", "trajectory_lengths"}
NAMES = LAST | FIRST | IDS | COUNTERS | LENGTHS


def marked_ends(name: str, values: NDArray[Any], rows: int) -> Flags | None:
    """Return the rows that end an episode by a field of ``NAMES``, bool ``[rows]``.

    None means that the field has another meaning, as its shape or values show.
    """
    ends = np.zeros(rows, dtype=bool)
    if values.shape[1:] == (1,):
        values = values.reshape(-1)
    if values.shape != (rows,):
        # Lengths, or the positions after the last step of each episode.
        stops = np.cumsum(values) if name in LENGTHS else values
        whole = name in LENGTHS or name == "episode_ends"
        if whole and values.ndim == 1 and len(stops) and stops[-1] == rows and stops.min() > 0:
            ends[stops.astype(np.int64) - 1] = True
            return ends
        return None
    if name in COUNTERS:
        ends[:-1] = values[1:] != values[:-1] + 1
        restarts = values[1:][ends[:-1]] == values[0]
        return ends if restarts.all() and ends.mean() <= 0.5 else None
    if name in IDS:
        ends[:-1] = values[1:] != values[:-1]
        return ends if ends.mean() <= 0.5 else None  # a number of its own for each row
    if ((values != 0) & (values != 1)).any():
        return None
    if name in FIRST:
        ends[:-1] = values[1:] != 0
        return ends
    return values != 0 if name in LAST else None


def find_ends(
    steps: Steps,
    marks: Mapping[str, Flags],
    limit: Callable[[], int | None],
    source: str,
) -> tuple[Steps, list[str]]:
    """End episodes where the data show it, and drop the rows of a vector environment's resets.

    Args:
        steps: Checked steps.
        marks: Further flags of last steps by the name of their field, bool ``[N]`` each.
        limit: Function that returns the environment's limit of steps, where known.
        source: Name of the data in errors.

    Returns:
        The steps, and a note on each change.

    Raises:
        ValueError: The rows are not in the order of recording.
    """
    notes = []
    timeouts = steps.timeouts.copy()

    def end(at: Flags, where: str) -> None:
        new = at & ~(steps.terminals | timeouts)
        new[-1] = False  # the last row ends an episode anyway
        if new.any():
            timeouts[new] = True
            notes.append(f"{int(new.sum()):,} episodes end {where}, without a timeout")

    for name, flags in marks.items():
        end(flags, f"where {name!r} says so")
    steps = replace(steps, timeouts=timeouts)
    resets = _reset_rows(steps)
    if resets.any():
        notes.append(
            f"{int(resets.sum()):,} rows left out: steps in which a vector environment was reset"
        )
        steps = _select(steps, ~resets)
        timeouts = steps.timeouts
    if steps.next_observations is not None:
        torn = _torn(steps, source)
        end(torn, "where the next observation is not that of the next row")
    end(_beyond(steps.terminals, timeouts, limit), "at the environment's limit of steps")
    if len(timeouts) > 1 and not (steps.terminals | timeouts).any():
        notes.append(f"no end of an episode is marked: {len(timeouts):,} rows are one trajectory")
    return steps, notes


def _select(steps: Steps, rows: Flags) -> Steps:
    arrays = ((field.name, getattr(steps, field.name)) for field in fields(steps))
    selected: dict[str, Any] = {name: x if x is None else x[rows] for name, x in arrays}
    return Steps(**selected)


def _differ(first: Floats, second: Floats) -> Flags:
    """Return the rows of two arrays that differ by more than rounding."""
    differ = np.empty(len(first), dtype=bool)
    for start in range(0, len(first), CHUNK):
        a, b = first[start : start + CHUNK], second[start : start + CHUNK]
        differ[start : start + CHUNK] = (np.abs(a - b) > 1e-6 + 1e-4 * np.abs(b)).any(axis=1)
    return differ


def _spread(observations: Floats) -> Floats:
    """Return the standard deviation of each column, of an even subset of the rows."""
    return np.asarray(observations[:: 1 + len(observations) // CHUNK].std(axis=0) + 1e-9)


def _torn(steps: Steps, source: str) -> Flags:
    """Return the rows inside an episode whose next observation is not that of the next row."""
    torn = np.zeros(len(steps.rewards), dtype=bool)
    assert steps.next_observations is not None
    following, then = steps.next_observations[:-1], steps.observations[1:]
    inside = ~(steps.terminals | steps.timeouts)[:-1]
    torn[:-1] = _differ(following, then) & inside
    if torn.sum() > max(1, inside.sum() / 2):
        # Noise of a sensor is small compared with the spread of the observations.
        apart = np.abs(following - then)[torn[:-1]] / _spread(steps.observations)
        far = apart.max(axis=1) > 0.5
        if far.mean() > 0.5:
            raise ValueError(
                f"{source}: 'next_observations' of {int(torn.sum()):,} of {int(inside.sum()):,} "
                "steps is not the next row's observation; put the rows in the order of recording"
            )
        torn[np.flatnonzero(torn)] = far
    return torn


def _reset_rows(steps: Steps) -> Flags:
    """Return the rows in which gymnasium's vector environments reset themselves.

    In the step after an end, such an environment ignores the action and returns the reset's
    observation with reward 0. The row's own observation is still the last one of the old episode.
    """
    now = steps.observations
    rows, ends = len(now), steps.terminals | steps.timeouts
    after = np.flatnonzero(ends[:-1]) + 1
    resets = np.zeros(rows, dtype=bool)
    known = after[after + 1 < rows]  # rows whose next row tells where the reset led
    if len(known) == 0 or steps.rewards[after].any() or ends[after].any():
        return resets
    following = steps.next_observations
    if following is not None and _differ(now[after], following[after - 1]).any():
        return resets
    spread = _spread(now)

    def jump(row: NDArray[np.int64]) -> float:
        return float(np.median((np.abs(now[row] - now[row - 1]) / spread).max(axis=1)))

    others = np.delete(steps.rewards, after)
    # In data with many rewards of 0, these rows are told by the jump alone.
    factor = 1.0 if (others == 0).mean() < 0.01 else 1.5
    resets[after] = jump(known + 1) > factor * jump(known)
    return resets


def _beyond(terminals: Flags, timeouts: Flags, limit: Callable[[], int | None]) -> Flags:
    """Return the rows at which an episode reaches the limit, though nothing ends it there.

    Episodes that a timeout ends show the limit of the recording, where it is longer.
    """
    cut = np.zeros(len(terminals), dtype=bool)
    done = terminals | timeouts
    stops = np.flatnonzero(done) + 1
    if not done[-1]:
        stops = np.append(stops, len(done))
    sizes = np.diff(stops, prepend=0)
    timed = timeouts[stops - 1] & ~terminals[stops - 1]
    longest = int(sizes[timed].max(initial=0))
    if sizes.max() <= longest:
        return cut
    most = limit()
    if most is None or sizes.max() <= max(most, longest):
        return cut
    most = max(most, longest)
    for stop, size in zip(stops[sizes > most], sizes[sizes > most], strict=True):
        cut[stop - size + most - 1 : stop - 1 : most] = True
    return cut
