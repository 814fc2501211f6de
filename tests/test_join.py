"""Curated parts of several datasets, joined into one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from iwsft.curation import curate, join, trajectory_returns
from iwsft.samplers import TrajectorySampler
from iwsft.trajectory import (
    DATA_WEIGHT,
    GIVEN_REF_LOG_PROB,
    MULTIPLICITY,
    REWARD,
    TRAJ_IDS,
    lengths,
    pad,
    per_trajectory,
)
from tests.test_curation import dataset


@pytest.mark.parametrize("padded", [False, True])
def test_joined_parts_keep_what_each_cut_left(padded: bool) -> None:
    """Top 20 % of each: the second dataset's scores are all above the first's."""
    low, high = dataset([1.0, 5.0, 2.0, 4.0, 3.0]), dataset([70.0, 60.0, 90.0, 80.0, 50.0])
    high["observation"] += 1000
    parts = [curate(low, cuts=(40, 80)), curate(high, cuts=(80,)), low.clone()]
    joined = join(*(pad(part) if padded else part for part in parts))
    expected = torch.cat([part["observation"] for part in parts])
    assert torch.equal(joined["observation"], expected)
    # Best, second and third of the low; best of the high; all of the low, which has no counts.
    assert per_trajectory(joined, MULTIPLICITY).tolist() == [2, 1, 1, 1, *[1] * 5]
    assert per_trajectory(joined, TRAJ_IDS).tolist() == list(range(9))
    assert lengths(joined).tolist() == [int(n) for part in parts for n in lengths(part)]
    assert parts[2].get(MULTIPLICITY, default=None) is None
    assert TrajectorySampler(joined, 4).state_dict()["multiplicity"] == 10
    # Absent means 1.
    weighted = curate(high, cuts=(), weight="linear")
    weights = per_trajectory(join(low, weighted), DATA_WEIGHT).tolist()
    known = low.copy().set(GIVEN_REF_LOG_PROB, torch.full((len(low),), -2.0))
    given = join(weighted, known)[GIVEN_REF_LOG_PROB]
    assert given[: len(weighted)].isnan().all() and (given[len(weighted) :] == -2).all()
    assert weights == [1, 1, 1, 1, 1, 70, 60, 90, 80, 50]


def test_a_batch_of_joined_parts_never_mixes_their_trajectories() -> None:
    """Both parts have the ids 0, 3, 6; the last of one and the first of the other are one each."""
    one = dataset([1.0, 2.0, 3.0], [2, 3, 1])
    joined = join(one[3:], one[:2])
    assert lengths(joined).tolist() == [2, 1, 2]
    assert trajectory_returns(joined).tolist() == [2.0, 3.0, 1.0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda x: x.exclude("action"), "action"),
        (lambda x: x.set("value", x["observation"]), "value"),
        (lambda x: x.set("observation", x["observation"].expand(-1, 2)), "observation"),
        (lambda x: x.set(REWARD, x[REWARD].float()), "next.reward"),
        (lambda x: x.set(MULTIPLICITY, torch.ones(len(x))), "multiplicity"),
    ],
)
def test_unlike_parts_are_refused(change: Any, named: str) -> None:
    with pytest.raises(ValueError, match=f"differ in {named};"):
        join(dataset([1.0, 2.0]), change(dataset([3.0, 4.0])))


def test_what_cannot_be_joined() -> None:
    lone = join(dataset([1.0, 2.0]))
    assert lone.get(TRAJ_IDS).unique().tolist() == [0, 1]
    with pytest.raises(ValueError, match="nothing to join"):
        join()
    with pytest.raises(TypeError, match="not a list"):
        join([dataset([1.0])])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not a single step"):
        join(dataset([1.0]), dataset([1.0])[:0])
