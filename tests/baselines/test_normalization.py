"""State normalisation against NumPy, and the policy that carries it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from baselines import BASELINES, algorithm
from baselines.normalization import Normalization, NormalizedPolicy, normalized
from iwsft.trajectory import (
    ACTION,
    MASK,
    MULTIPLICITY,
    NEXT_OBSERVATION,
    OBSERVATION,
    REWARD,
    TRAJ_IDS,
)

MakeTrajectories = Callable[..., TensorDict]


def test_mean_and_std_are_those_of_the_dataset(make_trajectories: MakeTrajectories) -> None:
    data = make_trajectories()
    data.get(OBSERVATION).mul_(3).add_(2)
    states = data.get(OBSERVATION).double().numpy()
    fitted = Normalization.of(data)
    np.testing.assert_allclose(fitted.mean, states.mean(0), rtol=1e-6)
    np.testing.assert_allclose(fitted.std, states.std(0) + 1e-3, rtol=1e-6)


def test_normalized_data_has_mean_0_and_std_1_and_next_states_the_same_map(
    make_trajectories: MakeTrajectories,
) -> None:
    data = make_trajectories()
    before = data.clone()
    fitted = Normalization.of(data)
    out = normalized(data, fitted)
    states = out.get(OBSERVATION)
    torch.testing.assert_close(states.mean(0), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(states.std(0, correction=0), 1 - 1e-3 / fitted.std)
    back = out.get(NEXT_OBSERVATION) * fitted.std + fitted.mean
    torch.testing.assert_close(back, data.get(NEXT_OBSERVATION))
    assert (data == before).all(), "the caller's trajectories were changed"
    assert out.get(ACTION) is data.get(ACTION)


def test_a_constant_feature_becomes_0(make_trajectories: MakeTrajectories) -> None:
    data = make_trajectories()
    data.get(OBSERVATION)[:, 1] = 7.0
    out = normalized(data, Normalization.of(data))
    assert not out.get(OBSERVATION)[:, 1].any()


def test_a_feature_far_from_0_keeps_its_spread(make_trajectories: MakeTrajectories) -> None:
    data = make_trajectories()
    generator = torch.Generator().manual_seed(3)
    far = 1e4 + torch.rand(len(data), generator=generator)
    data.get(OBSERVATION)[:, 0] = far
    expected = far.double().numpy().std() + 1e-3
    np.testing.assert_allclose(Normalization.of(data).std[0], expected, rtol=1e-6)


def test_masked_steps_do_not_count(make_trajectories: MakeTrajectories) -> None:
    data = make_trajectories()
    valid = torch.ones(len(data), dtype=torch.bool)
    valid[3:6] = False
    expected = Normalization.of(data[valid])
    data.get(OBSERVATION)[3:6] = float("inf")
    data.set(MASK, valid)
    got = Normalization.of(data)
    assert torch.equal(got.mean, expected.mean) and torch.equal(got.std, expected.std)


@pytest.mark.parametrize("name", BASELINES)
def test_counted_trajectories_are_read_as_repeated_ones(
    make_trajectories: MakeTrajectories, name: str
) -> None:
    data = make_trajectories((5, 4, 9, 3))
    # The second, which does not count, has the most extreme return.
    data.get(REWARD)[5:9] += 100
    counts = (2, 0, 1, 3)
    parts = torch.split(data, [5, 4, 9, 3])
    repeated = torch.cat(
        [part.clone() for part, count in zip(parts, counts, strict=True) for _ in range(count)]
    )
    sizes = torch.tensor([5, 5, 9, 3, 3, 3])
    repeated.set(TRAJ_IDS, torch.arange(6).repeat_interleave(sizes))
    data.set(MULTIPLICITY, torch.tensor(counts).repeat_interleave(torch.tensor([5, 4, 9, 3])))

    settings, _ = algorithm(name).published("hopper-medium-v2")
    small: dict[str, Any] = {field: (8,) for field in vars(settings) if field.endswith("hidden")}
    small |= {"normalize": True} if name == "cql" else {}
    if name == "dt":
        small = {"width": 8, "layers": 1, "target_return": None, "return_scale": None}
    learners = [
        algorithm(name).build(each, replace(settings, **small), seed=0) for each in (data, repeated)
    ]
    ours, theirs = (learner.policy.state_dict() for learner in learners)
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-6, atol=1e-8, msg=key)
    if name != "dt":
        first = [learner.sampler.trajectories[REWARD][0] for learner in learners]  # type: ignore[attr-defined]
        torch.testing.assert_close(first[0], first[1])


def test_the_policy_reads_raw_states_and_its_state_dict_carries_the_numbers(
    make_trajectories: MakeTrajectories,
) -> None:
    data = make_trajectories()

    def actor() -> TensorDictModule:
        return TensorDictModule(nn.Linear(3, 2), in_keys=[OBSERVATION], out_keys=[ACTION])

    fitted = Normalization.of(data)
    policy = NormalizedPolicy(fitted, actor())
    raw = TensorDict({OBSERVATION: data.get(OBSERVATION)}, [len(data)])
    out = policy(raw)
    z = (data.get(OBSERVATION) - fitted.mean) / fitted.std
    torch.testing.assert_close(out.get(ACTION), policy.actor.module(z))
    assert out.get(OBSERVATION) is data.get(OBSERVATION)
    assert set(out.keys()) == {OBSERVATION, ACTION}

    fresh = NormalizedPolicy(Normalization(3), actor())
    fresh.load_state_dict(policy.state_dict())
    again = fresh(TensorDict({OBSERVATION: data.get(OBSERVATION)}, [len(data)]))
    assert torch.equal(again.get(ACTION), out.get(ACTION))


def test_a_new_one_changes_nothing() -> None:
    x = torch.randn(4, 3)
    assert torch.equal(Normalization(3)(x), x)
