"""Acting with policies: rows, one call for all environments, checks, modes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import Tensor, nn
from torchrl.envs.utils import ExplorationType, exploration_type

from iwsft.acting import ROWS, PolicyInputs, act, acting, check_keys, check_sizes
from iwsft.policies.gaussian import GaussianPolicy


def reading(function: object, *keys: str) -> TensorDictModule:
    return TensorDictModule(function, in_keys=list(keys), out_keys=["action"])


@pytest.mark.parametrize(("episodes", "rows"), [(1, 32), (32, 32), (33, 64), (100, 128)])
def test_rows_are_a_multiple_and_begin_idle(episodes: int, rows: int) -> None:
    inputs = PolicyInputs(episodes, 4)
    assert inputs.observation.shape == (rows, 4)
    assert inputs.first.shape == inputs.reward.shape == (rows, 1)
    assert inputs.first.all()
    assert not inputs.reward.any()


def test_a_row_through_two_episodes() -> None:
    """What the policy reads of one row, call by call; the others stay as they were."""
    policy = reading(
        lambda o, first, reward: torch.cat([o, first.float(), reward], 1),
        "observation",
        "is_init",
        "reward",
    )
    inputs = PolicyInputs(2, 1)
    read = []

    def call() -> None:
        actions = act(policy, inputs)
        read.append(actions[1].tolist())
        assert (np.delete(actions, 1, 0) == [0.0, 1.0, 0.0]).all()

    inputs.begin(1, [5.0], "one")
    call()
    inputs.follow(1, [6.0], 0.5)
    call()
    inputs.follow(1, np.array([7.0]), -2.0)
    call()
    inputs.begin(1, [8.0], "two")
    call()
    inputs.follow(1, [9.0], 1.5)
    inputs.end(1)
    call()
    expected = [[5.0, 1.0, 0.0], [6.0, 0.0, 0.5], [7.0, 0.0, -2.0], [8.0, 1.0, 0.0]]
    assert read[:-1] == expected
    assert read[-1][1:] == [1.0, 0.0]


def test_not_finite_names_policy_step_and_episode() -> None:
    policy = reading(lambda o: torch.where(o > 1, torch.inf, o), "observation")
    inputs = PolicyInputs(3, 2)
    inputs.begin(0, [0.0, 0.0], "episode A")
    inputs.begin(2, [0.0, 0.0], "episode B")
    act(policy, inputs)
    for value in (0.5, 2.0):
        inputs.follow(0, [0.0, 0.0], 0.0)
        inputs.follow(2, [0.0, value], 0.0)
        if value < 1:
            act(policy, inputs)
    with pytest.raises(FloatingPointError, match=r"^mine gave .*inf\] at step 2 of episode B$"):
        act(policy, inputs, name="mine")
    inputs.end(2)
    assert np.isinf(act(policy, inputs)[2, 1])  # a row without an episode does not matter
    inputs.begin(2, [0.0, 3.0], "episode C")
    with pytest.raises(FloatingPointError, match=r"at step 0 of episode C$"):
        act(policy, inputs)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (torch.float16, np.float32),
        (torch.bfloat16, np.float32),
        (torch.float32, np.float32),
        (torch.float64, np.float64),
    ],
)
def test_precision_of_actions(given: torch.dtype, expected: type) -> None:
    third = torch.tensor(1 / 3, dtype=given)
    actions = act(reading(lambda o: third.expand(len(o), 1), "observation"), PolicyInputs(1, 1))
    assert actions.dtype == expected
    assert (actions == third.item()).all()


def test_sampled_or_mean_actions() -> None:
    torch.manual_seed(0)
    policy, inputs = GaussianPolicy(4, 2), PolicyInputs(1, 4)
    with acting(policy):
        means = act(policy, inputs)
        assert (act(policy, inputs) == means).all()
    with acting(policy, ExplorationType.RANDOM):
        torch.manual_seed(1)
        drawn = act(policy, inputs)
        torch.manual_seed(1)
        assert (act(policy, inputs) == drawn).all()
        assert (act(policy, inputs) != drawn).all()
    assert (drawn != means).all()


def test_everything_is_put_back_after_an_error() -> None:
    policy = reading(nn.Sequential(nn.Dropout(), nn.Dropout().eval()), "observation")
    before = [module.training for module in policy.modules()], exploration_type()
    with pytest.raises(KeyError), acting(policy, ExplorationType.RANDOM):
        assert not any(module.training for module in policy.modules())
        assert not torch.is_grad_enabled()
        assert exploration_type() == ExplorationType.RANDOM
        raise KeyError
    assert before == ([module.training for module in policy.modules()], exploration_type())
    assert torch.is_grad_enabled()


def test_sizes_are_checked_in_one_call_of_first_steps() -> None:
    calls = []

    def policy(observation: Tensor, first: Tensor, reward: Tensor) -> Tensor:
        calls.append(observation)
        assert first.all()
        assert not reward.any()
        return torch.full((len(observation), 2), torch.nan)  # no episode runs: no matter

    one = np.array([1.0, 2.0, 3.0])
    module = reading(policy, "observation", "is_init", "reward")
    check_sizes(module, one, (2,), "Mine-v0")
    assert len(calls) == 1
    assert torch.equal(calls[0], torch.tensor([1.0, 2.0, 3.0]).expand(ROWS, 3))
    with pytest.raises(ValueError, match=r"^it gives actions of shape \(2,\), Mine-v0 takes \(1,"):
        check_sizes(module, one, (1,), "Mine-v0", name="it")
    with pytest.raises(ValueError, match=r"^it cannot act on Mine-v0, whose .* size 3"):
        check_sizes(GaussianPolicy(4, 2), one, (2,), "Mine-v0", name="it")


def test_what_is_no_tensordict_module_is_named_with_the_way_to_make_it_one() -> None:
    network = nn.Linear(3, 2)
    with pytest.raises(TypeError, match=r"the policy is a Linear, .*TensorDictModule\(policy, \["):
        check_keys(network)  # type: ignore[arg-type]
    check_keys(TensorDictModule(network, ["observation"], ["action"]))
