"""State normalisation against NumPy, and the policy that carries it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from baselines.normalization import Normalization, NormalizedPolicy, normalized
from iwsft.trajectory import ACTION, MASK, NEXT_OBSERVATION, OBSERVATION

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
