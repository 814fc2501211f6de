"""Data weights: a float a step, outside the importance weight; against plain loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict

from iwsft import EMA, ImportanceWeightedMLE, ImportanceWeights, weights
from iwsft.trajectory import DATA_WEIGHT, MASK, MULTIPLICITY, TRAJ_IDS, pad
from iwsft.validation import validate

# Bounded by 1, and 0 where q leaves the trajectory.
SAFE = ImportanceWeights(step=[weights.Temperature(2.0)], trajectory=[weights.ClipWeight(max=1.0)])
PER_STEP = ImportanceWeights(step=[weights.ClipRatio(max=1.0)], reduce=None)


def weighted(batch: TensorDict, values: Any) -> TensorDict:
    return batch.copy().set(DATA_WEIGHT, torch.as_tensor(values).expand(len(batch)).clone())


def signed(batch: TensorDict) -> TensorDict:
    return weighted(batch, torch.randn(len(batch), generator=torch.Generator().manual_seed(5)))


def loop(loss: Any, batch: TensorDict, *, normalize: bool) -> torch.Tensor:
    """The formula, a trajectory and a step at a time."""
    total, divisor = torch.zeros(()), 0.0
    terms = loss.terms(batch.exclude(DATA_WEIGHT))
    for j in batch[TRAJ_IDS].unique():
        steps = (batch[TRAJ_IDS] == j).nonzero().squeeze(1).tolist()
        m = int(batch[MULTIPLICITY][steps[0]])
        for i in steps:
            d, w = float(batch[DATA_WEIGHT][i]), float(terms.log_weight[i].exp())
            total = total - m * w * d * terms.log_prob[i] / len(steps)
            divisor += m * abs(d) / len(steps) if normalize else m / len(steps)
    return total / divisor


@pytest.mark.parametrize("chain", [SAFE, PER_STEP], ids=["trajectory", "step"])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_loss_and_gradient_are_those_of_a_loop(
    make_batch: Any, make_policy: Any, chain: Any, normalize: bool, padded: bool
) -> None:
    batch = signed(make_batch(dtype=torch.float64))
    loss = ImportanceWeightedMLE(
        make_policy(dtype=torch.float64),
        importance_weights=chain,
        proposal="current",
        normalize_data_weights=normalize,
    )
    given = batch
    if padded:
        given = pad(batch)
        given[DATA_WEIGHT][~given[MASK]] = torch.nan
    ours, plain = loss(given)["loss_iw_mle"], loop(loss, batch, normalize=normalize)
    leaves = list(loss.actor_network_params.values(True, True))
    for a, b in zip(
        [ours, *torch.autograd.grad(ours, leaves)],
        [plain, *torch.autograd.grad(plain, leaves)],
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, check_dtype=False)


@pytest.mark.parametrize("proposal", ["current", "lagged", "cached"])
def test_ones_change_no_bit_and_no_weight_changes_a_diagnostic(ready: Any, proposal: Any) -> None:
    loss, batch = ready(proposal, importance_weights=SAFE)
    plain = loss(batch)
    opposite = weighted(batch, -signed(batch)[DATA_WEIGHT])
    ones, of_signed, of_opposite = map(loss, (weighted(batch, 1.0), signed(batch), opposite))
    assert torch.equal(of_signed.pop("loss_iw_mle"), -of_opposite.pop("loss_iw_mle"))
    for other in (ones, of_signed, of_opposite):
        for key, value in other.items():
            torch.testing.assert_close(value, plain[key], rtol=0, atol=0, equal_nan=True, msg=key)


def test_opposite_signs_give_opposite_gradients(ready: Any, gradients: Any) -> None:
    loss, batch = ready("lagged", importance_weights=SAFE)
    batch = signed(batch)
    opposite = gradients(loss, weighted(batch, -batch[DATA_WEIGHT]))
    for name, gradient in gradients(loss, batch).items():
        assert torch.equal(gradient, -opposite[name]), name


def test_a_whole_number_is_that_many_copies(ready: Any, make_batch: Any) -> None:
    """In the sum; and in the mean, if it is divided by the data weights."""
    batch = make_batch(multiplicity=False)
    number = torch.tensor([3, 1, 0, 2])[batch[TRAJ_IDS]]
    copies = batch.copy().set(MULTIPLICITY, number)
    for settings in ({"reduction": "sum"}, {"normalize_data_weights": True}):
        loss, _ = ready("lagged", importance_weights=SAFE, **settings)
        ours, truth = (loss(x)["loss_iw_mle"] for x in (weighted(batch, number.float()), copies))
        torch.testing.assert_close(ours, truth)
    # The plain mean is divided by the 4 rows, not by the 6 copies.
    loss, _ = ready("lagged", importance_weights=SAFE)
    ours, truth = (loss(x)["loss_iw_mle"] for x in (weighted(batch, number.float()), copies))
    torch.testing.assert_close(4 * ours, 6 * truth)


def test_a_batch_of_zeros_has_loss_zero(ready: Any) -> None:
    for normalize in (False, True):
        loss, batch = ready("reference", normalize_data_weights=normalize)
        assert loss(weighted(batch, 0.0))["loss_iw_mle"] == 0


@pytest.mark.parametrize(
    ("proposal", "chain", "refused"),
    [
        ("reference", SAFE, True),
        ("current", SAFE, False),
        ("lagged", PER_STEP, False),
        ("lagged", ImportanceWeights(), True),
        ("lagged", ImportanceWeights.authors_llm(), False),
        ("lagged", ImportanceWeights.authors_control(1.0, normalize=True), True),
        ("lagged", ImportanceWeights.paper_llm(), True),
        ("lagged", ImportanceWeights([weights.Temperature(0.0)]), True),
        ("lagged", ImportanceWeights([weights.ClipRatio(0.2, 1.8)]), True),
    ],
)
def test_negative_weights_need_importance_weights_that_vanish(
    make_loss: Any, make_batch: Any, proposal: str, chain: Any, refused: bool
) -> None:
    loss, batch = make_loss(proposal, importance_weights=chain), make_batch()
    if proposal == "lagged":
        EMA(loss, decay=0.9)
    loss(weighted(batch, 0.5))
    if not refused:
        loss(signed(batch))
        return
    with pytest.raises(ValueError, match="'data_weight' is negative, .* has no lower bound"):
        loss(signed(batch))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_bad_weights_are_named(ready: Any, bad: float) -> None:
    loss, batch = ready("current", importance_weights=SAFE)
    batch = weighted(batch, 1.0)
    batch[DATA_WEIGHT][4] = bad
    with pytest.raises(ValueError, match="'data_weight' is NaN or infinite"):
        loss(batch)
    with pytest.raises(ValueError, match=r"'data_weight' is NaN, infinite .* first \[4\]"):
        validate(batch)
    with pytest.raises(ValueError, match="'data_weight' is 0 everywhere"):
        validate(weighted(batch, 0.0))
    # What does not count may be anything.
    assert loss(batch.set(MULTIPLICITY, (batch[TRAJ_IDS] > 0).long()))["loss_iw_mle"].isfinite()
    batch.set(DATA_WEIGHT, torch.ones(len(batch), 2))
    with pytest.raises(ValueError, match=r"'data_weight' has shape \[18, 2\]"):
        loss(batch)


@pytest.mark.parametrize("name", ["priority_weight", "data_weights", "weight", "weights"])
def test_weights_of_another_name_are_read_or_refused(
    make_loss: Any, make_batch: Any, name: str
) -> None:
    """Such as those that undo a buffer's priorities, as TorchRL's losses do."""
    loss, batch = make_loss("reference"), make_batch()
    expected = loss(batch)["loss_iw_mle"]
    batch[name] = torch.ones(len(batch))
    assert loss(batch)["loss_iw_mle"] == expected
    batch[name][3:] = 0.5
    with pytest.raises(ValueError, match=f"does not read the '{name}' .*data_weight="):
        loss(batch)
    assert loss(batch.exclude(name))["loss_iw_mle"] == expected
    loss.set_keys(data_weight=name)
    found, terms = loss(batch)["loss_iw_mle"], loss.terms(batch)
    total = (terms.share * terms.log_prob * batch[name]).sum()
    torch.testing.assert_close(found, (-total / terms.share.sum()).float())
    # Beside their own key they are where it came from; padding is 0.
    loss.set_keys(data_weight=DATA_WEIGHT)
    if name != "priority_weight":
        assert loss(weighted(batch, torch.ones(len(batch))))["loss_iw_mle"] == expected
    batch[name][:] = 1.0
    torch.testing.assert_close(loss(pad(batch))["loss_iw_mle"], expected)
