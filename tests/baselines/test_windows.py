from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from baselines.windows import WindowSampler, returns_to_go
from iwsft.trajectory import from_steps


def data(sizes: list[int], **more: torch.Tensor) -> TensorDict:
    """Trajectories whose observation is (trajectory, step); the other numbers are random."""
    generator = torch.Generator().manual_seed(sum(sizes))
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    step = torch.cat([torch.arange(size) for size in sizes])
    count = len(ids)
    return from_steps(
        {
            "observation": torch.stack([ids, step], 1).float(),
            "action": torch.randn(count, 2, generator=generator),
            ("next", "reward"): torch.randn(count, 1, generator=generator),
            **more,
        },
        ids,
    )


def test_returns_to_go_by_hand() -> None:
    trajectories = data([3, 1, 2])
    trajectories["next", "reward"] = torch.tensor([1.0, 2, 3, 4, 5, -6])[:, None]
    assert returns_to_go(trajectories).tolist() == [[6], [5], [3], [4], [-1], [-6]]


def test_returns_to_go_of_long_data_keep_their_digits() -> None:
    """A reward after a million others counts as it would alone."""
    sizes = [1000] * 1000 + [2]
    trajectories = data(sizes)
    rewards = torch.full((sum(sizes), 1), 1e3)
    rewards[-2:] = torch.tensor([[0.25], [0.125]])
    trajectories["next", "reward"] = rewards
    assert returns_to_go(trajectories)[-2:].tolist() == [[0.375], [0.125]]
    assert returns_to_go(trajectories)[0].tolist() == [1e6]


@settings(max_examples=25)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=6), st.integers(1, 7))
def test_windows_are_those_of_a_plain_loop(sizes: list[int], context: int) -> None:
    trajectories = data(sizes)
    rewards = trajectories["next", "reward"].double()
    batch = WindowSampler(trajectories, 16, context=context).sample()
    assert batch.batch_size == (16, context)
    assert not batch.requires_grad
    for window in batch:
        trajectory, start = window["observation"][0].long().tolist()
        before = sum(sizes[:trajectory])
        for t in range(context):
            valid = start + t < sizes[trajectory]
            assert bool(window["collector", "mask"][t]) == valid
            step, end = before + start + t, before + sizes[trajectory]
            for key, expected in (
                ("observation", trajectories["observation"][step : step + 1]),
                ("action", trajectories["action"][step : step + 1]),
                ("return_to_go", rewards[step:end].sum(0, keepdim=True).float()),
            ):
                actual = window[key][t]
                if valid:
                    torch.testing.assert_close(actual, expected[0])
                else:
                    assert not actual.any()


@pytest.mark.parametrize("multiplicities", [None, [1, 0, 3]])
def test_every_step_is_a_first_one_equally_often(multiplicities: list[int] | None) -> None:
    """Trajectories in proportion to length times multiplicity, then a step uniformly."""
    sizes = [2, 3, 5]
    each = torch.tensor(multiplicities or [1, 1, 1])
    per_step = each.repeat_interleave(torch.tensor(sizes))
    more = {} if multiplicities is None else {"multiplicity": per_step}
    sampler = WindowSampler(data(sizes, **more), 20_000, context=2, seed=1)
    first = sampler.sample()["observation"][:, 0].long()
    counts = torch.zeros(3, 5).index_put_(tuple(first.T), torch.ones(()), accumulate=True)
    actual = torch.cat([counts[k, :size] for k, size in enumerate(sizes)])
    assert actual.sum() == 20_000
    expected = 20_000 * per_step / per_step.sum()
    # Four standard deviations of a binomial count.
    assert bool(((actual - expected).abs() <= 4 * expected.sqrt()).all())


def test_resumes_with_the_same_samples() -> None:
    trajectories = data([4, 7, 2])
    sampler = WindowSampler(trajectories, 8, context=3, seed=5)
    first = sampler.sample()
    state = sampler.state_dict()
    expected = [sampler.sample() for _ in range(3)]
    other = WindowSampler(trajectories, 8, context=3, seed=6)
    other.load_state_dict(state)
    for batch in expected:
        assert (other.sample() == batch).all()
    assert not (first == expected[0]).all()
    again = WindowSampler(trajectories, 8, context=3, seed=5)
    assert (again.sample() == first).all()


class TestErrors:
    def test_masked_steps(self) -> None:
        trajectories = data([3, 2])
        trajectories["collector", "mask"] = torch.tensor([True, False, True, True, True])
        with pytest.raises(ValueError, match="some steps are masked"):
            WindowSampler(trajectories)

    def test_state_of_other_settings(self) -> None:
        state = WindowSampler(data([9]), 4, context=3).state_dict()
        with pytest.raises(ValueError, match="context=3, not 5"):
            WindowSampler(data([9]), 4, context=5).load_state_dict(state)
        with pytest.raises(ValueError, match=r"steps=9, not 8"):
            WindowSampler(data([8]), 4, context=3).load_state_dict(state)
