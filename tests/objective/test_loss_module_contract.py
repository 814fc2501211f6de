"""ImportanceWeightedMLE keeps the contract of TorchRL's loss modules."""

from __future__ import annotations

import io
import warnings
from copy import deepcopy
from typing import Any

import pytest
import torch
from tensordict import NestedKey, TensorDict
from torch import nn
from torchrl.objectives import LossModule

from iwsft import EMA, ImportanceWeightedMLE, reweight
from iwsft.trajectory import MASK, TRAJ_IDS, pad

PROPOSALS = ("current", "reference", "lagged", "cached")
DEFAULT_KEYS: dict[str, NestedKey] = {
    "action": "action",
    "traj_ids": ("collector", "traj_ids"),
    "ref_log_prob": "ref_log_prob",
    "multiplicity": "multiplicity",
    "importance_weight": "importance_weight",
    "data_weight": "data_weight",
    "standard_score": "standard_score",
    "success_rate": "success_rate",
}
OUT_KEYS = ["loss_iw_mle", "ESS", "kl_approx", "clip_fraction", "weight_mean", "weight_max"]
OUT_KEYS += ["log_prob"]
NEEDED = {
    "current": ["ref_log_prob"],
    "lagged": ["ref_log_prob"],
    "cached": ["importance_weight"],
    "reference": [],
}

every_proposal = pytest.mark.parametrize("proposal", PROPOSALS)
both_modes = pytest.mark.parametrize("functional", [True, False], ids=["functional", "module"])


@every_proposal
@both_modes
def test_is_a_loss_module_whose_keys_can_be_set(
    make_loss: Any, proposal: str, functional: bool
) -> None:
    loss = make_loss(proposal, functional)
    assert isinstance(loss, LossModule)
    assert loss.functional is functional
    with pytest.raises(ValueError, match="unknown"):
        loss.set_keys(unknown="key")
    assert {k: getattr(loss.tensor_keys, k) for k in DEFAULT_KEYS} == DEFAULT_KEYS
    assert set(loss.default_keys.__dataclass_fields__) == set(DEFAULT_KEYS)
    for name in DEFAULT_KEYS:
        loss.set_keys(**{name: ("a", name)})
        assert getattr(loss.tensor_keys, name) == ("a", name)
    for name in DEFAULT_KEYS:
        loss.set_keys(**{name: None})
    assert {k: getattr(loss.tensor_keys, k) for k in DEFAULT_KEYS} == DEFAULT_KEYS
    loss.set_keys(**{name: f"new_{name}" for name in DEFAULT_KEYS})
    assert all(getattr(loss.tensor_keys, name) == f"new_{name}" for name in DEFAULT_KEYS)
    assert ImportanceWeightedMLE.default_keys().action == "action"


@every_proposal
@both_modes
def test_renamed_keys_give_the_same_numbers(
    ready: Any, make_loss: Any, make_policy: Any, proposal: str, functional: bool, assert_same: Any
) -> None:
    loss, batch = ready(proposal, functional)
    expected = loss(batch)
    policy = make_policy(in_key=("state", "x"), out_key=("control", "u"))
    renamed = {
        "action": ("control", "u"),
        "traj_ids": "episode",
        "ref_log_prob": ("old", "lp"),
        "multiplicity": ("counts", "draws"),
        "importance_weight": ("old", "w"),
    }
    other = make_loss(proposal, functional, policy=policy)
    if proposal == "lagged":
        EMA(other, decay=0.9)
    other.set_keys(**renamed)
    moved = TensorDict({("state", "x"): batch["observation"]}, batch.batch_size)
    for name, key in renamed.items():
        if DEFAULT_KEYS[name] in batch.keys(True):
            moved.set(key, batch.get(DEFAULT_KEYS[name]))
    assert_same(other(moved), expected)


@every_proposal
def test_in_keys_and_out_keys(make_loss: Any, make_policy: Any, proposal: str) -> None:
    loss = make_loss(proposal)
    assert loss.in_keys == ["observation", "action", TRAJ_IDS, *NEEDED[proposal]]
    assert loss.out_keys == OUT_KEYS
    loss.set_keys(action="action2", traj_ids="episode")
    assert loss.in_keys == ["observation", "action2", "episode", *NEEDED[proposal]]
    loss.in_keys = ["observation"]
    assert loss.in_keys == ["observation"]
    nested = make_loss(proposal, policy=make_policy(in_key=("a", "b")))
    assert nested.in_keys[0] == ("a", "b")


@every_proposal
@both_modes
def test_call_without_tensordict(ready: Any, proposal: str, functional: bool) -> None:
    loss, batch = ready(proposal, functional)
    # A call with keywords has no place for draws: they are not an input key.
    batch = batch.exclude("multiplicity")
    expected = loss(batch)
    keywords = {
        "observation": batch["observation"],
        "action": batch["action"],
        "collector_traj_ids": batch[TRAJ_IDS],
    }
    keywords |= {key: batch[key] for key in NEEDED[proposal]}
    values = loss(**keywords)
    assert len(values) == len(OUT_KEYS)
    for key, value in zip(OUT_KEYS, values, strict=True):
        if key == "kl_approx" and proposal in ("reference", "cached"):
            assert value.isnan()  # these two do not read the reference
            continue
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0, equal_nan=True)
    loss.select_out_keys("loss_iw_mle", "ESS")
    first, second = loss(**keywords)
    assert first == expected["loss_iw_mle"] and second == expected["ESS"]
    assert set(loss(batch).keys()) >= {"loss_iw_mle", "ESS"}


@every_proposal
@both_modes
def test_the_loss_can_be_computed_alone(ready: Any, proposal: str, functional: bool) -> None:
    loss, batch = ready(proposal, functional)
    expected = loss(batch)["loss_iw_mle"]
    gradients = torch.autograd.grad(expected, [*loss.parameters()])
    loss.select_out_keys("loss_iw_mle")
    out = loss(batch)
    assert list(out.keys()) == ["loss_iw_mle"]
    assert torch.equal(out["loss_iw_mle"], expected)
    for one, other in zip(
        torch.autograd.grad(out["loss_iw_mle"], [*loss.parameters()]), gradients, strict=True
    ):
        assert torch.equal(one, other)
    loss.reset_out_keys()
    assert list(loss(batch).keys()) == OUT_KEYS


@every_proposal
@both_modes
def test_output_is_scalars_and_only_the_loss_carries_gradient(
    ready: Any, proposal: str, functional: bool
) -> None:
    loss, batch = ready(proposal, functional)
    out = loss(batch)
    assert list(out.keys()) == OUT_KEYS
    assert out.batch_size == torch.Size([])
    assert all(value.shape == () for value in out.values())
    assert [key for key, value in out.items() if value.requires_grad] == ["loss_iw_mle"]
    assert 0 < float(out["ESS"]) <= 1
    assert out["clip_fraction"].isnan() if proposal == "cached" else 0 <= out["clip_fraction"] <= 1


@every_proposal
@both_modes
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_reductions_agree(
    ready: Any, make_loss: Any, proposal: str, functional: bool, layout: str
) -> None:
    loss, batch = ready(proposal, functional)
    draws = sum(int(m[0]) for m in batch["multiplicity"].split([5, 1, 9, 3]))
    batch = batch if layout == "packed" else pad(batch)
    values = {}
    for reduction in ("none", "mean", "sum", None):
        other = make_loss(proposal, functional, reduction=reduction)
        if proposal == "lagged":
            EMA(other, decay=0.9)
        values[reduction] = other(batch)["loss_iw_mle"]
    assert values["none"].shape == batch.batch_size
    assert values["mean"].shape == values["sum"].shape == ()
    torch.testing.assert_close(values["none"].sum(), values["sum"])
    torch.testing.assert_close(values["sum"] / draws, values["mean"])
    assert values[None] == values["mean"] == loss(batch)["loss_iw_mle"]
    if layout == "padded":
        assert bool((values["none"][~batch[MASK]] == 0).all())


def test_unknown_settings_are_refused(make_policy: Any) -> None:
    with pytest.raises(ValueError, match="reduction"):
        ImportanceWeightedMLE(make_policy(), reduction="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="proposal"):
        ImportanceWeightedMLE(make_policy(), proposal="live")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="ProbabilisticActor"):
        ImportanceWeightedMLE(nn.Linear(3, 2))


@every_proposal
@both_modes
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_input_is_left_untouched(
    ready: Any, proposal: str, functional: bool, layout: str, assert_same: Any
) -> None:
    loss, batch = ready(proposal, functional)
    batch = batch if layout == "packed" else pad(batch)
    before = batch.clone()
    loss(batch)["loss_iw_mle"].backward()
    assert_same(batch, before)
    batch.lock_()
    loss(batch)


@every_proposal
@both_modes
def test_silent_once_q_is_served(ready: Any, proposal: str, functional: bool) -> None:
    loss, batch = ready(proposal, functional)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(batch)["loss_iw_mle"].backward()


@both_modes
def test_lagged_without_updater_warns_as_torchrl_does(
    make_loss: Any, make_batch: Any, functional: bool
) -> None:
    loss, batch = make_loss("lagged", functional), make_batch()
    with pytest.warns(UserWarning, match="No target network updater"):
        loss(batch)
    with pytest.warns(UserWarning, match="No target network updater"):
        deepcopy(loss)(batch)


@every_proposal
@both_modes
def test_reset_draws_new_parameters(ready: Any, proposal: str, functional: bool) -> None:
    loss, batch = ready(proposal, functional)
    state = {k: v for k, v in loss.state_dict().items() if v.is_floating_point()}
    with torch.no_grad():
        for value in state.values():
            value += 1000
    old = {k: v.clone() for k, v in state.items()}
    loss.reset_parameters_recursive()
    new = loss.state_dict()
    assert set(new) == set(old)
    assert all((new[k] != old[k]).all() for k in old)
    assert any(k.startswith("target_") for k in new) == (proposal == "lagged")
    loss(batch)


@every_proposal
@both_modes
def test_state_dict_round_trip(
    ready: Any, make_loss: Any, make_policy: Any, proposal: str, functional: bool, assert_same: Any
) -> None:
    loss, batch = ready(proposal, functional)
    with torch.no_grad():
        for parameter in loss.parameters():
            parameter.mul_(1.1)
    expected = loss(batch)
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    fresh = make_loss(proposal, functional, policy=make_policy(seed=5))
    fresh.to(torch.float64).to(torch.float32)
    if proposal == "lagged":
        EMA(fresh, decay=0.9)
    assert fresh(batch)["loss_iw_mle"] != expected["loss_iw_mle"]
    fresh.load_state_dict(state)
    assert_same(fresh(batch), expected)
    assert_same(TensorDict(fresh.state_dict()), TensorDict(state))


@every_proposal
@both_modes
def test_deepcopy_is_equal_and_apart(
    ready: Any, proposal: str, functional: bool, assert_same: Any
) -> None:
    loss, batch = ready(proposal, functional)
    expected = loss(batch)
    twin = deepcopy(loss)
    assert_same(twin(batch), expected)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.add_(1.0)
    assert twin(batch)["loss_iw_mle"] != expected["loss_iw_mle"]
    assert_same(loss(batch), expected)


@every_proposal
@both_modes
def test_parameters_are_those_of_the_policy(
    make_loss: Any, make_policy: Any, proposal: str, functional: bool
) -> None:
    policy = make_policy()
    loss = make_loss(proposal, functional, policy=policy)
    parameters = list(loss.parameters())
    assert all(parameter.requires_grad for parameter in parameters)
    assert {id(p) for p in parameters} == {id(p) for p in policy.parameters()}
    assert len(parameters) == len(list(policy.parameters()))
    names = [name for name, _ in loss.named_parameters(prefix="job")]
    assert all(name.startswith("job.actor_network") for name in names)


@every_proposal
@both_modes
def test_gradient_reaches_theta_only(ready: Any, proposal: str, functional: bool) -> None:
    loss, batch = ready(proposal, functional)
    for key in batch.keys(True, True):
        if batch.get(key).is_floating_point():
            batch.get(key).requires_grad_()
    loss(batch)["loss_iw_mle"].backward()
    for name, parameter in loss.named_parameters():
        assert parameter.grad is not None and parameter.grad.norm() > 0, name
    for name, value in loss.state_dict(keep_vars=True).items():
        if name.startswith("target_"):
            assert value.grad is None and not value.requires_grad, name
    for key in ("ref_log_prob", "importance_weight"):
        if key in batch.keys(True):
            assert batch[key].grad is None


@every_proposal
@both_modes
def test_float64(
    make_policy: Any,
    make_loss: Any,
    make_batch: Any,
    proposal: str,
    functional: bool,
    assert_near: Any,
) -> None:
    loss = make_loss(proposal, functional, policy=make_policy(dtype=torch.float64))
    batch = make_batch(dtype=torch.float64)
    if proposal == "lagged":
        EMA(loss, decay=0.9)
    if proposal == "cached":
        reweight(batch, loss)
    out = loss(batch)
    assert out["loss_iw_mle"].dtype == torch.float64
    out["loss_iw_mle"].backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float64 for p in loss.parameters())
    cast = make_loss(proposal, functional).to(torch.float64)
    if proposal == "lagged":
        EMA(cast, decay=0.9)
    assert_near(cast(batch), out)


@both_modes
def test_eval_turns_the_dropout_of_the_policy_off(
    make_loss: Any, make_policy: Any, make_batch: Any, functional: bool
) -> None:
    """Or the loss of held-out data would be that of a policy with noise."""
    policy, batch = make_policy(), make_batch()
    policy.head.net.insert(2, nn.Dropout(0.5))
    loss = make_loss("reference", functional, policy=policy)
    noisy = loss(batch)["loss_iw_mle"]
    assert loss(batch)["loss_iw_mle"] != noisy
    loss.eval()
    quiet = loss(batch)["loss_iw_mle"]
    assert loss(batch)["loss_iw_mle"] == quiet
    del policy.head.net[2]
    torch.testing.assert_close(make_loss("reference", policy=policy)(batch)["loss_iw_mle"], quiet)
    assert all(module.training for module in loss.train().actor_network.modules())


def test_seeds_are_mapped_by_torch_func(make_loss: Any, make_policy: Any, make_batch: Any) -> None:
    """``vmap`` over stacked parameters against each seed alone, gradients included."""
    batch = make_batch()
    losses = [make_loss("current", False, make_policy(seed=seed)) for seed in range(3)]
    for loss in losses:
        loss(batch)["loss_iw_mle"].backward()
    stacked, buffers = torch.func.stack_module_state(losses)

    def value(parameters: Any, own: Any) -> Any:
        return torch.func.functional_call(losses[0], (parameters, own), (batch,))["loss_iw_mle"]

    gradients, values = torch.vmap(torch.func.grad_and_value(value))(stacked, buffers)
    for i, loss in enumerate(losses):
        torch.testing.assert_close(values[i], loss(batch)["loss_iw_mle"].detach())
        for name, parameter in loss.named_parameters():
            torch.testing.assert_close(gradients[name][i], parameter.grad)
    functional = make_loss("current")
    with pytest.raises(TypeError, match="can't replace what this loss holds: functional=False"):
        torch.func.functional_call(functional, dict(functional.named_parameters()), (batch,))
