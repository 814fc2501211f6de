"""The cut into trajectories, against a plain loop over rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iwsft.datasets.episodes import CHUNK, Steps, check_actions, pack_steps
from iwsft.trajectory import (
    ACTION,
    DONE,
    NEXT_OBSERVATION,
    OBSERVATION,
    REWARD,
    TERMINATED,
    TRAJ_IDS,
    TRUNCATED,
    lengths,
)
from iwsft.validation import validate


def make(terminals: list[bool], timeouts: list[bool], *, following: bool) -> Steps:
    rng = np.random.default_rng(len(terminals))
    rows = len(terminals)
    return Steps(
        observations=rng.normal(size=(rows, 2)).astype(np.float32),
        actions=rng.uniform(-1, 1, size=(rows, 1)).astype(np.float32),
        rewards=rng.normal(size=rows).astype(np.float32),
        terminals=np.array(terminals),
        timeouts=np.array(timeouts),
        next_observations=rng.normal(size=(rows, 2)).astype(np.float32) if following else None,
    )


def cut_by_hand(steps: Steps) -> list[list[dict[str, object]]]:
    """Episodes as lists of rows, one row at a time."""
    episodes: list[list[dict[str, object]]] = [[]]
    rows = len(steps.rewards)
    for i in range(rows):
        terminal, timeout = bool(steps.terminals[i]), bool(steps.timeouts[i])
        last = terminal or timeout or i == rows - 1
        if steps.next_observations is not None:
            following = steps.next_observations[i]
        else:
            following = steps.observations[i] if last else steps.observations[i + 1]
        episodes[-1].append(
            {
                "observation": steps.observations[i].tolist(),
                "action": steps.actions[i].tolist(),
                "next": following.tolist(),
                "reward": float(steps.rewards[i]),
                "terminated": terminal,
                "truncated": last and not terminal,
            }
        )
        if last and i < rows - 1:
            episodes.append([])
    return episodes


FLAGS = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)


@given(flags=FLAGS, following=st.booleans())
def test_the_cut_is_the_loop(flags: list[tuple[bool, bool]], following: bool) -> None:
    steps = make([t for t, _ in flags], [t for _, t in flags], following=following)
    packed = pack_steps(steps, "here")
    validate(packed)
    episodes = cut_by_hand(steps)

    assert lengths(packed).tolist() == [len(episode) for episode in episodes]
    rows = [
        {
            "observation": packed[OBSERVATION][i].tolist(),
            "action": packed[ACTION][i].tolist(),
            "next": packed[NEXT_OBSERVATION][i].tolist(),
            "reward": packed[REWARD][i].item(),
            "terminated": packed[TERMINATED][i].item(),
            "truncated": packed[TRUNCATED][i].item(),
        }
        for i in range(len(packed))
    ]
    assert rows == [row for episode in episodes for row in episode]
    ids = [n for n, episode in enumerate(episodes) for _ in episode]
    assert packed[TRAJ_IDS].tolist() == ids
    assert torch.equal(packed[DONE], packed[TERMINATED] | packed[TRUNCATED])


def test_layout() -> None:
    packed = pack_steps(make([False, True], [False, False], following=False), "here")
    assert packed.batch_size == torch.Size([2])
    for key, shape, dtype in (
        (OBSERVATION, [2, 2], torch.float32),
        (ACTION, [2, 1], torch.float32),
        (NEXT_OBSERVATION, [2, 2], torch.float32),
        (REWARD, [2, 1], torch.float32),
        (DONE, [2, 1], torch.bool),
        (TERMINATED, [2, 1], torch.bool),
        (TRUNCATED, [2, 1], torch.bool),
        (TRAJ_IDS, [2], torch.int64),
    ):
        assert list(packed[key].shape) == shape
        assert packed[key].dtype == dtype
        assert packed[key].is_contiguous()


def test_arrays_are_not_copied_and_flags_not_changed() -> None:
    steps = make([False, False], [False, False], following=True)
    packed = pack_steps(steps, "here")
    assert np.shares_memory(packed[OBSERVATION].numpy(), steps.observations)
    assert np.shares_memory(packed[NEXT_OBSERVATION].numpy(), steps.next_observations)
    assert np.shares_memory(packed[REWARD].numpy(), steps.rewards)
    assert packed[TRUNCATED][:, 0].tolist() == [False, True]
    assert not steps.timeouts.any()


@pytest.mark.parametrize("row", [0, CHUNK - 1, CHUNK, CHUNK + 3])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("field", ["observations", "actions", "rewards", "next_observations"])
def test_a_value_that_is_not_finite_is_named(field: str, value: float, row: int) -> None:
    steps = make([False] * (CHUNK + 5), [False] * (CHUNK + 5), following=True)
    array = getattr(steps, field)
    array[row:] = value
    named = "NaN" if np.isnan(value) else r"infinite or beyond float32 \(3.4e38\)"
    with pytest.raises(ValueError, match=rf"here: '{field}' is {named} at row {row};"):
        pack_steps(steps, "here")


def test_actions_out_of_range() -> None:
    actions = np.zeros((CHUNK + 10, 2), dtype=np.float32)
    actions[5] = [1.0, -1.0]
    actions[6, 0] = 1.00005  # rounding
    check_actions(actions, -1, 1, "here")
    actions[CHUNK + 2, 1] = -1.001
    with pytest.raises(
        ValueError, match=rf"here: 'actions' .* at row {CHUNK + 2}, column 1 .* -1 to 1$"
    ):
        check_actions(actions, -1, 1, "here")
    low = np.array([-1, -2], dtype=np.float32)
    check_actions(actions, low, -low, "here")
