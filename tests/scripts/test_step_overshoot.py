"""What weights of single steps do, where the truth is known."""

from __future__ import annotations

import math

import pytest
import torch

from iwsft import GaussianPolicy, ImportanceWeightedMLE, ImportanceWeights, annotate_reference
from iwsft.trajectory import from_steps
from scripts.step_overshoot import inherited, overshoot, spread

STEPS, STD = 200_000, 0.25


def policy_of(mean: float) -> GaussianPolicy:
    """A policy with the same mean in every state."""
    policy = GaussianPolicy(1, 1, hidden=(), log_std_init=math.log(STD))
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.dim() == 2:
                parameter.zero_()
            elif not parameter.allclose(torch.tensor(math.log(STD))):
                parameter.fill_(math.atanh(mean))
    return policy


@pytest.mark.parametrize(("before", "fitted"), [(-0.1, 0.1), (0.2, 0.1), (0.1, 0.1)])
def test_weights_of_single_steps_move_a_fit_by_as_much_as_it_left_the_reference(
    before: float, fitted: float
) -> None:
    """With one std the data N(f), times q / pi_ref = N(f) / N(b), are N(f + (f - b))."""
    noise = torch.randn(STEPS, 1, generator=torch.Generator().manual_seed(0))
    steps = {"observation": torch.zeros(STEPS, 1), "action": fitted + STD * noise}
    data = from_steps(steps, torch.arange(STEPS))
    annotate_reference(policy_of(before), data)
    loss = ImportanceWeightedMLE(
        policy_of(fitted), importance_weights=ImportanceWeights(reduce=None), proposal="current"
    )
    weight = loss.terms(data).log_weight.detach().exp().flatten()
    mean = (weight * data["action"].flatten()).sum() / weight.sum()
    assert float(mean) == pytest.approx(2 * fitted - before, abs=4e-3)


def test_overshoot_is_the_share_of_the_way_by_which_the_weighted_policy_goes_further() -> None:
    generator = torch.Generator().manual_seed(0)
    before, fitted = torch.randn(2, 100, 3, generator=generator)
    assert overshoot(before, fitted, fitted + 0.3 * (fitted - before)) == pytest.approx(0.3)
    assert overshoot(before, fitted, before) == pytest.approx(-1)


def test_spread_is_the_variance_over_seeds() -> None:
    generator = torch.Generator().manual_seed(0)
    common, own = torch.randn(50, 4, generator=generator), torch.randn(9, 1, 1, generator=generator)
    assert spread(common + own) == pytest.approx(float(own.flatten().var()), rel=1e-4)


def test_inherited_is_the_share_of_the_references_own_errors() -> None:
    generator = torch.Generator().manual_seed(0)
    errors, common = torch.randn(2, 9, 100, generator=generator)
    common = common[:1]
    # A policy that averages a third of them in, and one that mirrors them.
    third = [1 / 3] * 9
    assert inherited(common + errors, 2 * common + errors / 3) == pytest.approx(third, abs=1e-5)
    assert inherited(common + errors, -0.7 * errors) == pytest.approx([-0.7] * 9, abs=1e-5)
