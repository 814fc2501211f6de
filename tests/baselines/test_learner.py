"""What all baselines read: the forms that data may have, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from baselines import BASELINES, Learner, algorithm
from iwsft.trajectory import (
    ACTION,
    DATA_WEIGHT,
    DONE,
    MASK,
    NEXT_OBSERVATION,
    OBSERVATION,
    REWARD,
    TERMINATED,
    pad,
)

CRITIC: dict[str, Any] = {"steps": 4, "batch_size": 8}
SMALL: dict[str, dict[str, Any]] = dict.fromkeys(BASELINES, {**CRITIC, "hidden": (8,)}) | {
    "cql": {**CRITIC, "actions": 2, "actor_hidden": (8,), "critic_hidden": (8,)},
    "dt": {**CRITIC, "context": 3, "layers": 1, "width": 8},
}


def build(name: str, trajectories: TensorDict) -> Learner:
    baseline = algorithm(name)
    return baseline.build(trajectories, baseline.Settings(**SMALL[name]), seed=0)


def flat(trajectories: TensorDict) -> TensorDict:
    """Without the last axis of 1, and with ends as numbers."""
    out = trajectories.copy()
    out[REWARD] = trajectories[REWARD].squeeze(-1)
    for key in (DONE, TERMINATED):
        out[key] = trajectories[key].squeeze(-1).float()
    return out


def wide(trajectories: TensorDict) -> TensorDict:
    """Numbers in float64, as gymnasium gives them."""
    return trajectories.apply(lambda x: x.double() if x.is_floating_point() else x)


@pytest.mark.parametrize("form", [flat, wide])
@pytest.mark.parametrize("name", BASELINES)
def test_forms_of_the_same_data_give_the_same_training(
    trajectories: TensorDict, name: str, form: Callable[[TensorDict], TensorDict]
) -> None:
    states = []
    for data in (trajectories, form(trajectories)):
        learner = build(name, data)
        learner.fit(log_every=1)
        states.append(learner.loss.state_dict() | learner.policy.state_dict())
    assert states[0].keys() == states[1].keys()
    for entry, value in states[0].items():
        assert torch.equal(value, states[1][entry]), entry


def two_columns(x: Tensor) -> Tensor:
    return x.expand(-1, 2)


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        (REWARD, two_columns, r"'reward'\) has shape \[28, 2\], the batch has \[28\] steps"),
        (OBSERVATION, lambda x: x[:, 0], r"'observation' has shape \[28\]; a baseline reads"),
        (OBSERVATION, lambda x: x[:, None], r"'observation' has shape \[28, 1, 3\]; a baseline"),
        (ACTION, lambda x: x[:, 0], r"'action' has shape \[28\]; a baseline reads vectors"),
        (ACTION, lambda x: 2.5 * x.sign(), r"actions reach 2.5, .* load the data with scale_act"),
    ],
)
@pytest.mark.parametrize("name", BASELINES)
def test_another_form_is_named(
    trajectories: TensorDict, name: str, key: Any, change: Any, message: str
) -> None:
    trajectories[key] = change(trajectories[key])
    if key == OBSERVATION:
        trajectories[NEXT_OBSERVATION] = change(trajectories[NEXT_OBSERVATION])
    with pytest.raises(ValueError, match=message):
        build(name, trajectories)


@pytest.mark.parametrize("name", BASELINES)
def test_padded_data_and_data_weights_are_refused(trajectories: TensorDict, name: str) -> None:
    with pytest.raises(ValueError, match="these trajectories are padded"):
        build(name, pad(trajectories))
    trajectories[DATA_WEIGHT] = torch.ones(len(trajectories))
    with pytest.raises(ValueError, match="does not read 'data_weight'"):
        build(name, trajectories)


def test_actions_of_masked_steps_may_be_anything(trajectories: TensorDict) -> None:
    trajectories[ACTION][4] = 7.0
    with pytest.raises(ValueError, match="actions reach 7"):
        build("td3-bc", trajectories)
    trajectories[MASK] = torch.arange(28) != 4
    build("td3-bc", trajectories)
