"""Ends of episodes that a file does not mark as ``timeouts``, and what must stay as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest

from iwsft import datasets
from iwsft.trajectory import NEXT_OBSERVATION, OBSERVATION, TERMINATED, lengths

Write = Callable[..., Path]
Fields = dict[str, Any]
SIZES = [6, 9, 4, 7]
ENDS = np.cumsum(SIZES) - 1


def walks(*, following: bool = True) -> Fields:
    """Random walks from 0; the second ends by a terminal, the others by a timeout."""
    rng = np.random.default_rng(3)
    now, then = [], []
    for size in SIZES:
        path = rng.normal(1.0, 0.2, size=(size + 1, 3)).cumsum(0).astype(np.float32)
        now.append(path[:-1])
        then.append(path[1:])
    rows = sum(SIZES)
    fields = {
        "observations": np.concatenate(now),
        "next_observations": np.concatenate(then),
        "actions": rng.uniform(-1, 1, (rows, 2)).astype(np.float32),
        "rewards": rng.normal(size=rows).astype(np.float32),
        "terminals": np.arange(rows) == ENDS[1],
        "timeouts": np.isin(np.arange(rows), ENDS[[0, 2, 3]]),
    }
    if not following:
        del fields["next_observations"]
    return fields


def flags(rows: Any) -> np.ndarray:
    return np.isin(np.arange(sum(SIZES)), rows)


IDS = np.repeat([7, 3, 3, 9], SIZES)
IDS[6 + 9 :] += 1


@pytest.mark.filterwarnings("ignore:.*episodes end where")
@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("truncations", flags(ENDS[[0, 2, 3]])),
        ("dones", flags(ENDS).astype(np.float32)),
        ("done", flags(ENDS)[:, None]),
        ("episode_terminals", flags(ENDS).astype(np.int64)),
        ("infos/TimeLimit.truncated", flags(ENDS)),
        ("infos/timeouts", flags(ENDS[[0, 2, 3]])),
        ("is_last", flags(ENDS)),
        ("is_first", flags([0, *(ENDS[:-1] + 1)])),
        ("episode_ids", np.repeat([4, 5, 6, 7], SIZES)),
        ("traj_ids", IDS),
        ("timesteps", np.concatenate([np.arange(1, size + 1) for size in SIZES])),
        ("dones_float", flags(ENDS).astype(np.float32)),
        ("episode_lengths", np.array(SIZES)),
        ("traj_lengths", np.array(SIZES)[:, None]),
        ("episode_ends", ENDS + 1),
        ("meta/episode_ends", ENDS + 1),
        ("truncs", flags(ENDS)),
        ("time_outs", flags(ENDS[[0, 2, 3]])),
        ("last_step", flags(ENDS)),
        ("ep_done", flags(ENDS)),
        ("Episode-Start", flags([0, *(ENDS[:-1] + 1)])),
        ("traj_idx", np.repeat([4, 5, 6, 7], SIZES)),
        ("step_num", np.concatenate([np.arange(size) for size in SIZES])),
        (
            "timestamp",
            np.concatenate([np.arange(size) * 33 + (np.arange(size) == 2) for size in SIZES]),
        ),
        ("traj_lens", np.array(SIZES)),
        ("resets", flags([0, *(ENDS[:-1] + 1)])),
        ("episode_start_idx", np.array([0, *(ENDS[:-1] + 1)])),
        ("steps_to_go", np.concatenate([np.arange(size)[::-1] for size in SIZES])),
    ],
)
def test_ends_under_another_name(write: Write, name: str, values: np.ndarray, zeros: bool) -> None:
    fields = walks(following=False)
    right = datasets.load(write(fields, "right.hdf5")).trajectories
    timeouts = fields.pop("timeouts")
    if zeros:
        fields["timeouts"] = np.zeros_like(timeouts)
    data = datasets.load(write({**fields, name: values}))
    assert lengths(data.trajectories).tolist() == SIZES
    assert (data.trajectories == right).all()
    assert data.notes == (
        f"2 episodes end where {name.split('/')[-1]!r} says so, without a timeout",
    )


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("dones", flags(ENDS[1])),  # what the terminals say
        ("dones", np.arange(sum(SIZES)) / 10),  # not flags
        ("dones", np.zeros(5, bool)),  # another number of rows
        ("mask", np.ones(sum(SIZES))),  # of padding, without any
        ("time", 1e9 + np.arange(sum(SIZES)) ** 1.5),  # of a clock
        ("episode_ids", np.arange(sum(SIZES))),  # ids of rows
        ("timesteps", np.arange(sum(SIZES))),  # one count for the whole recording
        ("steps", np.arange(sum(SIZES)) // 2),  # of two environments
        ("episode_lengths", np.array([5, 5])),
        ("truncations", np.array(["no"] * sum(SIZES), "S2")),
    ],
)
def test_fields_of_another_meaning_change_nothing(
    write: Write, name: str, values: np.ndarray
) -> None:
    data = datasets.load(write({**walks(), name: values}))
    assert lengths(data.trajectories).tolist() == SIZES
    assert data.notes == ()


@pytest.mark.filterwarnings("ignore:.*episodes end where")
def test_a_next_observation_that_is_not_the_next_row_ends_an_episode(write: Write) -> None:
    fields = walks()
    del fields["timeouts"]
    fields["next_observations"] *= np.float32(1 + 1e-6)  # rounding
    data = datasets.load(write(fields))
    assert lengths(data.trajectories).tolist() == SIZES
    assert "2 episodes end where the next observation is not" in data.notes[0]
    inside = ~flags(ENDS)[:-1]
    same = data.trajectories[NEXT_OBSERVATION][:-1] - data.trajectories[OBSERVATION][1:]
    assert same.abs().amax(1)[inside].max() < 1e-4

    # Each episode without its last row, as functions for Q-learning return them.
    rows = ~flags(ENDS[[0, 2, 3]])
    short = datasets.load(write({name: values[rows] for name, values in fields.items()}))
    assert lengths(short.trajectories).tolist() == [5, 9, 3, 6]


def test_shuffled_transitions_are_refused_and_noise_is_not(write: Write) -> None:
    fields = walks()
    order = np.random.default_rng(0).permutation(sum(SIZES))
    with pytest.raises(ValueError, match="put the rows in the order of recording"):
        datasets.load(write({name: values[order] for name, values in fields.items()}))
    noise = np.random.default_rng(1).normal(0, 0.01, fields["observations"].shape)
    fields["next_observations"] += noise.astype(np.float32)
    noisy = datasets.load(write(fields))
    assert lengths(noisy.trajectories).tolist() == SIZES
    assert noisy.notes == ()


@pytest.mark.filterwarnings("ignore:.*episodes end")
def test_a_file_of_d4rl_without_timeouts_ends_episodes_at_the_limit(write: Write) -> None:
    rows = 2500
    fields = {
        "observations": np.zeros((rows, 11), np.float32),
        "actions": np.zeros((rows, 3), np.float32),
        "rewards": np.ones(rows, np.float32),
        "terminals": np.arange(rows) == 399,
    }
    data = datasets.load(write(fields, "hopper_medium-v2.hdf5"))
    assert lengths(data.trajectories).tolist() == [400, 1000, 1000, 100]


@pytest.mark.filterwarnings("ignore:.*limit of steps")
@pytest.mark.parametrize("kwargs", ["{}", '{"max_episode_steps": 40}'])
def test_no_episode_is_longer_than_the_environment_s(write: Write, kwargs: str) -> None:
    """Two episodes of 200 and 120 steps, the second with its terminal; the limit is 200 or 40."""
    rng = np.random.default_rng(0)
    fields = {
        "observations": rng.normal(size=(320, 3)),
        "actions": rng.uniform(-2, 2, (320, 1)),
        "rewards": rng.normal(size=320),
        "terminals": np.arange(320) == 319,
    }
    path = write(fields, env_id="Pendulum-v1", env_kwargs=kwargs)
    data = datasets.load(path, scale_actions=True)
    assert lengths(data.trajectories).tolist() == ([200, 120] if kwargs == "{}" else [40] * 8)
    assert data.trajectories[TERMINATED].flatten().nonzero().tolist() == [[319]]
    # A timeout after more steps shows that the recording had a longer limit.
    fields["timeouts"] = np.arange(320) == 299
    path = write(fields, env_id="Pendulum-v1", env_kwargs=kwargs)
    data = datasets.load(path, scale_actions=True)
    assert lengths(data.trajectories).tolist() == [300, 20]


@pytest.mark.filterwarnings("ignore:.*one trajectory")
def test_a_recording_without_any_end_says_so(write: Write) -> None:
    fields = walks(following=False)
    fields["terminals"][:] = fields["timeouts"][:] = False
    data = datasets.load(write(fields))
    assert data.notes == ("no end of an episode is marked: 26 rows are one trajectory",)


@pytest.mark.filterwarnings("ignore:.*do flags mark first rows", "ignore:.*are flags inverted")
def test_flags_that_mark_other_rows_than_the_last(write: Write) -> None:
    rng = np.random.default_rng(0)  # rows that predict nothing
    fields = walks(following=False) | {"observations": rng.normal(size=(sum(SIZES), 3))}
    fields |= {"timeouts": flags([]), "terminals": flags([0, *(ENDS[:-1] + 1)])}
    assert datasets.load(write(fields)).notes[-1].endswith("do flags mark first rows?")
    fields["terminals"] = ~flags(ENDS)
    assert datasets.load(write(fields)).notes[-1].endswith("are flags inverted?")
    fields |= walks() | {"next_observations": walks()["observations"]}
    with pytest.raises(ValueError, match="'next_observations' are the row's own observations"):
        datasets.load(write(fields))


def test_next_observations_in_the_place_of_the_observations(write: Write) -> None:
    """Small steps, which rounding and noise of a sensor do not explain either."""
    fields = walks()
    now, then = fields["observations"], fields["next_observations"]
    for start, stop in zip(ENDS - SIZES + 1, ENDS + 1, strict=True):
        path = 1e-3 * np.arange(stop - start + 1, dtype=np.float32)[:, None] + [0, 5, 9]
        now[start:stop], then[start:stop] = path[:-1], path[1:]
    assert datasets.load(write(fields)).notes == ()
    swapped = fields | {"observations": then, "next_observations": now}
    with pytest.raises(ValueError, match="are the 'next_observations' of the next rows; swap"):
        datasets.load(write(swapped))
    with pytest.raises(ValueError, match="in the order of recording"):
        datasets.load(write({name: values[::-1] for name, values in fields.items()}))


@pytest.mark.parametrize("name", ["terminals", "timeouts"])
def test_inverted_flags_are_named(write: Write, name: str) -> None:
    fields = walks() | {"terminals": flags([]), "timeouts": flags([])} | {name: ~flags(ENDS)}
    with pytest.raises(ValueError, match=f"'{name}' marks the rows that .* invert it"):
        datasets.load(write(fields))


@pytest.mark.filterwarnings("error")
def test_a_file_of_one_row(write: Write) -> None:
    data = datasets.load(write({name: values[:1] for name, values in walks().items()}))
    assert lengths(data.trajectories).tolist() == [1]


def test_episodes_of_one_step_are_noted(write: Write) -> None:
    fields = walks(following=False) | {"terminals": flags(range(sum(SIZES))), "timeouts": flags([])}
    with pytest.warns(UserWarning, match="each of 26 rows ends an episode"):
        data = datasets.load(write(fields))
    assert lengths(data.trajectories).tolist() == [1] * sum(SIZES)
    fields["terminals"][3] = False
    with pytest.warns(UserWarning, match="25 of 26 rows end an episode: are flags inverted"):
        assert len(lengths(datasets.load(write(fields)).trajectories)) == 25


def record(env_id: str, steps: int, **kwargs: Any) -> Fields:
    """Rows of a vector environment with its usual reset in the step after an end."""
    envs: Any = gym.make_vec(env_id, num_envs=1, vectorization_mode="sync", **kwargs)
    envs.action_space.seed(0)
    now, _ = envs.reset(seed=0)
    rows: Fields = {"observations": [], "actions": [], "rewards": [], "next_observations": []}
    rows |= {"terminals": [], "timeouts": []}
    for _ in range(steps):
        action = envs.action_space.sample()
        then, reward, terminal, timeout, _ = envs.step(action)
        taken = np.tanh(action)  # in [-1, 1]
        for name, value in zip(rows, (now, taken, reward, then, terminal, timeout), strict=True):
            rows[name].append(value[0].copy())
        now = then
    envs.close()
    return {name: np.array(values) for name, values in rows.items()}


@pytest.mark.filterwarnings("ignore:.*rows left out")
@pytest.mark.parametrize("following", [True, False])
@pytest.mark.parametrize(
    ("env_id", "kwargs"),
    [
        ("InvertedPendulum-v5", {}),
        ("Reacher-v5", {}),
        # Most rewards are 0.
        ("MountainCarContinuous-v0", {"max_episode_steps": 30}),
    ],
)
def test_steps_in_which_a_vector_environment_resets_are_left_out(
    write: Write, env_id: str, kwargs: Fields, following: bool
) -> None:
    fields = record(env_id, 400, **kwargs)
    if env_id.startswith("MountainCar"):
        fields["rewards"][:] = 0
    if not following:
        del fields["next_observations"]
    ends = fields["terminals"] | fields["timeouts"]
    resets = np.append(False, ends[:-1])
    data = datasets.load(write(fields))
    assert f"{resets.sum()} rows left out" in data.notes[0]
    np.testing.assert_array_equal(
        data.trajectories[OBSERVATION], fields["observations"][~resets].astype(np.float32)
    )
    # Without these rows, nothing is left out.
    clean = {name: values[~resets] for name, values in fields.items()}
    again = datasets.load(write(clean))
    assert again.notes == ()
    assert (again.trajectories == data.trajectories).all()
