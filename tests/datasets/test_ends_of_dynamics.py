"""Ends of episodes that only the dynamics show: a linear system, whose episodes are known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iwsft import datasets
from iwsft.trajectory import NEXT_OBSERVATION, OBSERVATION, TERMINATED, lengths

Write = Callable[..., Path]
Fields = dict[str, Any]
SIZES = [30, 41, 30, 17, 30, 25, 30, 30]
ENDS = np.cumsum(SIZES) - 1
pytestmark = pytest.mark.filterwarnings("ignore:.*mine.hdf5")


def swing(*, size: int | None = None, seed: int = 0, count: int = 8, spread: float = 0.1) -> Fields:
    """Rows of a damped rotation that actions push, from near 0; every other end is a terminal."""
    rng = np.random.default_rng(seed)
    angle = 0.3
    turn = 0.97 * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    rows: Fields = {"observations": [], "next_observations": [], "actions": [], "rewards": []}
    sizes = [size] * count if size else SIZES
    for steps in sizes:
        state = np.append(rng.normal(0, 0.1, 2), 0)
        for _ in range(steps):
            action = rng.uniform(-1, 1, 1)
            then = np.append(turn @ state[:2] + [0, 0.6 * action[0] + 0.5], state[2] + 0.1)
            for name, value in zip(rows, (state, then, action, state[1] + 1), strict=True):
                rows[name].append(value)
            state = then
    fields = {name: np.array(values, np.float32) for name, values in rows.items()}
    ends = np.isin(np.arange(sum(sizes)), np.cumsum(sizes) - 1)
    terminals = ends & np.isin(np.arange(sum(sizes)), np.cumsum(sizes)[1:-1:2] - 1)
    return {**fields, "terminals": terminals, "timeouts": ends & ~terminals}


def without_following(fields: Fields) -> Fields:
    return {name: values for name, values in fields.items() if name != "next_observations"}


def test_the_system_itself_is_read_as_it_is(write: Write) -> None:
    for fields in (swing(), without_following(swing())):
        data = datasets.load(write(fields))
        assert lengths(data.trajectories).tolist() == SIZES
        assert data.notes == ()


@pytest.mark.parametrize("following", [True, False])
@pytest.mark.parametrize("shift", [-1, 1])
@pytest.mark.parametrize("names", [("timeouts",), ("terminals", "timeouts")])
def test_flags_one_row_off_are_refused(
    write: Write, shift: int, names: tuple[str, ...], following: bool
) -> None:
    fields = swing() if following else without_following(swing())
    for name in names:
        fields[name] = np.roll(fields[name], shift)
        fields[name][0] = False
    with pytest.raises(ValueError, match=f"'{names[0]}' marks row .* mark the last rows"):
        datasets.load(write(fields))


@pytest.mark.parametrize("following", [True, False])
@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("many", [2, 5])
def test_rows_of_environments_that_take_turns_are_refused(
    write: Write, many: int, marked: bool, following: bool
) -> None:
    columns = [swing(size=30, seed=seed) for seed in range(many)]
    fields = {name: np.stack([c[name] for c in columns], axis=1) for name in columns[0]}
    fields = {name: values.reshape(-1, *values.shape[2:]) for name, values in fields.items()}
    if not marked:
        fields["terminals"][:] = fields["timeouts"][:] = False
    match = "in the order of recording" if following else f"rows of {many} environments take turns"
    with pytest.raises(ValueError, match=match):
        datasets.load(write(fields if following else without_following(fields)))


def test_alternating_ids_are_refused_and_shuffled_rows_are_noted(write: Write) -> None:
    fields = without_following(swing())
    rows = len(fields["rewards"])
    with pytest.raises(ValueError, match="'episode_ids' changes at every other row"):
        datasets.load(write({**fields, "episode_ids": np.arange(rows) % 4}))
    order = np.random.default_rng(0).permutation(rows)
    data = datasets.load(write({name: values[order] for name, values in fields.items()}))
    assert "as if rows were shuffled" in data.notes[0]


@pytest.mark.parametrize("following", [True, False])
def test_files_put_one_after_the_other(write: Write, following: bool) -> None:
    """The last episode of each file has no flag."""
    fields = swing() if following else without_following(swing())
    fields["timeouts"][ENDS[[0, 2, 4]]] = False
    data = datasets.load(write(fields))
    assert lengths(data.trajectories).tolist() == SIZES
    assert data.notes[0].startswith("3 episodes end where the next")


@pytest.mark.parametrize("size", [5, 20])
@pytest.mark.parametrize("share", [0.3, 0.9])
def test_many_short_episodes_without_an_end(write: Write, size: int, share: float) -> None:
    """Resets are then among the steps by which a surprise is judged."""
    fields = without_following(swing(size=size, count=2000 // size))
    ends = fields["terminals"] | fields["timeouts"]
    kept = np.random.default_rng(0).uniform(size=len(ends)) > share
    fields |= {"terminals": ends & kept, "timeouts": np.zeros_like(ends)}
    data = datasets.load(write(fields))
    assert (np.unique(lengths(data.trajectories)) == size).all()
    assert data.notes[0].endswith(
        "the next row is like the first one of an episode, without a timeout"
    )


def test_steps_that_look_like_resets_end_no_episode(write: Write) -> None:
    """The state of a walk is drawn anew inside of episodes, too, as often as at their starts."""
    rng = np.random.default_rng(0)
    fields = without_following(swing(size=20, count=100))
    state = np.zeros(3)
    for row in range(2000):
        drawn = row % 20 == 0 or rng.uniform() < 0.05
        state = rng.normal(0, 1, 3) if drawn else 0.98 * state + 0.1 * fields["actions"][row]
        fields["observations"][row] = state
    data = datasets.load(write(fields))
    assert (lengths(data.trajectories) == 20).all()
    fields["timeouts"][:] = False
    data = datasets.load(write(fields))
    assert (lengths(data.trajectories) == 40).all()
    assert data.notes[-1].endswith("steps look alike: mark the ends in 'timeouts'")


def test_next_observations_of_a_reset_in_the_same_step(write: Write) -> None:
    fields = swing()
    right = fields["next_observations"].copy()
    fields["next_observations"][ENDS[:-1]] = fields["observations"][ENDS[:-1] + 1]
    data = datasets.load(write(fields))
    assert lengths(data.trajectories).tolist() == SIZES
    assert "the next observations of 7 last steps are the first ones" in data.notes[0]
    right[ENDS[:-1]] = fields["observations"][ENDS[:-1]]
    np.testing.assert_array_equal(data.trajectories[NEXT_OBSERVATION], right)


@pytest.mark.parametrize("following", [True, False])
def test_timeouts_of_a_recording_that_continues(write: Write, following: bool) -> None:
    """No reset follows these timeouts, so the next row's observation is the true next one."""
    fields = swing(size=240)
    rows = slice(0, 240)
    fields = {name: values[rows] for name, values in fields.items()}
    fields["timeouts"][:] = np.arange(240) % 40 == 39
    fields["rewards"][:] = 0
    data = datasets.load(write(fields if following else without_following(fields)))
    assert lengths(data.trajectories).tolist() == [40] * 6
    assert data.notes == ()
    if following:
        np.testing.assert_array_equal(
            data.trajectories[NEXT_OBSERVATION], fields["next_observations"]
        )


@pytest.mark.parametrize("share", [1, 2])
def test_rows_that_fill_episodes_up_are_refused(write: Write, share: int) -> None:
    fields = without_following(swing())
    padded: Fields = {name: [] for name in fields}
    for stop, size in zip(ENDS + 1, SIZES, strict=True):
        for name, values in fields.items():
            fill = np.zeros((45 - size, *values.shape[1:]), values.dtype)
            padded[name] += [values[stop - size : stop], fill]
    with pytest.raises(ValueError, match="leave out rows that are padding"):
        datasets.load(write({name: np.concatenate(parts) for name, parts in padded.items()}))
    rows = np.repeat(np.arange(len(fields["rewards"])), 1 + np.isin(np.arange(sum(SIZES)), ENDS))
    last = np.append(rows[1:] != rows[:-1], True) & np.append(False, rows[1:] == rows[:-1])
    ended = {name: values[rows] for name, values in fields.items()}
    for name in ("actions", "rewards"):
        ended[name] = np.where(last.reshape(-1, *[1] * (ended[name].ndim - 1)), 0, ended[name])
    for name in ("terminals", "timeouts"):
        ended[name] = ended[name] & last
    with pytest.raises(ValueError, match="as if it had an observation only"):
        datasets.load(write(ended))


@pytest.mark.parametrize(
    ("names", "values"),
    [
        (("masks",), lambda t, u: (1 - t,)),
        (("discounts",), lambda t, u: (0.99 * (1 - t),)),
        (("terminations", "truncations"), lambda t, u: (t, u)),
        (("is_terminal", "is_last"), lambda t, u: (t, t | u)),
    ],
)
def test_terminals_under_another_name(
    write: Write, names: tuple[str, ...], values: Callable[..., Any]
) -> None:
    fields = swing()
    terminals, timeouts = fields["terminals"], fields.pop("timeouts")
    more = dict(zip(names, values(terminals, timeouts), strict=True))
    data = datasets.load(write({**fields, **more, "terminals": terminals & False}))
    assert lengths(data.trajectories).tolist() == SIZES
    np.testing.assert_array_equal(data.trajectories[TERMINATED].squeeze(-1), terminals)
    wrong = terminals | (np.arange(len(terminals)) == 10)
    with pytest.raises(ValueError, match=f"'terminals' and '{names[0]}' differ at row 10"):
        datasets.load(write({**fields, **more, "terminals": wrong}))


@pytest.mark.parametrize("name", ["timeouts", "truncations", "TimeLimit.truncated", None])
def test_terminals_of_a_limit_are_timeouts(write: Write, name: str | None) -> None:
    """``done`` of gym before 0.26 is also set where its limit of steps cut an episode."""
    fields = swing()
    terminals, timeouts = fields["terminals"], fields.pop("timeouts")
    fields["terminals"] = terminals | timeouts
    if name is not None:
        path = write({**fields, name: timeouts})
        right = terminals
    else:
        # Pendulum has the same sizes of observation and action; here with a limit of 41 steps.
        path = write(fields, env_id="Pendulum-v1", env_kwargs='{"max_episode_steps": 41}')
        right = fields["terminals"] & (np.arange(sum(SIZES)) != ENDS[1])
    data = datasets.load(path, scale_actions=True)
    assert lengths(data.trajectories).tolist() == SIZES
    np.testing.assert_array_equal(data.trajectories[TERMINATED].squeeze(-1), right)
    assert "terminals are read as timeouts" in " ".join(data.notes)


def test_a_cut_at_the_limit_is_at_a_reset(write: Write) -> None:
    fields = without_following(swing(size=30))
    fields["terminals"][:] = fields["timeouts"][:] = False
    kwargs = {"env_id": "Pendulum-v1"}
    path = write(fields, **kwargs, env_kwargs='{"max_episode_steps": 30}')
    data = datasets.load(path, scale_actions=True)
    assert lengths(data.trajectories).tolist() == [30] * 8
    path = write(fields, **kwargs, env_kwargs='{"max_episode_steps": 50}')
    with pytest.raises(ValueError, match="does not end there .*mark the ends of episodes"):
        datasets.load(path, scale_actions=True)


@pytest.mark.parametrize("following", [True, False])
@pytest.mark.parametrize("sparse", [True, False])
def test_reset_rows_of_a_vector_environment(write: Write, sparse: bool, following: bool) -> None:
    fields = swing()
    if sparse:
        fields["rewards"][:] = 0
    rows = np.repeat(np.arange(sum(SIZES)), 1 + np.isin(np.arange(sum(SIZES)), ENDS[:-1]))
    reset = np.append(False, rows[1:] == rows[:-1])
    vector = {name: values[rows].copy() for name, values in fields.items()}
    vector["observations"][reset] = fields["next_observations"][ENDS[:-1]]
    vector["next_observations"][reset] = fields["observations"][ENDS[:-1] + 1]
    for name in ("rewards", "terminals", "timeouts"):
        vector[name][reset] = 0
    data = datasets.load(write(vector if following else without_following(vector)))
    assert "7 rows left out" in data.notes[0]
    np.testing.assert_array_equal(data.trajectories[OBSERVATION], fields["observations"])


@pytest.mark.parametrize("vector", [True, False])
def test_short_episodes_whose_last_step_alone_is_rewarded(write: Write, vector: bool) -> None:
    """All begin at 0. Rewards of 0 are seldom but for the first steps, which are no resets."""
    rng = np.random.default_rng(0)
    rows: list[tuple[Any, ...]] = []
    for size in [2, 3, 2] * 15:
        states = np.cumsum(rng.uniform(-0.1, 0.1, (size + 1, 3)), axis=0)
        states -= states[0]
        last = np.arange(size) == size - 1
        rows += zip(states[:-1], last, np.full(size, False), strict=True)
        if vector:
            rows.append((states[-1], False, True))
    observations, ends, resets = map(np.array, zip(*rows, strict=True))
    actions = rng.uniform(-1, 1, (len(rows), 3))
    fields = {"observations": observations, "actions": actions}
    data = datasets.load(write({**fields, "rewards": ends * 1.0, "terminals": ends}))
    expected = observations[~resets].astype(np.float32)
    np.testing.assert_array_equal(data.trajectories[OBSERVATION], expected)
