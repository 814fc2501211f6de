"""AWACLoss keeps the contract of TorchRL's loss modules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from baselines.awac import AWACLoss
from baselines.critics import TargetUpdate, ValueMLP, qvalue_networks
from iwsft.policies import GaussianPolicy

OUT_KEYS = ["loss_actor", "loss_qvalue", "entropy", "weight_mean", "pred_value"]
LOSSES = OUT_KEYS[:2]


def make_loss(seed: int = 0, *, served: bool = True, **settings: Any) -> AWACLoss:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        loss = AWACLoss(
            GaussianPolicy(3, 2, hidden=(8, 8)), qvalue_networks(3, 2, (8, 8)), **settings
        )
        if served:
            TargetUpdate(loss, tau=0.1)
        return loss


def call(loss: AWACLoss, *args: Any, **kwargs: Any) -> Any:
    """With the same draws each time."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return loss(*args, **kwargs)


def test_renamed_keys_give_the_same_numbers(trajectories: Any, assert_same: Any) -> None:
    loss = make_loss()
    expected = call(loss, trajectories)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy = GaussianPolicy(3, 2, hidden=(8, 8), in_key=("s", "x"), out_key=("c", "u"))
        critics = [
            TensorDictModule(ValueMLP(5, (8, 8)), in_keys=[("s", "x"), ("c", "u")], out_keys=["q"])
            for _ in range(2)
        ]
    other = AWACLoss(policy, critics)
    other.set_keys(action=("c", "u"), reward=("gain", "r"), terminated="over")
    TargetUpdate(other, tau=0.1)
    renamed = TensorDict(
        {
            "s": {"x": trajectories["observation"]},
            "c": {"u": trajectories["action"]},
            "next": {
                "s": {"x": trajectories["next", "observation"]},
                "gain": {"r": trajectories["next", "reward"]},
                "over": trajectories["next", "terminated"],
            },
        },
        trajectories.batch_size,
    )
    assert_same(call(other, renamed), expected)
    assert other.in_keys == [
        ("s", "x"),
        ("c", "u"),
        ("next", "s", "x"),
        ("next", "gain", "r"),
        ("next", "over"),
    ]


def test_in_keys_and_out_keys() -> None:
    loss = make_loss()
    needed = ["observation", "action"]
    needed += [("next", k) for k in ("observation", "reward", "terminated")]
    assert loss.in_keys == needed and loss.out_keys == OUT_KEYS
    loss.set_keys(reward="r")
    assert loss.in_keys[3] == ("next", "r")
    loss.in_keys = ["observation"]
    assert loss.in_keys == ["observation"]


def test_call_without_tensordict(trajectories: Any) -> None:
    loss = make_loss()
    expected = call(loss, trajectories)
    keywords = {
        "_".join(key) if isinstance(key, tuple) else key: trajectories[key] for key in loss.in_keys
    }
    outputs = call(loss, **keywords)
    for key, value in zip(OUT_KEYS, outputs, strict=True):
        torch.testing.assert_close(value, expected[key], rtol=0, atol=0)
    loss.select_out_keys("loss_actor", "pred_value")
    first, second = call(loss, **keywords)
    assert first == expected["loss_actor"] and second == expected["pred_value"]


def test_output_is_scalars_and_only_losses_carry_gradient(trajectories: Any) -> None:
    out = make_loss()(trajectories)
    assert list(out.keys()) == OUT_KEYS and out.batch_size == torch.Size([])
    assert all(value.shape == () for value in out.values())
    assert [key for key, value in out.items() if value.requires_grad] == LOSSES


def test_reductions_agree(trajectories: Any) -> None:
    out = {
        reduction: call(make_loss(reduction=reduction), trajectories)
        for reduction in ("none", "mean", "sum", None)
    }
    assert list(out["none"].keys()) == LOSSES
    for name in LOSSES:
        each = out["none"][name]
        assert each.shape == out["none"].batch_size == trajectories.batch_size
        torch.testing.assert_close(each.sum(), out["sum"][name])
        torch.testing.assert_close(each.mean(), out["mean"][name])
        assert out[None][name] == out["mean"][name]
    with pytest.raises(ValueError, match="reduction"):
        make_loss(reduction="max")


def test_batches_of_any_shape(trajectories: Any) -> None:
    # One wide batch, so that the draws are the same.
    wide = trajectories[:24]
    flat = call(make_loss(reduction="none"), wide)
    folded = call(make_loss(reduction="none"), wide.reshape(4, 6))
    for name in LOSSES:
        torch.testing.assert_close(folded[name].reshape(-1), flat[name])


def test_masked_steps_do_not_count(trajectories: Any) -> None:
    loss = make_loss(reduction="sum")
    keep = torch.arange(len(trajectories)) < 20
    each = call(make_loss(reduction="none"), trajectories)
    masked = trajectories.clone()
    masked["collector", "mask"] = keep
    out = call(loss, masked)
    for name in LOSSES:
        torch.testing.assert_close(out[name], each[name][keep].sum())


def test_parameters_are_policy_and_critics_but_no_targets() -> None:
    policy = GaussianPolicy(3, 2, hidden=(8, 8))
    own = list(policy.parameters())
    loss = AWACLoss(policy, qvalue_networks(3, 2, (8, 8)))
    names = [name for name, _ in loss.named_parameters()]
    assert {name.split(".")[0] for name in names} == {
        "actor_network_params",
        "qvalue_network_params",
    }
    learned = {id(p) for p in loss.parameters()}
    assert learned >= {id(p) for p in own} and len(learned) == len(own) + 6


def test_critics_of_another_kind_are_refused(trajectories: Any) -> None:
    class Q(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.line = nn.Linear(5, 1)

        def forward(self, s: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
            return self.line(torch.cat([s, a], -1))

    critics = [
        TensorDictModule(Q(), in_keys=["observation", "action"], out_keys=["state_action_value"])
        for _ in range(2)
    ]
    with pytest.raises(TypeError, match=r"baselines\.critics"):
        AWACLoss(GaussianPolicy(3, 2, hidden=(8,)), critics)(trajectories)
