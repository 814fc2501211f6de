"""Where q is the reference, weights are exactly 1 and the loss is exactly SFT's."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.modules import MLP, BatchRenorm1d

from iwsft import (
    EMA,
    ImportanceWeightedMLE,
    ImportanceWeights,
    annotate_reference,
    reweight,
    weights,
)
from iwsft.trajectory import MASK, pad, select

START_CHAINS = {
    "plain": ImportanceWeights(),
    "sum": ImportanceWeights(step=[weights.Temperature(10.0)], reduce="sum"),
    "per-step": ImportanceWeights(step=[weights.ClipRatio(0.2, 1.8)], reduce=None),
    "normalised": ImportanceWeights.authors_control(1.0, normalize=True),
    "target-ess": ImportanceWeights(trajectory=[weights.TargetESS(0.4)]),
    "authors-llm": ImportanceWeights.authors_llm(),
}


@pytest.mark.parametrize("name", START_CHAINS)
@pytest.mark.parametrize("proposal", ["lagged", "current", "cached"])
@pytest.mark.parametrize("functional", [True, False], ids=["functional", "module"])
def test_weights_are_exactly_one_at_the_start(
    make_batch: Any, make_policy: Any, proposal: Any, functional: bool, name: str
) -> None:
    policy = make_policy(hidden=(256, 256, 256))
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 40, (60,), generator=generator)
    data = annotate_reference(policy, make_batch(sizes.tolist()))
    loss = ImportanceWeightedMLE(
        policy, proposal=proposal, functional=functional, importance_weights=START_CHAINS[name]
    )
    if proposal == "lagged":
        EMA(loss, decay=0.9)
    if proposal == "cached":
        reweight(data, loss)
        assert bool((data["importance_weight"] == 1.0).all())
    for _ in range(8):
        chosen = torch.randperm(60, generator=generator)[:12].sort().values
        batch = select(data, chosen)
        assert len(batch) >= 16
        for layout in (batch, pad(batch)):
            out = loss(layout)
            assert out["weight_mean"] == out["weight_max"] == out["ESS"] == 1.0
            if proposal != "cached":
                segments = loss.segments(layout)
                log_weight = loss.terms(layout).log_weight
                assert bool((log_weight[segments.valid].exp() == 1.0).all())


@pytest.mark.parametrize(
    ("proposal", "functional", "compiled"),
    [
        *((proposal, flag, False) for proposal in ("lagged", "cached") for flag in (True, False)),
        *(("current", *flags) for flags in ((True, False), (False, False), (True, True))),
    ],
)
def test_q_is_without_dropout(
    make_batch: Any, make_policy: Any, proposal: Any, functional: bool, compiled: bool
) -> None:
    policy = make_policy(hidden=(32, 32))
    (net,) = [module for module in policy.modules() if isinstance(module, MLP)]
    net.insert(1, nn.Dropout(0.5))
    data = annotate_reference(policy, make_batch([5, 8, 12]))
    loss = ImportanceWeightedMLE(policy, proposal=proposal, functional=functional)
    if proposal == "lagged":
        EMA(loss, decay=0.9)
    if proposal == "cached":
        reweight(data, loss)
    call = torch.compile(loss, fullgraph=True, backend="eager") if compiled else loss
    out = call(data)
    assert out["weight_mean"] == out["weight_max"] == 1.0
    # The gradient is of a policy with dropout.
    assert out["kl_approx"] != 0.0
    assert all(module.training for module in policy.modules())
    torch._dynamo.reset()


class _Centres(nn.Module):
    """A normaliser of the user's own, which follows the mean of the batch in training."""

    def __init__(self, *, replaces: bool = False) -> None:
        super().__init__()
        self.replaces = replaces
        self.register_buffer("mean", torch.zeros(32))

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return 9 * (x - self.mean)
        mean = x.mean(0).detach()
        if self.replaces:
            self.mean = (self.mean + mean) / 2
        else:
            self.mean.lerp_(mean, 0.5)
        return 9 * (x - mean)


@pytest.mark.parametrize("functional", [True, False], ids=["functional", "module"])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchRenorm1d, lambda _: _Centres()])
def test_q_has_running_statistics_where_the_policy_has_those_of_the_batch(
    make_batch: Any, make_policy: Any, functional: bool, norm: Any
) -> None:
    policy = make_policy(hidden=(32, 32))
    (net,) = [module for module in policy.modules() if isinstance(module, MLP)]
    net.insert(1, norm(32))
    data = annotate_reference(policy, make_batch([5, 8, 12]))
    loss = ImportanceWeightedMLE(policy, proposal="current", functional=functional)
    terms = loss.terms(data)
    with loss.network() as q, torch.no_grad():
        log_ratio = q.eval().log_prob(data.copy()) - data["ref_log_prob"]
    assert not torch.allclose(terms.log_prob, log_ratio + data["ref_log_prob"], atol=0.1)
    parts = zip(terms.log_weight.split([5, 8, 12]), log_ratio.split([5, 8, 12]), strict=True)
    for weight, ratio in parts:
        torch.testing.assert_close(weight, ratio.mean().expand_as(weight))


@pytest.mark.parametrize("functional", [True, False], ids=["functional", "module"])
@pytest.mark.parametrize("norm", [nn.BatchNorm1d, BatchRenorm1d])
def test_masked_steps_in_the_statistics_of_a_batch_are_told(
    make_batch: Any, make_policy: Any, functional: bool, norm: Any
) -> None:
    policy, batch = make_policy(hidden=(32, 32)), make_batch()
    (net,) = [module for module in policy.modules() if isinstance(module, MLP)]
    net.insert(1, norm(32))
    loss = ImportanceWeightedMLE(policy, proposal="reference", functional=functional)
    masked = batch.copy().set(MASK, torch.arange(len(batch)) % 5 != 4)
    other = masked.clone()
    other["observation"][~masked[MASK]] += 9.0
    with pytest.warns(UserWarning, match="normalises by the batch, masked steps included"):
        assert loss(masked)["loss_iw_mle"] != loss(other)["loss_iw_mle"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(batch)
        loss(batch.copy().set(MASK, torch.ones(len(batch), dtype=torch.bool)))
        loss(masked[masked[MASK]])
        loss.eval()
        assert loss(masked)["loss_iw_mle"] == loss(other)["loss_iw_mle"]


def test_a_policy_does_not_lose_buffers_that_it_replaces(make_batch: Any, make_policy: Any) -> None:
    """A functional loss would follow them, and the policy that acts would not."""
    policy = make_policy(hidden=(32, 32))
    (net,) = [module for module in policy.modules() if isinstance(module, MLP)]
    net.insert(1, _Centres(replaces=True))
    with pytest.raises(ValueError, match="has replaced a buffer by another.*functional=False"):
        ImportanceWeightedMLE(policy, proposal="reference")(make_batch())
    loss = ImportanceWeightedMLE(policy, proposal="reference", functional=False)
    loss(make_batch())
    assert bool((net[1].mean != 0).any())
    # Without training it replaces none.
    ImportanceWeightedMLE(policy, proposal="reference").eval()(make_batch())


@pytest.mark.parametrize("functional", [True, False], ids=["functional", "module"])
@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("length_normalize", [True, False])
def test_q_at_the_reference_is_sft_bit_for_bit(
    make_batch: Any,
    make_policy: Any,
    gradients: Any,
    functional: bool,
    layout: str,
    length_normalize: bool,
) -> None:
    start = make_policy()
    batch = annotate_reference(start, make_batch([5, 8, 12]))
    batch = batch if layout == "packed" else pad(batch)
    losses = {}
    proposal: Any
    for proposal in ("lagged", "cached", "reference"):
        policy = make_policy()
        losses[proposal] = ImportanceWeightedMLE(
            policy,
            proposal=proposal,
            functional=functional,
            length_normalize=length_normalize,
            importance_weights=ImportanceWeights.authors_control(10.0, normalize=True),
        )
        if proposal == "lagged":
            EMA(losses[proposal], decay=0.9)
        if proposal == "cached":
            reweight(batch, losses[proposal])
        # Theta has moved on, q has not.
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(1.3)
    sft, sft_gradient = losses["reference"](batch), gradients(losses["reference"], batch)
    plain = TensorDict({k: v for k, v in batch.items() if k != "importance_weight"}, batch.shape)
    assert torch.equal(losses["reference"](plain)["loss_iw_mle"], sft["loss_iw_mle"])
    for proposal in ("lagged", "cached"):
        out = losses[proposal](batch)
        assert torch.equal(out["loss_iw_mle"], sft["loss_iw_mle"])
        for name, gradient in gradients(losses[proposal], batch).items():
            assert torch.equal(gradient, sft_gradient[name]), name


@pytest.mark.parametrize("size", [2, 3, 7, 100, 1001])
def test_equal_weights_become_exactly_1_whatever_the_shares(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    share = torch.rand(size, generator=generator, dtype=torch.float64)
    for transform in (weights.SelfNormalize(), weights.TargetESS(0.5)):
        for log_weight in (torch.zeros(size), torch.full((size,), 0.1, dtype=torch.float64)):
            assert transform(log_weight, share).tolist() == [0.0] * size
