"""Trajectories that the data show to be two are refused wherever whole datasets enter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from iwsft import GaussianPolicy, annotate_reference, curate
from iwsft.samplers import StepSampler
from iwsft.trajectory import DONE, NEXT_OBSERVATION, REWARD, from_steps, validate


def chain(lengths: list[int], ids: list[int], more: dict[Any, Tensor] | None = None) -> TensorDict:
    """Episodes whose next observations are the observations that follow, under given ids."""
    generator = torch.Generator().manual_seed(3)
    episodes = [torch.randn(length + 1, 2, generator=generator) for length in lengths]
    steps = {
        "observation": torch.cat([episode[:-1] for episode in episodes]),
        "action": torch.zeros(sum(lengths), 1),
        NEXT_OBSERVATION: torch.cat([episode[1:] for episode in episodes]),
        REWARD: torch.ones(sum(lengths)),
        **(more or {}),
    }
    return from_steps(steps, torch.tensor(ids).repeat_interleave(torch.tensor(lengths)))


def use(trajectories: TensorDict) -> None:
    """Every door that whole datasets enter by."""
    curate(trajectories, cuts=(0,), ties=">=")
    StepSampler(trajectories, 2)
    annotate_reference(GaussianPolicy(2, 1, hidden=(4,)), trajectories.clone())
    validate(trajectories)


def test_two_episodes_under_one_id_are_refused() -> None:
    use(chain([4, 3], [0, 1]))
    merged = torch.cat([chain([4], [5]), chain([3], [5])])
    for door in (
        lambda: curate(merged),
        lambda: StepSampler(merged, 2),
        lambda: annotate_reference(GaussianPolicy(2, 1, hidden=(4,)), merged),
        lambda: validate(merged),
    ):
        with pytest.raises(ValueError, match="step 4 does not begin where step 3"):
            door()


def test_episodes_that_say_where_they_end_or_have_no_links_are_not_refused() -> None:
    done = torch.zeros(7, dtype=torch.bool)
    done[3] = True
    use(chain([4, 3], [5, 5], {DONE: done}))
    # Next observations of another kind, such as differences, tell nothing.
    use(chain([4, 3], [5, 5], {NEXT_OBSERVATION: torch.zeros(7, 2)}))


@pytest.mark.parametrize("shape", [(), (2,), (2, 1, 3)])
def test_observations_may_have_any_shape(shape: tuple[int, ...]) -> None:
    whole = chain([4, 3], [0, 1])
    for key in ("observation", NEXT_OBSERVATION):
        whole[key] = whole[key][:, 0].reshape(-1, *[1] * len(shape)).expand(-1, *shape)
    StepSampler(whole, 2)
    whole["collector", "traj_ids"] = torch.zeros(7, dtype=torch.int64)
    with pytest.raises(ValueError, match="step 4 does not begin where step 3"):
        curate(whole)
