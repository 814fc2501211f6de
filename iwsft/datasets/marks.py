"""Fields beside ``terminals`` and ``timeouts`` that tell where episodes end, by their names."""

from __future__ import annotations

import re

import numpy as np
from numpy.typing import NDArray

from iwsft.datasets.episodes import Flags

# Names in their plain form, see :func:`kind_of`, by what the field holds.
_KINDS = {
    # Flags at a step at which the environment ended the episode.
    "terminal": "terminal terminated terminateds termination dw",
    # Factors of the next state's value, which are 0 at such a step.
    "factor": "mask discount not_done nonterminal",
    # Flags at a step after which the episode was cut.
    "truncated": (
        "truncated truncateds truncation trunc timeout time_out timelimit time_limit "
        "timelimit_truncated time_limit_truncated bad_transition"
    ),
    # Flags at the last step of an episode, or at the first one.
    "last": (
        "done done_float end last final last_step final_step last_flag "
        "episode_terminal episode_done episode_end episode_last"
    ),
    "first": (
        "first init start begin initial first_step reset "
        "episode_start episode_start_index episode_first episode_begin"
    ),
    # A number that an episode's steps share.
    "id": "episode episode_id episode_index episode_num env_id env_index",
    # A number that counts the steps of an episode, and its time.
    "counter": (
        "t step step_id step_index step_num step_in_episode timestep timestep_index time_step "
        "elapsed_step frame_index episode_step steps_to_go"
    ),
    "time": "time timestamp",
    # The number of steps of each episode.
    "length": "length episode_length",
}
_KIND = {name: kind for kind, names in _KINDS.items() for name in names.split()}
_SYNONYMS = {
    **dict.fromkeys(("ep", "traj", "trajs", "trajectory", "trajectories", "path"), "episode"),
    **dict.fromkeys(("indices", "idx", "ids", "number"), "index"),
    **{"len": "length", "lens": "length", "dones": "done", "starts": "start", "ends": "end"},
}


def kind_of(name: str) -> str | None:
    """Return what a field may tell of the ends of episodes, by its name.

    Its plain form is in lower case, without ``is`` in front and the plural at the end.
    """
    words = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_").removeprefix("is_").split("_")
    words = [_SYNONYMS.get(word, word) for word in words]
    words[-1] = words[-1].removesuffix("s")
    words = [_SYNONYMS.get(word, word) for word in words]
    return _KIND.get("_".join(words))


def marked_ends(name: str, values: NDArray[np.number], rows: int, source: str) -> Flags | None:
    """Return the rows that end an episode by a field of a known kind, bool ``[rows]``.

    None means that the field has another meaning, as its shape or values show. A ValueError says
    that the rows of several episodes take turns.
    """
    kind = kind_of(name)
    if values.shape[1:] == (1,):
        values = values.reshape(-1)
    if values.shape != (rows,):
        return _at_positions(kind, values, rows)
    ends = np.zeros(rows, dtype=bool)
    if kind in ("counter", "time"):
        ends[:-1] = _restarts(values, even=kind == "counter")
    elif kind == "id":
        ends[:-1] = values[1:] != values[:-1]
        if ends.mean() > 0.5 and len(np.unique(values)) <= rows / 2:
            turns = "rows of several episodes take turns; write each episode's rows one after"
            raise ValueError(f"{source}: {name!r} changes at every other row: {turns} the other")
    elif kind == "factor" and values.min() >= 0 and values.max() <= 1:
        ends = values == 0
        if not ends.any():
            return None  # rows that are no padding, or every one a step inside an episode
    elif not ((values == 0) | (values == 1)).all():
        return None
    elif kind == "first":
        ends[:-1] = values[1:] != 0
        return ends
    else:
        return values != 0 if kind in ("last", "terminal", "truncated") else None
    return ends if ends.mean() <= 0.5 else None  # more are numbers of rows, or unused


def _at_positions(kind: str | None, values: NDArray[np.number], rows: int) -> Flags | None:
    """Read lengths of episodes, the rows after their last ones, or their first rows."""
    if values.ndim != 1 or not len(values) or not (values == values.round()).all():
        return None
    if kind == "length":
        stops = np.cumsum(values)
    elif kind == "last":
        stops = values
    elif kind == "first" and values[0] == 0:
        stops = np.append(values[1:], rows)
    else:
        return None
    if stops[-1] != rows or np.diff(stops, prepend=0).min() <= 0:
        return None
    ends = np.zeros(rows, dtype=bool)
    ends[stops.astype(np.int64) - 1] = True
    return ends


def _restarts(counts: NDArray[np.number], *, even: bool) -> Flags:
    """Return after which rows a counter falls, or is not ``even``, bool ``[rows - 1]``."""
    change = np.diff(counts.astype(np.float64))
    usual = np.median(change) if len(change) else 0.0
    if usual == 0:
        return np.ones(len(change), dtype=bool)  # it does not count rows
    falls = change * usual <= 0
    if not even or (counts.dtype.kind == "f" and not (counts == counts.round()).all()):
        return falls  # steps of times differ
    return falls | (change != usual)
