"""The measures of how many ways to act a dataset holds, where the truth is known."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from iwsft.trajectory import from_steps
from scripts import curated_modes
from scripts.curated_modes import disagreement, held_out

COUNT, LENGTH = 40, 50


def trajectories(kind: str) -> TensorDict:
    """States over a square; the action follows the state, a choice of each trajectory, or noise."""
    generator = torch.Generator().manual_seed(0)
    observation = 2 * torch.rand(COUNT * LENGTH, 2, generator=generator) - 1
    way = (torch.rand(COUNT, 1, generator=generator).round() * 1.6 - 0.8).repeat_interleave(
        LENGTH, 0
    )
    noise = torch.randn(COUNT * LENGTH, 1, generator=generator) / 3
    action = {"state": observation[:, :1], "way": way, "noise": noise}[kind]
    steps = {"observation": observation, "action": action}
    return from_steps(steps, torch.arange(COUNT).repeat_interleave(LENGTH))


@pytest.mark.parametrize(("kind", "truth"), [("state", 0), ("way", 1), ("noise", 1)])
def test_disagreement_is_the_share_that_the_state_does_not_explain(kind: str, truth: int) -> None:
    assert disagreement(trajectories(kind), 0) == pytest.approx(truth, abs=0.1)


def test_several_ways_to_act_give_a_mixture_its_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curated_modes, "UPDATES", 40)

    data = trajectories("way")
    assert held_out("mixture", data, data, 0) > held_out("gaussian", data, data, 0) + 0.3
