"""Reward transforms against sums by hand; the data given stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from baselines.rewards import clipped_actions, transformed
from iwsft.trajectory import REWARD


def returns(trajectories: Any) -> list[float]:
    """Undiscounted, a plain loop over the steps."""
    out: dict[int, float] = {}
    ids, rewards = trajectories["collector", "traj_ids"].tolist(), trajectories[REWARD].tolist()
    for i, (r,) in zip(ids, rewards, strict=True):
        out[i] = out.get(i, 0.0) + r
    return list(out.values())


def test_return_range_spans_1000(trajectories: Any) -> None:
    before = returns(trajectories)
    out = transformed(trajectories, "return range")
    factor = 1000 / (max(before) - min(before))
    torch.testing.assert_close(out[REWARD], trajectories[REWARD] * factor)
    after = returns(out)
    assert max(after) - min(after) == pytest.approx(1000, rel=1e-5)


def test_return_range_of_returns_of_one_sign(trajectories: Any) -> None:
    # Empty places must not count as a return of 0.
    trajectories[REWARD] = trajectories[REWARD].abs() + 1
    after = returns(transformed(trajectories, "return range"))
    assert max(after) - min(after) == pytest.approx(1000, rel=1e-5)
    trajectories[REWARD] = -trajectories[REWARD]
    after = returns(transformed(trajectories, "return range"))
    assert max(after) - min(after) == pytest.approx(1000, rel=1e-5)


def test_minus_one_and_as_they_are(trajectories: Any) -> None:
    reward = trajectories[REWARD].clone()
    assert torch.equal(transformed(trajectories, "minus one")[REWARD], reward - 1)
    assert torch.equal(transformed(trajectories, "as they are")[REWARD], reward)


@pytest.mark.parametrize("name", ["as they are", "return range", "minus one"])
def test_given_data_stays(trajectories: Any, name: Any, assert_same: Any) -> None:
    before = trajectories.clone()
    out = transformed(trajectories, name)
    assert set(out.keys(True, True)) == set(before.keys(True, True))
    out[REWARD] = out[REWARD] + 1
    clipped_actions(transformed(trajectories, name))
    assert_same(trajectories, before)


def test_clipped_actions(trajectories: Any) -> None:
    trajectories["action"][:3] = torch.tensor([[1.0, -1.0], [0.5, 2.0], [-3.0, 0.0]])
    before = trajectories["action"].clone()
    out = clipped_actions(trajectories)["action"]
    edge = 1 - 1e-5
    expected = torch.tensor([[edge, -edge], [0.5, edge], [-edge, 0.0]])
    assert torch.equal(out[:3], expected)
    assert torch.equal(out[3:], before[3:]) and torch.equal(trajectories["action"], before)


def test_returns_all_equal_are_refused(make_trajectories: Any) -> None:
    flat = make_trajectories((4, 4, 4))
    flat[REWARD] = torch.ones_like(flat[REWARD])
    with pytest.raises(ValueError, match="all 3 trajectories have the return 4.*as they are"):
        transformed(flat, "return range")
    with pytest.raises(ValueError, match="all 1 trajectories"):
        transformed(make_trajectories((7,)), "return range")
    assert torch.equal(transformed(flat, "minus one")[REWARD], torch.zeros_like(flat[REWARD]))


def test_an_unknown_name(trajectories: Any) -> None:
    with pytest.raises(ValueError, match="minus one, times 100, not 'plus one'"):
        transformed(trajectories, "plus one")  # type: ignore[arg-type]
