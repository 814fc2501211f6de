"""Padded trajectories as TorchRL and tensordict make them: where they are cut, and curation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, pad_sequence
from torchrl.collectors.utils import split_trajectories

from iwsft import GaussianPolicy, ImportanceWeightedMLE, annotate_reference, curate
from iwsft.trajectory import DONE, MASK, REWARD, TRAJ_IDS, Segments, lengths, pack
from iwsft.validation import validate


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("with_ids", [False, True])
def test_a_padded_row_is_cut_behind_the_end_of_an_episode(masked: bool, with_ids: bool) -> None:
    """As rows of ``env.rollout(break_when_any_done=False)`` are; against a loop over the steps."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        done = torch.rand(3, 8, generator=generator) < 0.3
        mask = torch.rand(3, 8, generator=generator) < 0.7 if masked else None
        padded = TensorDict({DONE: done[..., None]}, batch_size=[3, 8])
        ids = (torch.rand(3, 8, generator=generator) < 0.2).cumsum(1) * int(with_ids)
        if with_ids:
            padded.set(TRAJ_IDS, ids)
        expected, number = [], -1
        for row in range(3):
            for step in range(8):
                ended = step == 0 or bool(done[row, step - 1])
                number += ended or bool(ids[row, step] != ids[row, step - 1])
                expected.append(number)
        segments = Segments.of(padded, mask=mask)
        valid = segments.valid.reshape(-1)
        index, truth = segments.index[valid], torch.tensor(expected)[valid]
        assert torch.equal(index[:, None] == index, truth[:, None] == truth)
        # Ends in the padding, before the first and behind the last valid step, make no slots.
        assert segments.slots == int(segments.index.max()) + 1


@pytest.mark.parametrize("shown_by", ["name", "observations"])
def test_time_comes_second(shown_by: str) -> None:
    """A row of ``[T, B]`` holds the steps of all episodes at one time."""
    states = torch.randn(3, 6, 2)
    rows = TensorDict(
        {
            "observation": states[:, :-1],
            "action": torch.zeros(3, 5, 1),
            "next": {"observation": states[:, 1:], "reward": torch.randn(3, 5, 1)},
        },
        [3, 5],
    )
    if shown_by == "name":
        rows = rows.exclude(("next", "observation"))
        rows.names = [None, "time"]
    policy = GaussianPolicy(2, 1, hidden=(4,))
    loss = ImportanceWeightedMLE(policy, proposal="reference")
    doors: list[Any] = [
        lambda x: curate(x, cuts=(50,)),
        lambda x: annotate_reference(policy, x),
        validate,
        pack,
        loss,
    ]
    for door in doors:
        door(rows.clone())
        with pytest.raises(ValueError, match=r"layout \[T, B\]: pass trajectories.transpose"):
            door(rows.transpose(0, 1).clone())


def test_observations_with_entries_of_their_own_are_read() -> None:
    """Nothing compares them; their layout is that of the batch."""
    steps = {"position": torch.randn(3, 5, 2)}
    rows = TensorDict({"observation": steps, "next": {"observation": dict(steps)}}, [3, 5])
    assert Segments.of(rows).slots == 3
    assert len(pack(rows)) == 15


def rollout(lengths: list[int]) -> TensorDict:
    """Episodes back to back in one row, with ids, as a collector gives them."""
    size = torch.tensor(lengths)
    steps = int(size.sum())
    done = torch.zeros(1, steps, 1, dtype=torch.bool)
    done[0, size.cumsum(0) - 1] = True
    row = TensorDict({}, [1, steps])
    row["observation"], row["action"] = torch.randn(1, steps, 3), torch.rand(1, steps, 2)
    row[REWARD], row[DONE] = torch.randn(1, steps, 1), done
    row[TRAJ_IDS] = torch.arange(len(lengths)).repeat_interleave(size)[None]
    return row


def test_rows_of_split_trajectories_are_trajectories() -> None:
    """TorchRL pads their ids with 0, the id of another trajectory."""
    row = rollout([7, 3, 10])
    padded = split_trajectories(row)
    policy = GaussianPolicy(3, 2, hidden=(4,))
    annotate_reference(policy, padded)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.1
    loss = ImportanceWeightedMLE(policy, proposal="current")
    packed = pack(padded)
    assert lengths(packed).tolist() == [7, 3, 10]
    assert torch.equal(packed["observation"], row["observation"][0])
    for name, value in loss(packed).items():
        torch.testing.assert_close(loss(padded)[name], value)
    assert sorted(lengths(curate(padded, cuts=(50,))).tolist()) in ([3, 7], [3, 10], [7, 10])


@pytest.mark.parametrize("made_by", ["split_trajectories", "pad_sequence"])
def test_padding_that_another_mask_tells_is_refused(made_by: str) -> None:
    if made_by == "split_trajectories":
        padded = split_trajectories(rollout([3, 5]).exclude("collector"))
        mask = padded["mask"]
    else:
        parts: Any = [rollout([n])[0].exclude("collector") for n in (3, 5)]
        padded = pad_sequence(parts, return_mask=True)
        mask = padded["masks", "observation"]
    way_out = r"read from .*: trajectories\[.*\] = trajectories\['mask'\]|\('masks', "
    with pytest.raises(ValueError, match=way_out):
        curate(padded, cuts=())
    padded[MASK] = mask
    assert lengths(curate(padded, cuts=())).tolist() == [3, 5]


@pytest.mark.parametrize("with_ids", [False, True])
def test_padding_that_nothing_marks_is_refused_where_an_end_shows_it(with_ids: bool) -> None:
    parts: Any = [rollout([n])[0].exclude(*[] if with_ids else ["collector"]) for n in (3, 5, 2)]
    padded = pad_sequence(parts)
    policy = GaussianPolicy(3, 2, hidden=(4,))
    loss = ImportanceWeightedMLE(policy, proposal="reference")
    doors: list[Any] = [
        lambda x: curate(x, cuts=(50,)),
        lambda x: annotate_reference(policy, x),
        validate,
        pack,
        loss,
    ]
    mask = torch.arange(5) < torch.tensor([3, 5, 2])[:, None]
    for door in doors:
        with pytest.raises(ValueError, match="row 0 is 0 from step 3 on, .* return_mask=True"):
            door(padded.clone())
        door(padded.clone().set(MASK, mask))
    # A reference of the padding, computed by the user's own code, hides nothing.
    with pytest.raises(ValueError, match="there is no mask"):
        loss(padded.clone().set("ref_log_prob", -torch.ones(3, 5)))
    # What follows an end is the next episode where anything is in it, as in env.rollout.
    for key in ("observation", "action", REWARD):
        rows = padded.clone()
        rows[key][~mask] = torch.randn(rows[key][~mask].shape)
        for door in doors:
            door(rows.clone())
    # Steps at rest before any end are steps.
    loss(padded.clone().set(DONE, torch.zeros(3, 5, 1, dtype=torch.bool)))
