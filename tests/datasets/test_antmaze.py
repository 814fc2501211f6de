"""AntMaze files: trajectories end at the goal, and the steps at the goal are left out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from iwsft import curate, datasets
from iwsft.curation import trajectory_returns
from iwsft.datasets.antmaze import until_goal
from iwsft.datasets.episodes import Steps
from iwsft.trajectory import (
    MULTIPLICITY,
    NEXT_OBSERVATION,
    OBSERVATION,
    TERMINATED,
    TRUNCATED,
    lengths,
)

Write = Callable[..., Path]
V0 = "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse.hdf5"
V2 = "Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse_fixed.hdf5"


def run(steps: int, start: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    """``[steps, 29]``: an ant put down at ``start`` that walks 0.1 per step along x and y."""
    rows = np.zeros((steps, 29), np.float32)
    rows[:, :2] = np.asarray(start) + 0.1 * np.arange(steps)[:, None]
    rows[:, 7:15] = 0.8  # joints of a walking ant
    rows[0, 7:15] = 0.05
    rows[:, 2] = np.arange(steps)  # tells the rows apart
    return rows


def fields(*runs: tuple[np.ndarray, list[int]], timeouts: list[int] | None) -> dict[str, Any]:
    """D4RL's layout: runs end to end, the goal steps of each counted from its start."""
    observations = np.concatenate([rows for rows, _ in runs])
    terminals = np.zeros(len(observations), np.float32)
    start = 0
    for rows, goals in runs:
        terminals[[start + goal for goal in goals]] = 1
        start += len(rows)
    made = {
        "observations": observations,
        "actions": np.zeros((len(observations), 8), np.float32),
        "rewards": terminals.copy(),
        "terminals": terminals,
    }
    if timeouts is not None:
        made["timeouts"] = np.isin(np.arange(len(observations)), timeouts)
    return made


@pytest.mark.parametrize("timeouts", [[9, 19, 29], None])
@pytest.mark.parametrize("name", [V0, V2])
def test_a_stay_at_the_goal_is_left_out(
    write: Write, name: str, timeouts: list[int] | None
) -> None:
    """With timeouts in step with the resets, and without any."""
    made = fields((run(10), [4, 5, 8]), (run(10), []), (run(10), [9]), timeouts=timeouts)
    data = datasets.load(write(made, name), data_weight=range(1, 31))
    packed = data.trajectories
    assert lengths(packed).tolist() == [5, 10, 10]
    assert packed["data_weight"].tolist() == [*range(1, 6), *range(11, 31)]
    assert packed[TERMINATED].flatten().nonzero().flatten().tolist() == [4, 24]
    assert packed[TRUNCATED].flatten().nonzero().flatten().tolist() == [14]
    assert trajectory_returns(packed).tolist() == [1, 0, 1]
    # The goal step saw the row after it, which is left out; the truncated one keeps its own.
    assert packed[NEXT_OBSERVATION][[4, 14], 2].tolist() == [5, 9]
    assert packed[OBSERVATION][5, 2] == 0
    assert data.notes[0].startswith("5 of 30 rows left out")
    assert ("without a timeout" in " ".join(data.notes)) == (timeouts is None)
    assert data.env_id == "AntMaze_UMaze-v4"
    assert data.env_kwargs == {"conventions": "d4rl"}
    assert data.reference_scores == (0.0, 1.0)


def test_a_reset_onto_the_same_place_is_seen_by_the_joints(write: Write) -> None:
    made = fields((run(6), [3]), (run(6, start=(0.5, 0.5)), []), timeouts=None)
    data = datasets.load(write(made, V0))
    assert lengths(data.trajectories).tolist() == [4, 6]


def test_timeouts_out_of_step_make_no_crumbs(write: Write) -> None:
    """A timeout within a stay at the goal does not end it; elsewhere a timeout splits the rows."""
    made = fields((run(12), [3, 4, 5, 6, 7]), (run(12), []), timeouts=[5, 17])
    data = datasets.load(write(made, V0))
    assert lengths(data.trajectories).tolist() == [4, 6, 6]
    assert trajectory_returns(data.trajectories).tolist() == [1, 0, 0]


def test_recorded_next_observations_decide(write: Write) -> None:
    """Episodes that end at the goal: the next one starts where it likes, and nothing is lost."""
    made = fields((run(5), [4]), (run(5, start=(0.6, 0.6)), [2, 4]), timeouts=None)
    made["observations"][5, 7:15] = 0.8
    following = np.roll(made["observations"], -1, axis=0)
    following[[4, 9]] += 100
    data = datasets.load(write({**made, "next_observations": following}, V2))
    assert lengths(data.trajectories).tolist() == [5, 3]
    assert (data.trajectories[NEXT_OBSERVATION][4] >= 100).all()


def test_against_a_walk_over_the_rows() -> None:
    """Random files, read by a loop that follows the definition row by row."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        sizes = rng.integers(1, 8, size=rng.integers(1, 6))
        observations = np.concatenate([run(int(size)) for size in sizes])
        rows = len(observations)
        goal, timeouts = rng.random(rows) < 0.3, rng.random(rows) < 0.1
        last = np.isin(np.arange(rows), np.cumsum(sizes) - 1)
        kept, reached = [], False
        for row in range(rows):
            if not reached:
                kept.append(row)
            reached = (reached or bool(goal[row])) and not last[row]
        actions, rewards = np.zeros((rows, 8), np.float32), goal.astype(np.float32)
        steps, _ = until_goal(Steps(observations, actions, rewards, goal, timeouts))
        np.testing.assert_array_equal(steps.observations, observations[kept])
        np.testing.assert_array_equal(steps.terminals, goal[kept])
        np.testing.assert_array_equal(steps.timeouts, (timeouts | last)[kept])
        assert steps.next_observations is not None
        for row, following in zip(kept, steps.next_observations, strict=True):
            own = last[row] or timeouts[row]
            np.testing.assert_array_equal(following, observations[row if own else row + 1])


def test_curation_of_sparse_returns(write: Write) -> None:
    """20 of 50 reach the goal: '>=' takes just these, alike; '>' and 'rank' say what they do."""
    runs = [(run(6), [3, 4] if i % 5 < 2 else []) for i in range(50)]
    data = datasets.load(write(fields(*runs, timeouts=None), V2)).trajectories
    best = curate(data, cuts=(90, 95, 98), ties=">=")
    assert trajectory_returns(best.exclude(MULTIPLICITY)).tolist() == [1] * 20
    assert (best[MULTIPLICITY] == 3).all()
    with pytest.raises(ValueError, match=r"20 of 50 scores are the maximum.*'rank' or '>='"):
        curate(data, cuts=(90, 95, 98), ties=">")
    with pytest.warns(UserWarning, match="falls among 20 equal scores") as caught:
        few = curate(data, cuts=(90,))
    assert Path(caught[0].filename) == Path(__file__)
    assert len(lengths(few)) == 5
