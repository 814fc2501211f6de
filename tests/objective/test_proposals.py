"""How q follows theta: our updaters and TorchRL's, against loops written by hand."""

from __future__ import annotations

import io
import warnings
from copy import deepcopy
from typing import Any

import pytest
import torch
from tensordict.nn import NormalParamExtractor, TensorDictModule
from torch import Tensor, nn
from torchrl.modules import IndependentNormal, ProbabilisticActor
from torchrl.objectives import HardUpdate, SoftUpdate
from torchrl.objectives.utils import TargetNetUpdater

from iwsft import (
    EMA,
    HardSync,
    ImportanceWeightedMLE,
    ImportanceWeights,
    annotate_reference,
    reweight,
    weights,
)
from iwsft.proposals import write_weights
from iwsft.samplers import StepSampler
from iwsft.training import Schedule, fit
from iwsft.trajectory import MASK, pad

both_modes = pytest.mark.parametrize("functional", [True, False], ids=["functional", "module"])


def thetas(loss: ImportanceWeightedMLE) -> list[Tensor]:
    state = loss.state_dict()
    return [state[k].clone() for k in sorted(state) if not k.startswith("target_")]


def qs(loss: ImportanceWeightedMLE) -> list[Tensor]:
    state = loss.state_dict()
    return [state[k].clone() for k in sorted(state) if k.startswith("target_")]


def nudge(loss: ImportanceWeightedMLE, seed: int) -> None:
    """An update of theta, as an optimizer makes it: in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def assert_equal(a: list[Tensor], b: list[Tensor]) -> None:
    assert len(a) == len(b) > 0
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_written_weights_carry_no_gradient(make_loss: Any, make_batch: Any) -> None:
    loss, batch = make_loss("cached"), make_batch()
    log_q = batch["ref_log_prob"].clone().requires_grad_()
    assert not write_weights(batch, loss, log_q).log_weight.requires_grad
    assert not batch["importance_weight"].requires_grad


def test_ema_of_tensors_of_other_dtypes(make_loss: Any) -> None:
    """A float32 q of a bfloat16 theta, as shards hold it, and a counter."""

    class Pair:
        theta = torch.tensor([1.0, 3.0], dtype=torch.bfloat16, requires_grad=True)
        q, count, seen = torch.zeros(2), torch.tensor(7), torch.tensor(0)

        def pairs(self) -> list[tuple[Tensor, Tensor]]:
            return [(self.q, self.theta), (self.seen, self.count)]

    pair = Pair()
    q = EMA(make_loss("lagged", hold_q=False), decay=0.75, holder=pair)
    assert pair.q.tolist() == [1.0, 3.0] and pair.seen == 7
    pair.theta.data.copy_(torch.tensor([2.0, 2.0]))
    pair.count.fill_(8)
    q.step()
    assert pair.q.tolist() == [1.25, 2.75] and pair.seen == 8
    assert not pair.q.requires_grad


def test_a_q_of_half_precision_is_told_of(make_loss: Any, make_policy: Any) -> None:
    """bfloat16 has 8 bits: q + 0.001 (theta - q) is q, where theta is less than the double of q."""
    loss = make_loss("lagged", policy=make_policy(dtype=torch.bfloat16))
    with pytest.warns(UserWarning, match="half precision, which rounds away"):
        q = EMA(loss, decay=0.999)
    before = qs(loss)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.mul_(1.5)
    q.step()
    assert_equal(qs(loss), before)


@both_modes
@pytest.mark.parametrize("every", [1, 2, 5])
def test_hard_sync_copies_at_every_qth_update(make_loss: Any, functional: bool, every: int) -> None:
    loss = make_loss("lagged", functional)
    q = HardSync(loss, every=every)
    assert isinstance(q, TargetNetUpdater)
    expected = thetas(loss)
    for update in range(1, 3 * every + 3):
        nudge(loss, update)
        synced = q.step()
        assert synced == (update % every == 0)
        if synced:
            expected = thetas(loss)
        assert_equal(qs(loss), expected)


@both_modes
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.995])
def test_ema_is_the_recursion(make_loss: Any, functional: bool, decay: float) -> None:
    loss = make_loss("lagged", functional)
    q = EMA(loss, decay=decay)
    expected = [x.double() for x in thetas(loss)]
    for update in range(20):
        nudge(loss, update)
        q.step()
        pairs = zip(expected, thetas(loss), strict=True)
        expected = [decay * old + (1 - decay) * new.double() for old, new in pairs]
        for ours, truth in zip(qs(loss), expected, strict=True):
            torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-6)
    if decay == 0:
        assert_equal(qs(loss), thetas(loss))


@both_modes
@pytest.mark.parametrize(
    "build", [lambda loss: HardSync(loss, every=3), lambda loss: EMA(loss, decay=0.7)]
)
def test_building_one_sets_q_to_theta(
    make_loss: Any, make_batch: Any, functional: bool, build: Any
) -> None:
    loss = make_loss("lagged", functional)
    EMA(loss, decay=0.9)
    nudge(loss, 0)
    assert not torch.equal(qs(loss)[-1], thetas(loss)[-1])
    build(loss)
    assert_equal(qs(loss), thetas(loss))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(make_batch())


def test_a_decay_that_is_text_is_named(make_loss: Any) -> None:
    with pytest.raises(TypeError, match="decay='0.9' must be a number"):
        EMA(make_loss("lagged"), decay="0.9")  # type: ignore[arg-type]


def test_torchrl_soft_update_equals_ours(make_loss: Any) -> None:
    theirs, ours = make_loss("lagged"), make_loss("lagged")
    soft, ema = SoftUpdate(theirs, eps=0.9), EMA(ours, decay=0.9)
    for update in range(5):
        for loss, q in ((theirs, soft), (ours, ema)):
            nudge(loss, update)
            q.step()
        for a, b in zip(qs(theirs), qs(ours), strict=True):
            torch.testing.assert_close(a, b)


def test_torchrl_hard_update_moves_q(make_loss: Any, make_batch: Any) -> None:
    loss, batch = make_loss("lagged"), make_batch()
    hard = HardUpdate(loss, value_network_update_interval=2)
    start = thetas(loss)
    weights = []
    for update in range(3):
        nudge(loss, update)
        assert_equal(qs(loss), start)
        weights.append(float(loss(batch)["weight_max"]))
        hard.step()
    assert_equal(qs(loss), thetas(loss))
    assert weights[0] == weights[1] == weights[2] != float(loss(batch)["weight_max"])


@both_modes
def test_hard_sync_resumes_in_mid_window(make_loss: Any, functional: bool) -> None:
    def run(stop: int | None) -> list[Tensor]:
        loss = make_loss("lagged", functional)
        q = HardSync(loss, every=4)
        for update in range(11):
            if update == stop:
                file = io.BytesIO()
                torch.save({"loss": loss.state_dict(), "q": q.state_dict()}, file)
                file.seek(0)
                state = torch.load(file, weights_only=True)
                loss = make_loss("lagged", functional)
                q = HardSync(loss, every=4)
                loss.load_state_dict(state["loss"])
                q.load_state_dict(state["q"])
            nudge(loss, update)
            q.step()
        return qs(loss) + thetas(loss)

    whole = run(None)
    for stop in (1, 4, 6, 9):
        assert_equal(run(stop), whole)


@both_modes
def test_ema_resumes(make_loss: Any, functional: bool) -> None:
    loss = make_loss("lagged", functional)
    q = EMA(loss, decay=0.8)
    nudge(loss, 0)
    q.step()
    state, progress = deepcopy(loss.state_dict()), q.state_dict()
    nudge(loss, 1)
    q.step()
    other = make_loss("lagged", functional)
    again = EMA(other, decay=0.8)
    other.load_state_dict(state)
    again.load_state_dict(progress)
    nudge(other, 1)
    again.step()
    assert_equal(qs(other) + thetas(other), qs(loss) + thetas(loss))
    late = make_loss("lagged", functional)
    late.load_state_dict(state)
    with pytest.warns(UserWarning, match="sets q to the policy, so the q .* is lost"):
        EMA(late, decay=0.8)
    assert_equal(qs(late), thetas(late))


def test_cached_weights_of_the_start_that_nothing_moves_are_told(
    make_policy: Any, make_batch: Any
) -> None:
    policy = make_policy()
    data = annotate_reference(policy, make_batch())
    loss = ImportanceWeightedMLE(policy, proposal="cached")
    reweight(data, loss)
    with pytest.warns(UserWarning, match="all weights are 1, and stay so, as in SFT"):
        fit(loss, StepSampler(data, 4), Schedule(2, 0.1))
    # In a loop of the user's own the next sync has moved them.
    reweight(data, loss)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(loss, StepSampler(data, 4), Schedule(2, 0.1))


@both_modes
def test_updater_survives_a_move_of_the_loss(make_loss: Any, functional: bool) -> None:
    loss = make_loss("lagged", functional)
    q = HardSync(loss, every=1)
    loss.to(torch.float64)
    nudge(loss, 0)
    q.step()
    assert all(x.dtype == torch.float64 for x in qs(loss))
    assert_equal(qs(loss), thetas(loss))


@both_modes
@pytest.mark.parametrize(
    "build", [lambda loss: HardSync(loss, every=1), lambda loss: EMA(loss, decay=0.0)]
)
def test_running_statistics_follow_too(make_batch: Any, functional: bool, build: Any) -> None:
    torch.manual_seed(0)
    norm: Any = nn.BatchNorm1d(4)
    # A statistic that no state has.
    norm.register_buffer("scale", torch.ones(()), persistent=False)
    net = nn.Sequential(nn.Linear(3, 4), norm, NormalParamExtractor())
    policy = ProbabilisticActor(
        TensorDictModule(net, in_keys=["observation"], out_keys=["loc", "scale"]),
        in_keys=["loc", "scale"],
        distribution_class=IndependentNormal,
    )
    loss = ImportanceWeightedMLE(policy, proposal="lagged", functional=functional)
    q = build(loss)
    with torch.no_grad():
        norm.running_mean.fill_(3.0)
        norm.num_batches_tracked.fill_(7)
        norm.scale.fill_(2.0)
    q.step()
    assert_equal(qs(loss), thetas(loss))
    with loss.network(lagged=True) as of_q:
        assert dict(of_q.named_buffers())["module.0.module.1.scale"] == 2.0


@both_modes
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_cached_weights_are_those_of_a_hard_synced_copy(
    make_loss: Any, make_batch: Any, gradients: Any, functional: bool, layout: str
) -> None:
    packed = make_batch([7, 6, 8])
    lagged_data = packed if layout == "packed" else pad(packed)
    cached_data = lagged_data.clone()
    lagged, cached = make_loss("lagged", functional), make_loss("cached", functional)
    slow = HardSync(lagged, every=3)
    fast = HardSync(cached, every=3, trajectories=cached_data)
    stored = cached_data["importance_weight"]
    for update in range(7):
        a, b = lagged(lagged_data), cached(cached_data)
        for key in ("loss_iw_mle", "ESS", "weight_mean", "weight_max", "kl_approx", "log_prob"):
            torch.testing.assert_close(a[key], b[key], msg=f"{key} at {update}")
        for x, y in zip(
            gradients(lagged, lagged_data).values(),
            gradients(cached, cached_data).values(),
            strict=True,
        ):
            torch.testing.assert_close(x, y)
        for loss, q in ((lagged, slow), (cached, fast)):
            nudge(loss, update)
            assert q.step() == (update % 3 == 2)
    # Samplers hold on to the tensor, so syncs write into it.
    assert (
        cached_data["importance_weight"] is stored
        or cached_data["importance_weight"].data_ptr() == stored.data_ptr()
    )


def test_cached_sync_resumes_in_mid_window(make_loss: Any, make_batch: Any) -> None:
    data = make_batch()
    loss = make_loss("cached")
    q = HardSync(loss, every=3, trajectories=data)
    for update in range(4):
        nudge(loss, update)
        q.step()
    weights = data["importance_weight"].clone()
    state = deepcopy(loss.state_dict()), q.state_dict()
    fresh_data, fresh = make_batch(), make_loss("cached")
    resumed = HardSync(fresh, every=3, trajectories=fresh_data)
    assert not torch.equal(fresh_data["importance_weight"], weights)
    data["importance_weight"] += 1.0  # A state does not change with the data.
    fresh.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    assert torch.equal(fresh_data["importance_weight"], weights)
    data["importance_weight"].copy_(weights)
    steps = []
    for each, updater in ((loss, q), (fresh, resumed)):
        nudge(each, 4)
        steps.append(updater.step())
        nudge(each, 5)
        steps.append(updater.step())
    assert steps == [False, True, False, True]
    assert torch.equal(fresh_data["importance_weight"], data["importance_weight"])


def test_reweight_leaves_the_policy_and_the_other_entries_alone(
    make_loss: Any, make_batch: Any
) -> None:
    loss, data = make_loss("current"), make_batch()
    before, mode = data.clone(), loss.training
    log_weight = reweight(data, loss)
    assert torch.equal(log_weight.exp(), data["importance_weight"])
    assert loss.training == mode and all(p.grad is None for p in loss.parameters())
    assert set(data.keys(True, True)) == {*before.keys(True, True), "importance_weight"}
    assert all((data.get(k) == before.get(k)).all() for k in before.keys(True, True))
    torch.testing.assert_close(
        data["importance_weight"].max(), loss(data)["weight_max"], rtol=1e-6, atol=0
    )
    padded = pad(make_batch())
    padded["ref_log_prob"][~padded[MASK]] = torch.nan
    padded["observation"][~padded[MASK]] = torch.inf
    log_weight = reweight(padded, loss)
    assert bool((log_weight[~padded[MASK]] == 0).all())
    assert bool((padded["importance_weight"][~padded[MASK]] == 1).all())
    torch.testing.assert_close(padded["importance_weight"][padded[MASK]], data["importance_weight"])


def test_a_step_counts_where_all_masks_are_on(make_loss: Any, make_batch: Any) -> None:
    """Weights of two masks against a loop over the steps that both leave in."""
    data = make_batch([6, 4, 7])
    chain = ImportanceWeights(step=[weights.Temperature(2.0)], trajectory=[weights.SelfNormalize()])
    loss = make_loss("current", functional=False, importance_weights=chain)
    first = torch.arange(len(data)) % 3 != 0
    second = torch.arange(len(data)) % 4 != 1
    # TorchRL's names of masks that a loss combines.
    data.set(("collector", "mask"), first)
    data.set("shifted_valid", second)
    with torch.no_grad():
        log_ratio = loss.actor_network.log_prob(data) - data["ref_log_prob"]
    ratios, counts = [], []
    for trajectory in range(3):
        steps = [i for i in range(len(data)) if data["collector", "traj_ids"][i] == trajectory]
        both = [i for i in steps if first[i] and second[i]]
        assert 0 < len(both) < sum(bool(first[i] or second[i]) for i in steps)
        ratios.append(torch.stack([2.0 * log_ratio[i] for i in both]).mean().exp())
        counts.append(data["multiplicity"][steps[0]])
    mean = sum(m * w for m, w in zip(counts, ratios, strict=True)) / sum(counts)
    expected = torch.stack(ratios)[data["collector", "traj_ids"]] / mean
    expected = torch.where(first & second, expected, 1.0)
    reweight(data, loss)
    torch.testing.assert_close(data["importance_weight"], expected)


def test_wrong_settings_are_refused(make_loss: Any, make_batch: Any) -> None:
    with pytest.raises(ValueError, match="every=0"):
        HardSync(make_loss("lagged"), every=0)
    for decay in (-0.1, 1.0, 2.0):
        with pytest.raises(ValueError, match="decay"):
            EMA(make_loss("lagged"), decay=decay)
    for proposal in ("current", "reference"):
        with pytest.raises(ValueError, match=f"proposal='{proposal}'"):
            HardSync(make_loss(proposal), every=2)
        with pytest.raises(ValueError, match=f"proposal='{proposal}'"):
            EMA(make_loss(proposal), decay=0.5)
    with pytest.raises(ValueError, match="trajectories"):
        HardSync(make_loss("cached"), every=2)
    with pytest.raises(ValueError, match="trajectories"):
        HardSync(make_loss("lagged"), every=2, trajectories=make_batch())
    held_elsewhere = make_loss("lagged", hold_q=False)
    for build in (lambda x: EMA(x, decay=0.9), lambda x: HardSync(x, every=2)):
        with pytest.raises(ValueError, match="holder"):
            build(held_elsewhere)
    with pytest.raises(TypeError, match="ImportanceWeightedMLE"):
        EMA(nn.Linear(1, 1), decay=0.5)  # type: ignore[arg-type]
