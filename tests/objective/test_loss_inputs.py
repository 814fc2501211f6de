"""Inputs of the loss: masks, layouts, policies of all kinds, and wrong input."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase, pad_sequence
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import nn
from torchrl.modules import IndependentNormal, OneHotCategorical, ProbabilisticActor, TanhNormal
from torchrl.objectives import SoftUpdate

from iwsft import EMA, ImportanceWeightedMLE, ImportanceWeights, reweight, weights
from iwsft.trajectory import MASK, TRAJ_IDS, pad, select

PROPOSALS = ("current", "reference", "lagged", "cached")
every_proposal = pytest.mark.parametrize("proposal", PROPOSALS)
both_modes = pytest.mark.parametrize("functional", [True, False], ids=["functional", "module"])


@every_proposal
@pytest.mark.parametrize("trailing", [False, True])
def test_mask_key_auto_named_and_none(
    ready: Any, proposal: str, trailing: bool, assert_near: Any, assert_same: Any
) -> None:
    loss, packed = ready(proposal)
    expected = loss(packed)
    padded = pad(packed)
    mask = padded[MASK].unsqueeze(-1) if trailing else padded[MASK]
    padded.set(MASK, mask)
    assert_near(loss(padded), expected)
    # Every mask that TorchRL writes counts; the last step of the first trajectory goes.
    shifted = torch.ones_like(padded[MASK].squeeze(-1) if trailing else padded[MASK])
    shifted[0, 4] = False
    shorter = loss(padded.copy().set("shifted_valid", shifted))
    assert shorter["loss_iw_mle"] != expected["loss_iw_mle"]
    both = mask & (shifted.unsqueeze(-1) if trailing else shifted)
    assert_near(shorter, loss(padded.copy().set(MASK, both)))
    named = padded.exclude(MASK).set(("my", "mask"), mask)
    loss.loss_mask_key = ("my", "mask")
    assert_near(loss(named), expected)
    loss.loss_mask_key = None
    # The padding of multiplicities is 0, which is not that of the trajectory.
    with pytest.raises(ValueError, match="'multiplicity' changes within a trajectory"):
        loss(padded)
    # And a reference of 0 is none.
    given = padded["ref_log_prob"].where(padded["ref_log_prob"] != 0, -1.0)
    padded = padded.exclude("multiplicity").set("ref_log_prob", given)
    everything = loss(padded)
    assert_same(everything, loss(padded.exclude(MASK)))
    assert everything["loss_iw_mle"] != expected["loss_iw_mle"]


def test_a_mask_of_the_steps_that_is_not_read_is_refused(ready: Any, assert_near: Any) -> None:
    """``tensordict.pad_sequence`` names masks otherwise than TorchRL, and padding would count."""
    loss, packed = ready("current")
    parts = [select(packed, torch.tensor([i])).exclude(TRAJ_IDS) for i in range(4)]
    padded = pad_sequence(parts, return_mask=True)
    with pytest.raises(ValueError, match="does not read: set loss.loss_mask_key = .'masks', '"):
        loss(padded)
    with pytest.raises(TypeError, match="mask is a TensorDict, and must be a tensor"):
        loss(pad_sequence(parts, return_mask=MASK))
    mask = padded["masks", "observation"]
    plain = padded.exclude("masks")
    for dtype, name in itertools.product(
        (torch.bool, torch.float32), ("mask", "attention_mask", "valid")
    ):
        with pytest.raises(ValueError, match=f"loss_mask_key = '{name}'"):
            loss(plain.copy().set(name, mask.to(dtype)))
    for name in ("pad_mask", "padding_mask", "action_is_pad"):
        with pytest.raises(ValueError, match=f"'mask'.* to the steps that count: ~{name}"):
            loss(plain.copy().set(name, ~mask))
    loss.loss_mask_key = ("masks", "observation")
    assert_near(loss(padded), loss(packed))
    loss.loss_mask_key = "auto"
    assert_near(loss(padded.set(MASK, mask)), loss(packed))
    # A mask of possible actions is none of steps.
    assert_near(loss(packed.copy().set("mask", torch.ones(18, 2, dtype=torch.bool))), loss(packed))


def test_nan_in_the_padding_of_nested_entries_does_not_leak() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def log_prob(self, trajectories: TensorDictBase) -> torch.Tensor:
            return self.scale * trajectories["my", "entry"]

    batch = TensorDict({"my": {"entry": torch.tensor([[1.0, torch.nan]])}}, [1, 2])
    batch.set(MASK, torch.tensor([[True, False]]))
    policy = Nested()
    ImportanceWeightedMLE(policy, proposal="reference", functional=False)(batch)[
        "loss_iw_mle"
    ].backward()
    assert policy.scale.grad == -1.0


@pytest.mark.parametrize("key", ["arm", ("action", "arm")])
def test_nan_in_the_padding_of_the_actions_of_an_actor_does_not_leak(key: Any) -> None:
    """Its actions are where the actor says, whatever the keys of the loss are."""
    actor = ProbabilisticActor(
        TensorDictModule(NormalParamExtractor(), ["observation"], ["loc", "scale"]),
        in_keys=["loc", "scale"],
        out_keys=[key],
        distribution_class=IndependentNormal,
    )
    loss = ImportanceWeightedMLE(actor, proposal="reference")
    observation = torch.ones(1, 2, 4, requires_grad=True)
    batch = TensorDict({"observation": observation, key: torch.zeros(1, 2, 2)}, [1, 2])
    batch[key][0, 1] = torch.nan
    batch[MASK] = torch.tensor([[True, False]])
    loss(batch)["loss_iw_mle"].backward()
    assert observation.grad is not None and bool(observation.grad.isfinite().all())


@pytest.mark.parametrize("noise", [0.0, 0.5])
@every_proposal
def test_how_often_the_policy_runs(make_batch: Any, proposal: Any, noise: float) -> None:
    """Once with a gradient; again without one where q is another policy, or where it has noise."""
    gradients = []

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 1), nn.Dropout(noise))

        def log_prob(self, batch: TensorDictBase) -> torch.Tensor:
            gradients.append(torch.is_grad_enabled())
            return self.layers(batch["observation"]).squeeze(-1)

    loss = ImportanceWeightedMLE(Noisy(), proposal=proposal)
    batch = make_batch().set("importance_weight", torch.ones(18))
    again = proposal == "lagged" or (proposal == "current" and noise > 0)
    if proposal == "lagged":
        EMA(loss, decay=0.5)
    loss(batch)  # the first call also compares trajectories
    gradients.clear()
    out = loss(batch)
    assert gradients == [True, False][: 1 + again]
    assert (out["weight_max"] == 1.0) == (proposal in ("reference", "cached"))


def test_padding_is_not_the_largest_weight(make_loss: Any, make_batch: Any) -> None:
    loss, batch = make_loss("current", importance_weights=None), make_batch()
    batch["ref_log_prob"] += 5.0
    out, padded = loss(batch), loss(pad(batch))
    assert 0.0 < out["weight_max"] < 1.0
    torch.testing.assert_close(padded["weight_max"], out["weight_max"])


def test_weigh_reads_what_it_is_not_given(ready: Any) -> None:
    loss, packed = ready("current")
    assert ImportanceWeightedMLE(loss.actor_network, proposal="current").functional
    for batch in (packed, pad(packed)):
        terms = loss.terms(batch)
        weighed = loss.weigh(batch, terms.log_prob.detach())
        assert torch.equal(weighed.log_weight, terms.log_weight)
        assert torch.equal(weighed.clipped, terms.clipped)
        assert bool((weighed.log_weight[~loss.segments(batch).valid] == 0).all())


def test_weights_of_a_q_held_elsewhere_are_read(make_loss: Any, make_batch: Any) -> None:
    batch = make_batch().set("importance_weight", torch.full((18,), 2.0))
    assert make_loss("lagged", hold_q=False)(batch)["weight_mean"] == 2.0
    assert make_loss("current", hold_q=False)(batch)["weight_mean"] != 2.0


@every_proposal
@both_modes
@pytest.mark.parametrize("batch_dims", [1, 2])
def test_nan_in_the_padding_does_not_leak(
    ready: Any, proposal: str, functional: bool, batch_dims: int, assert_near: Any
) -> None:
    loss, packed = ready(proposal, functional)
    expected = loss(packed)
    expected["loss_iw_mle"].backward()
    wanted = [parameter.grad.clone() for parameter in loss.parameters()]
    loss.zero_grad()
    padded = pad(packed, length=11)
    for key in padded.keys(True, True):
        if padded.get(key).is_floating_point():
            padded.get(key)[~padded[MASK]] = torch.nan
    padded.batch_size = padded.batch_size[:batch_dims]
    out = loss(padded)
    assert_near(out, expected)
    out["loss_iw_mle"].backward()
    for parameter, gradient in zip(loss.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("with_ids", [True, False])
def test_padded_batch_of_single_steps(
    ready: Any, make_batch: Any, with_ids: bool, assert_near: Any
) -> None:
    loss, _ = ready("lagged")
    packed = make_batch([1] * 6)
    padded = pad(packed)
    padded = padded if with_ids else padded.exclude(TRAJ_IDS)
    assert padded.batch_size == (6, 1)
    assert_near(loss(padded), loss(packed))


def test_padded_batch_without_ids_or_mask(ready: Any, make_batch: Any, assert_near: Any) -> None:
    loss, _ = ready("lagged")
    packed = make_batch([4, 4, 4])
    rows = packed.exclude(TRAJ_IDS).reshape(3, 4)
    assert_near(loss(rows), loss(packed))


def _gaussian_actor(distribution: type, **settings: Any) -> ProbabilisticActor:
    net = TensorDictModule(
        nn.Sequential(nn.Linear(3, 4), NormalParamExtractor()),
        in_keys=["observation"],
        out_keys=["loc", "scale"],
    )
    return ProbabilisticActor(
        net, in_keys=["loc", "scale"], distribution_class=distribution, **settings
    )


def _discrete_actor() -> ProbabilisticActor:
    net = TensorDictModule(nn.Linear(3, 2), in_keys=["observation"], out_keys=["logits"])
    return ProbabilisticActor(net, in_keys=["logits"], distribution_class=OneHotCategorical)


class _Plain(nn.Module):
    """Not a TensorDict module at all."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def log_prob(self, trajectories: TensorDictBase) -> torch.Tensor:
        error = trajectories["action"] - self.layer(trajectories["observation"])
        return -error.square().sum(-1)


@both_modes
@pytest.mark.parametrize(
    "build",
    [
        lambda: _gaussian_actor(TanhNormal),
        lambda: _gaussian_actor(IndependentNormal, return_log_prob=True),
        _discrete_actor,
        _Plain,
    ],
    ids=["tanh-normal", "returns-log-prob", "one-hot", "plain-module"],
)
def test_policies_are_taken_unchanged(
    make_loss: Any,
    make_batch: Any,
    build: Any,
    functional: bool,
    assert_near: Any,
    assert_same: Any,
) -> None:
    policy, batch = build(), make_batch()
    loss = make_loss("lagged", functional, policy=policy)
    SoftUpdate(loss, tau=0.1) if functional else EMA(loss, decay=0.9)
    if "logits" in getattr(policy, "out_keys", ()):
        batch["action"] = (batch["action"] == batch["action"].amax(-1, keepdim=True)).float()
    before = batch.clone()
    batch["ref_log_prob"] = policy.log_prob(batch.copy()).detach()
    out = loss(batch)
    assert out["weight_max"] == 1
    assert_near(out, loss(pad(batch)))
    out["loss_iw_mle"].backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in policy.parameters())
    assert_same(batch.exclude("ref_log_prob"), before.exclude("ref_log_prob"))


def test_wrong_input_is_named(ready: Any) -> None:
    loss, batch = ready("lagged")
    with pytest.raises(KeyError, match="annotate_reference"):
        loss(batch.exclude("ref_log_prob"))
    with pytest.raises(KeyError, match="traj_ids.*is missing.* ids, for each step the number of"):
        loss(batch.exclude(TRAJ_IDS))
    with pytest.raises(ValueError, match="out of order at step 1.* single steps by .*StepSampler"):
        loss(batch.clone().set(TRAJ_IDS, torch.arange(18, 0, -1)))
    with pytest.raises(ValueError, match="out of order at step 18.* iwsft.curation.join"):
        loss(torch.cat([batch, batch]))
    with pytest.raises(ValueError, match="'ref_log_prob' has shape"):
        loss(batch.clone().set("ref_log_prob", torch.zeros(18, 3)))
    cached, batch = ready("cached")
    with pytest.raises(KeyError, match="reweight"):
        cached(batch.exclude("importance_weight"))
    padded = pad(batch)
    padded[MASK][1] = False
    with pytest.raises(ValueError, match="trajectory 1 .* every step masked"):
        cached(padded)
    wide = _gaussian_actor(torch.distributions.Normal)
    with pytest.raises(ValueError, match="IndependentNormal"):
        ImportanceWeightedMLE(wide, proposal="reference")(batch)


@every_proposal
@pytest.mark.parametrize("chain", [None, ImportanceWeights([weights.Temperature(2.0)], None)])
def test_multiplicity_zero_does_not_count_however_extreme(
    ready: Any, gradients: Any, proposal: str, chain: Any, assert_near: Any
) -> None:
    """The weight of the third trajectory is beyond float32."""
    loss, batch = ready(proposal, importance_weights=chain)
    counted = select(batch, torch.tensor([0, 1, 3]))
    third = batch[TRAJ_IDS] == 2
    batch["multiplicity"][third] = 0
    batch["ref_log_prob"][third] = -1e4
    if proposal == "cached":
        reweight(batch, loss)
        assert bool((batch["importance_weight"][third] == 1).all())
        batch["importance_weight"][third] = torch.inf
    assert_near(loss(batch), loss(counted))
    for mine, other in zip(*(gradients(loss, x).values() for x in (batch, counted)), strict=True):
        torch.testing.assert_close(mine, other)
    batch["multiplicity"].zero_()
    with pytest.raises(ValueError, match="every trajectory of the batch has multiplicity 0"):
        loss(batch)


def test_masks_of_numbers_are_masks(ready: Any, assert_near: Any) -> None:
    """Of bytes, whose bits do not overlap, and of floats."""
    loss, packed = ready("current")
    padded = pad(packed)
    expected = loss(padded)
    for number in (torch.tensor(2, dtype=torch.uint8), torch.tensor(0.5)):
        numbers = padded.clone().set(MASK, number * padded[MASK])
        numbers.set("shifted_valid", torch.ones_like(padded[MASK], dtype=torch.uint8))
        assert_near(loss(numbers), expected)


def test_weights_carry_no_gradient_when_they_are_asked_for(make_loss: Any, make_batch: Any) -> None:
    loss, batch = make_loss("current"), make_batch()
    log_q = loss.log_prob(batch)
    assert log_q.requires_grad and not loss.weigh(batch, log_q).log_weight.requires_grad


@every_proposal
def test_an_empty_batch_is_refused(ready: Any, proposal: str) -> None:
    loss, batch = ready(proposal)
    for empty in (batch[:0], pad(batch)[:0], pad(batch)[:, :0]):
        with pytest.raises(ValueError, match="not a single step"):
            loss(empty)


def test_overflow_is_one_clear_error(make_loss: Any, make_batch: Any) -> None:
    loss = make_loss("current", importance_weights=None)
    batch = make_batch()
    batch["ref_log_prob"] -= 200.0
    with pytest.raises(OverflowError, match="ClipWeight"):
        loss(batch)
    # Where no weight of a batch is left, there is no mean to divide by.
    none_left = [weights.MaskRatio(max=1e-30)]
    chain = ImportanceWeights(step=none_left, reduce=None, trajectory=[weights.SelfNormalize()])
    with pytest.raises(FloatingPointError, match="are NaN.* and for a batch with all weights 0"):
        make_loss("current", importance_weights=chain)(batch)


class Written(nn.Module):
    """A policy whose log-probs are written in the batch."""

    def log_prob(self, batch: TensorDictBase) -> torch.Tensor:
        return batch["log_prob"]


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("reduce", ["mean", None])
def test_a_step_that_policy_and_q_exclude_is_an_error(
    make_batch: Any, reduce: Any, reduction: Any
) -> None:
    """The product of log p = -inf and the weight 0 is NaN; where the weight is not 0, it is inf."""
    batch = make_batch(multiplicity=False)
    batch["log_prob"] = torch.linspace(-3.0, -1.0, len(batch))
    batch["log_prob"][7] = -torch.inf
    chain = ImportanceWeights(reduce=reduce)
    loss = ImportanceWeightedMLE(
        Written(),
        proposal="current",
        functional=False,
        reduction=reduction,
        importance_weights=chain,
    )
    for layout in (batch, pad(batch)):
        with pytest.raises(FloatingPointError, match="-inf at a step of trajectory 2 of the batch"):
            loss(layout)
    below = ImportanceWeights([weights.ClipRatio(0.1, 10.0)], reduce)
    loss.importance_weights = below
    assert float(loss(batch)["loss_iw_mle"].sum()) == torch.inf
    loss.importance_weights = chain
    batch["log_prob"][7] = -1e4
    assert bool(loss(batch)["loss_iw_mle"].isfinite().all())
    batch["log_prob"][7] = -torch.inf
    batch["multiplicity"] = (batch[TRAJ_IDS] != 2).long()
    assert bool(loss(batch)["loss_iw_mle"].isfinite().all())


def test_slices_of_one_trajectory_are_not_joined(make_loss: Any) -> None:
    """As SliceSampler returns them with truncated_key=None."""
    x = torch.randn(13, 3)
    data = TensorDict({"observation": x[:-1], ("next", "observation"): x[1:]}, [12])
    data["action"], data["ref_log_prob"] = torch.rand(12, 2), -torch.rand(12)
    data[TRAJ_IDS] = torch.zeros(12, dtype=torch.int64)
    loss = make_loss("current", importance_weights=ImportanceWeights())
    apart = torch.cat([data[1:4], data[6:10]])
    with pytest.raises(ValueError, match="step 3 does not begin where step 2 .* ends"):
        loss(apart)
    ended = apart.clone().set(("next", "done"), torch.arange(7)[:, None] == 2)
    halves = [loss(data[1:4])["loss_iw_mle"], loss(data[6:10])["loss_iw_mle"]]
    torch.testing.assert_close(loss(ended)["loss_iw_mle"], sum(halves) / 2)
    whole = torch.cat([data[1:4], data[4:8]])
    torch.testing.assert_close(loss(whole)["loss_iw_mle"], loss(data[1:8])["loss_iw_mle"])
