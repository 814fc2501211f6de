"""Where episodes end: what a recording shows beyond its ``terminals`` and ``timeouts``.

Files often lack ``timeouts``, keep the ends under another name, or mark another row. Episodes that
are read as one would have returns that no policy can reach, and curation would prefer them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from iwsft.datasets.dynamics import Dynamics, column_spread, distance
from iwsft.datasets.episodes import CHUNK, Flags, Floats, Steps
from iwsft.datasets.marks import kind_of

Limit = Callable[[], int | None]


def find_ends(
    steps: Steps, marks: Mapping[str, Flags], limit: Limit, source: str
) -> tuple[Steps, list[str]]:
    """End episodes where the data show it, and drop the rows of a vector environment's resets.

    ``marks`` are further flags of last steps by the name of their field, bool ``[N]`` each;
    ``limit`` returns the environment's limit of steps, where known. The steps are returned with a
    note on each change. A ValueError names ``source``, and rows that are not in the order of
    recording, or fields that contradict each other.
    """
    steps, notes = _join_marks(steps, marks, source)
    _check_filling(steps, source)
    resets = _reset_rows(steps)
    if resets.any():
        reason = "steps in which a vector environment was reset"
        notes.append(f"{int(resets.sum()):,} rows left out: {reason}")
        steps = steps.select(~resets)
    _check_order(steps, source, notes)
    _check_places(steps, source)
    if steps.next_observations is None:
        where = "where the next row is like the first one of an episode"
        steps = _end(steps, _restarts(steps, notes), where, notes)
    else:
        where = "where the next observation is not that of the next row"
        steps = _end(steps, _torn(steps, source), where, notes)
    cuts = _beyond(steps, limit)
    if cuts.any() and steps.next_observations is None:
        _check_cuts(steps, cuts, source)
    steps = _end(steps, cuts, "at the environment's limit of steps", notes)
    steps = _mend_following(steps, notes)
    rows, ends = len(steps.rewards), steps.ends
    if rows > 1 and not ends.any():
        notes.append(f"no end of an episode is marked: {rows:,} rows are one trajectory")
    elif rows > 1 and ends.all():
        notes.append(f"each of {rows:,} rows ends an episode: all have one step, as in a bandit")
    elif rows / 2 < ends.sum() < rows:
        notes.append(f"{int(ends.sum()):,} of {rows:,} rows end an episode: are flags inverted?")
    elif ends[0] and not ends[-1] and ends.sum() > 2 and not (ends[1:] & ends[:-1]).any():
        notes.append("the first row ends an episode, the last does not: do flags mark first rows?")
    return steps, notes


def move_time_limits(steps: Steps, limit: Limit) -> tuple[Steps, list[str]]:
    """Read terminals that a limit of steps has set as timeouts; return a note on the change, too.

    The flag ``done`` of gym before 0.26 is such a terminal. A policy's value after it is not 0.
    """
    terminals, timeouts = steps.terminals, steps.timeouts
    if not terminals.any():
        return steps, []
    if timeouts.any():
        moved = terminals & timeouts & terminals[timeouts].all()
        reason = "as each timeout is a terminal, too"
    else:
        stops = np.flatnonzero(terminals)
        sizes = np.diff(stops, prepend=-1)
        most = limit()
        moved = np.zeros_like(terminals)
        if most is not None and sizes.max() == most:
            moved[stops[sizes == most]] = True
        reason = f"as they are the environment's last ones, of {most}"
    if not moved.any():
        return steps, []
    note = f"{int(moved.sum()):,} terminals are read as timeouts, {reason}"
    return replace(steps, terminals=terminals & ~moved, timeouts=timeouts | moved), [note]


def _join_marks(steps: Steps, marks: Mapping[str, Flags], source: str) -> tuple[Steps, list[str]]:
    """Add the ends of other fields; those of the environment itself are terminals."""
    notes: list[str] = []
    terminal = {name for name in marks if kind_of(name) in ("terminal", "factor")}
    truncated = [flags for name, flags in marks.items() if kind_of(name) == "truncated"]
    cut = np.logical_or.reduce([steps.timeouts, *truncated])
    for name in sorted(marks, key=lambda name: (name not in terminal, name)):
        flags = marks[name]
        kind = "terminal" if name in terminal else "timeout"
        if kind == "terminal":
            differ = np.flatnonzero(steps.terminals & ~flags & ~cut)
            if len(differ):
                both = f"'terminals' and {name!r} differ at row {int(differ[0])}"
                raise ValueError(f"{source}: {both}; leave out the one that is wrong")
            padded = np.flatnonzero((flags & ~steps.ends)[:-1] & flags[1:])
            if len(padded):
                row = f"{name!r} ends an episode at row {int(padded[0])} and at the next one"
                raise ValueError(f"{source}: {row}; leave out rows that are padding")
        steps = _end(steps, flags, f"where {name!r} says so", notes, kind=kind)
    return replace(steps, timeouts=steps.timeouts | cut), notes


def _end(steps: Steps, at: Flags, where: str, notes: list[str], *, kind: str = "timeout") -> Steps:
    """End episodes at these rows, and note it."""
    new = at & ~steps.ends
    if kind == "timeout":
        new[-1] = False  # the last row ends an episode anyway
    if not new.any():
        return steps
    notes.append(f"{int(new.sum()):,} episodes end {where}, without a {kind}")
    if kind == "timeout":
        return replace(steps, timeouts=steps.timeouts | new)
    return replace(steps, terminals=steps.terminals | new)


def _differ(first: Floats, second: Floats) -> Flags:
    """Return the rows of two arrays that differ by more than rounding."""
    differ = np.empty(len(first), dtype=bool)
    for start in range(0, len(first), CHUNK):
        a, b = first[start : start + CHUNK], second[start : start + CHUNK]
        differ[start : start + CHUNK] = (np.abs(a - b) > 1e-6 + 1e-4 * np.abs(b)).any(axis=1)
    return differ


def _check_filling(steps: Steps, source: str) -> None:
    """Check that no rows fill episodes up: those of padding, or of a last observation alone."""
    ends, still = steps.ends, ~steps.actions.any(axis=1) & (steps.rewards == 0)
    empty = still & ~steps.observations.any(axis=1)
    padding = np.flatnonzero(ends[:-2] & empty[1:-1] & empty[2:] & ~ends[1:-1])
    if len(padding):
        row = f"row {int(padding[0]) + 1} and the next one are 0 after the end of an episode"
        raise ValueError(f"{source}: {row}; leave out rows that are padding")
    if ends.sum() > 1 and still[ends].all() and still[~ends].mean() < 0.05:
        problem = "action and reward are 0 at each last row, as if it had an observation only"
        raise ValueError(f"{source}: {problem}; leave out these rows, mark the ones before as last")


def _torn(steps: Steps, source: str) -> Flags:
    """Return the rows inside an episode whose next observation is not that of the next row."""
    torn = np.zeros(len(steps.rewards), dtype=bool)
    assert steps.next_observations is not None
    following, then = steps.next_observations[:-1], steps.observations[1:]
    own = steps.observations[:-1]
    inside = ~steps.ends[:-1]
    if not _differ(following, own).any() and _differ(own, then).sum() > len(own) / 10:
        problem = "'next_observations' are the row's own observations"
        raise ValueError(f"{source}: {problem}; leave them out, or write the next ones")
    apart = _differ(following, then)
    torn[:-1] = apart & inside
    if torn.sum() > max(1, inside.sum() / 2):
        if (apart & ~inside).sum() < (~inside).sum() / 10 and inside.mean() < 0.5:
            name = "terminals" if steps.terminals.mean() > 0.5 else "timeouts"
            problem = f"{name!r} marks the rows that the next row follows, and not the last ones"
            raise ValueError(f"{source}: {problem} of episodes; invert it")
        if (_differ(own, steps.next_observations[1:]) & inside).sum() < inside.sum() / 10:
            problem = "'observations' are the 'next_observations' of the next rows"
            way_out = "swap the two fields, or write the rows in the order of recording"
            raise ValueError(f"{source}: {problem}; {way_out}")
        # Noise of a sensor is small compared with the spread of the observations.
        gaps = np.abs(following - then)[torn[:-1]] / column_spread(steps.observations)
        far = gaps.max(axis=1) > 0.5
        if far.mean() > 0.5:
            many = f"'next_observations' of {int(torn.sum()):,} of {int(inside.sum()):,} steps"
            problem = f"{many} is not the next row's observation"
            raise ValueError(f"{source}: {problem}; put the rows in the order of recording")
        torn[np.flatnonzero(torn)] = far
    return torn


def _restarts(steps: Steps, notes: list[str]) -> Flags:
    """Return the rows before which no end is marked, though a first observation follows.

    That observation lies among the known first ones in every column, and it surprises as these do.
    Where too many steps may look so, no row is returned, and a note tells of it.
    """
    now, ends = steps.observations, steps.ends
    restarts, first = np.zeros_like(ends), np.append(True, ends[:-1])
    if first.sum() < 4:
        return restarts
    starts = now[first]
    margin = starts.max(axis=0) - starts.min(axis=0) + 0.01 * column_spread(now)
    within = (now >= starts.min(axis=0) - margin) & (now <= starts.max(axis=0) + margin)
    near = np.append(within.all(axis=1)[1:], False)
    # Resets among the fitted rows would look usual.
    dynamics = Dynamics(steps, apart=near)
    if dynamics.unexplained == np.inf:
        dynamics = Dynamics(steps)
    known = np.flatnonzero(first[1:])
    if not dynamics.predictable or dynamics.as_usual(known):
        return restarts
    least = 0.7 * float(dynamics.surprise(known).min())
    likely = np.flatnonzero(near & ~ends)
    surprise = dynamics.surprise(likely)
    found = likely[surprise > least]
    # No reset follows elsewhere, nor after a first step.
    certain = np.flatnonzero((~near | first)[:-1] & ~ends[:-1])
    share = ((dynamics.surprise(certain) > least).sum() + 1) / (len(certain) + 2)
    # So many of those found may be steps; and so many lie below the bound, where resets are rare.
    steps_found = share / (1 - share) * (len(likely) - len(found))
    below = int((surprise > 0.7 * least).sum()) - len(found)
    most = max(1, 0.05 * len(found))
    if steps_found <= most or (share <= 0.03 and below <= most):
        restarts[found] = True
    elif len(found) > 3 * min(steps_found, below) + 3:
        problem = f"{len(found):,} rows may be first ones of episodes without an end before them"
        notes.append(f"{problem}, and steps look alike: mark the ends in 'timeouts'")
    return restarts


def _check_order(steps: Steps, source: str, notes: list[str]) -> None:
    """Check that the next row is the next step, and not that of another environment."""
    now = steps.observations[:8192]
    if steps.next_observations is not None or steps.ends.mean() > 0.5:
        return
    following = Dynamics(steps).unexplained
    if not 0.1 < following < np.inf:
        return
    centred = (now - now.mean(axis=0)) / (now.std(axis=0) + 1e-6)
    power = np.abs(np.fft.rfft(centred, 2 * len(now), axis=0)) ** 2
    alike = np.fft.irfft(power, axis=0)[: len(now) // 4].mean(axis=1)
    likely = np.argsort(alike[2:])[:-5:-1] + 2
    for lag in sorted({*range(2, 17), *likely.tolist()}):
        if Dynamics(steps, lag).unexplained < 0.3 * following:
            turns = f"rows of {lag} environments take turns, row i + {lag} follows row i"
            raise ValueError(f"{source}: {turns}; write each one's rows one after the other")
    if following > 0.9:
        notes.append("no observation depends on that of the row before, as if rows were shuffled")


def _check_places(steps: Steps, source: str) -> None:
    """Check that the flags are at the last rows of episodes, not one row before or after."""
    ended = steps.ends
    dynamics = Dynamics(steps) if steps.next_observations is None else None
    for name in ("terminals", "timeouts"):
        ends = np.flatnonzero(getattr(steps, name)[1:-2]) + 1
        if dynamics is not None:
            wrong = ends
            if not any(dynamics.end_after(ends, shift) for shift in (-1, 1)):
                continue
        else:
            assert steps.next_observations is not None
            broken = _differ(steps.next_observations[:-1], steps.observations[1:])
            wrong = ends[~broken[ends]]  # the flag says that the episode ends, but it continues
            unmarked = broken & ~ended[:-1]
            near = unmarked[wrong - 1] | unmarked[wrong + 1]
            many = len(wrong) > len(ends) / 2 and unmarked.sum() >= len(wrong) / 2
            if not many and near.sum() <= len(near) / 2:
                continue
        if len(wrong):
            row = f"{name!r} marks row {int(wrong[0])}, which is not the last one of its episode"
            raise ValueError(f"{source}: {row}, as the observations show; mark the last rows")


def _reset_rows(steps: Steps) -> Flags:
    """Return the rows in which gymnasium's vector environments reset themselves.

    In the step after an end, such an environment ignores the action and returns the reset's
    observation with reward 0. The row's own observation is still the last one of the old episode.
    So the reset follows this row, and not the one before.
    """
    now, rewards = steps.observations, steps.rewards
    ends = np.flatnonzero(steps.ends[:-2])
    resets = np.zeros(len(now), dtype=bool)
    likely = ends[(rewards[ends + 1] == 0) & ~steps.ends[ends + 1]]
    if steps.next_observations is not None:
        linked = ends[~_differ(now[ends + 1], steps.next_observations[ends])]
        if len(linked) > len(np.intersect1d(likely, linked)):
            return resets
        likely = linked
    elif len(likely) < max(2, len(ends) / 2):
        return resets
    if len(likely) == 0:
        return resets
    zeros = np.delete(rewards, likely + 1) == 0
    seldom = ((zeros.sum() + 1) / (len(zeros) + 2)) ** len(likely) < 1e-6
    # Where rewards of 0 are seldom, less evidence will do: a jump to where the first row is.
    jumps = [np.median(distance(now[row], now[row + 1])) for row in (likely, likely + 1)]
    apart = (np.abs(now[likely + k] - now[0]) / column_spread(now) for k in (1, 2))
    before, after = (np.median(each.max(axis=1)) for each in apart)
    jumped = jumps[1] > jumps[0] and after < before
    if (seldom and jumped) or Dynamics(steps).end_after(likely, 1, sure=seldom):
        resets[likely + 1] = True
        if not steps.ends[-1] and steps.ends[-2]:
            resets[-1] = rewards[-1] == 0
    return resets


def _beyond(steps: Steps, limit: Limit) -> Flags:
    """Return the rows at which an episode reaches the limit, though nothing ends it there.

    Episodes that a timeout ends show the limit of the recording, where it is longer.
    """
    cut = np.zeros(len(steps.terminals), dtype=bool)
    done = steps.ends
    stops = np.flatnonzero(done) + 1
    if not done[-1]:
        stops = np.append(stops, len(done))
    sizes = np.diff(stops, prepend=0)
    timed = steps.timeouts[stops - 1] & ~steps.terminals[stops - 1]
    longest = int(sizes[timed].max(initial=0))
    most = limit() if sizes.max() > longest else None
    if most is not None:
        most = max(most, longest)
        for stop, size in zip(stops[sizes > most], sizes[sizes > most], strict=True):
            cut[stop - size + most - 1 : stop - 1 : most] = True
    return cut


def _check_cuts(steps: Steps, cuts: Flags, source: str) -> None:
    """Check that the observations show resets where the limit cuts."""
    dynamics, rows = Dynamics(steps), np.flatnonzero(cuts)
    if dynamics.predictable and dynamics.as_usual(rows):
        problem = "an episode is longer than the environment's limit, and does not end there"
        way_out = "mark the ends of episodes in 'timeouts'"
        raise ValueError(f"{source}: {problem} (row {int(rows[0])}); {way_out}")


def _mend_following(steps: Steps, notes: list[str]) -> Steps:
    """Replace next observations that are the first ones of the next episode.

    Vector environments that reset themselves in the step of an end return these.
    """
    following = steps.next_observations
    ends = np.flatnonzero(steps.ends[:-1])
    if following is None:
        return steps
    stale = ends[~_differ(following[ends], steps.observations[ends + 1])]
    if len(stale) < max(1, len(ends) / 2):
        return steps
    dynamics = Dynamics(steps)
    if not dynamics.predictable or dynamics.as_usual(stale):
        return steps  # the recording continued after these ends
    wrong = f"the next observations of {len(stale):,} last steps are the first ones of the next"
    notes.append(f"{wrong} episode: the step's own ones are taken")
    following = following.copy()
    following[stale] = steps.observations[stale]
    return replace(steps, next_observations=following)
