"""IQL against TorchRL's own loss and its equations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import IQLLoss, ValueEstimators

from baselines import iql
from baselines.critics import TargetUpdate, qvalue_networks, value_network, values
from iwsft.policies import GaussianPolicy

SMALL = iql.Settings(steps=20, batch_size=16, hidden=(16, 16))
GAMMA = 0.9


def both(**settings: Any) -> tuple[iql.SharedIQLLoss, IQLLoss]:
    """Ours and TorchRL's, with the same weights, targets unlike the networks."""
    torch.manual_seed(0)
    made = []
    for kind in (iql.SharedIQLLoss, IQLLoss):
        loss = kind(
            GaussianPolicy(3, 2, hidden=(8, 8)),
            qvalue_networks(3, 2, (8, 8)),
            value_network(3, (8, 8)),
            **{"temperature": 3.0, "expectile": 0.7} | settings,
        )
        loss.make_value_estimator(gamma=GAMMA)
        TargetUpdate(loss, tau=0.1)
        with torch.no_grad():
            for target in loss.target_qvalue_network_params.values(True, True):
                target.mul_(1.5)
        made.append(loss)
    ours, theirs = made
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@pytest.mark.parametrize("loss_function", ["l2", "smooth_l1"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_values_and_gradients_are_torchrls(
    trajectories: Any, gradients: Any, loss_function: str, reduction: str
) -> None:
    ours, theirs = both(loss_function=loss_function, reduction=reduction)
    actual, expected = ours(trajectories), theirs(trajectories.clone())
    assert list(actual.keys()) == [*expected.keys(), "pred_value"] == ours.out_keys
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=2e-6, atol=2e-6)
    a, b = gradients(ours, trajectories), gradients(theirs, trajectories.clone())
    assert a.keys() == b.keys()
    for name in a:
        assert b[name].norm() > 0
        torch.testing.assert_close(a[name], b[name], rtol=1e-5, atol=1e-6)
    assert ours.in_keys and set(ours.in_keys) == set(theirs.in_keys)


@pytest.mark.parametrize("mode", ["exclude", "non_tensor"])
def test_unreduced_values_are_torchrls(trajectories: Any, mode: str) -> None:
    ours, theirs = both(loss_function="l2", reduction="none", scalar_output_mode=mode)
    actual, expected = ours(trajectories), theirs(trajectories.clone())
    assert actual.batch_size == trajectories.batch_size
    for name in ("loss_actor", "loss_qvalue", "loss_value"):
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-6)
    names = [set(out.keys()) for out in (actual, expected)]
    assert all(("entropy" in each) == (mode == "non_tensor") for each in names)


def test_keys_set_as_torchrls(trajectories: Any) -> None:
    ours, theirs = both(loss_function="l2")
    renamed = trajectories.clone()
    for old, new in (("reward", "r"), ("terminated", "t"), ("done", "d")):
        renamed["next", new] = renamed["next", old]
    renamed = renamed.exclude(("next", "reward"), ("next", "terminated"), ("next", "done"))
    for loss in (ours, theirs):
        loss.set_keys(reward="r", terminated="t", done="d")
    actual, expected = ours(renamed), theirs(renamed.clone())
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=2e-6, atol=2e-6)


def test_other_value_estimators_are_refused() -> None:
    loss, _ = both()
    with pytest.raises((NotImplementedError, ValueError), match="(?i)TDLambda"):
        loss.make_value_estimator(ValueEstimators.TDLambda)


def test_weight_is_clipped_at_100(trajectories: Any) -> None:
    loss, _ = both(temperature=1e6, reduction="none", scalar_output_mode="exclude")
    with torch.no_grad():
        # V in the middle of Q, so that there are advantages of both signs.
        q = values(loss.qvalue_network, trajectories, loss.target_qvalue_network_params).amin(0)
        v = values(loss.value_network, trajectories, loss.value_network_params)
        loss.value_network_params["module", "layers", "2", "bias"] += (q - v).median()
    weight = loss(trajectories)["loss_actor"].detach() / -_log_prob(loss, trajectories)
    for each in weight.tolist():
        assert min(abs(each), abs(each - 100)) < 1e-3 or each == pytest.approx(1, abs=0.5)
    assert (weight > 50).sum() > 5 and (weight < 0.5).sum() > 5


def _log_prob(loss: IQLLoss, batch: TensorDictBase) -> torch.Tensor:
    with torch.no_grad(), loss.actor_network_params.to_module(loss.actor_network):
        return loss.actor_network.log_prob(batch.copy())


def test_published_settings() -> None:
    locomotion, source = iql.published("halfcheetah-medium-replay-v2")
    assert locomotion == iql.Settings(
        steps=1_000_000,
        batch_size=256,
        lr=3e-4,
        gamma=0.99,
        tau=0.005,
        expectile=0.7,
        temperature=3.0,
        hidden=(256, 256),
        dropout=0.0,
        rewards="return range",
    )
    assert "locomotion" in source and "none published" not in source
    maze, _ = iql.published("antmaze-umaze-v2")
    assert (maze.expectile, maze.temperature, maze.rewards) == (0.9, 10.0, "minus one")
    for name in ("kitchen-complete-v0", "door-human-v1", "pen-expert-v1"):
        hand, _ = iql.published(name)
        assert (hand.expectile, hand.temperature, hand.dropout) == (0.7, 0.5, 0.1)
        assert hand.rewards == "as they are"
    own, source = iql.published("my-robot")
    assert own.rewards == "as they are" and "none published for my-robot" in source


def test_schedule_is_a_cosine_for_the_actor_alone(trajectories: Any) -> None:
    schedule = iql.build(trajectories, SMALL, seed=0).schedule
    assert isinstance(schedule, dict)
    factors = {name: [each.factor(i) for i in (0, 10, 20)] for name, each in schedule.items()}
    assert factors["actor_network"] == pytest.approx([1, 0.5, 0])
    assert factors["qvalue_network"] == factors["value_network"] == [1, 1, 1]


def test_dropout_follows_each_hidden_layer_while_training(trajectories: Any) -> None:
    settings = replace(SMALL, dropout=0.5)
    learner = iql.build(trajectories, settings, seed=0)
    layers = [m for m in learner.policy.modules() if not list(m.children())]
    hidden = [nn.Linear, nn.ReLU, nn.Dropout]
    for layer, kind in zip(layers, [*hidden, *hidden, nn.Linear], strict=False):
        assert isinstance(layer, kind)
    batch = learner.sampler.sample()
    assert learner.loss(batch)["loss_actor"] != learner.loss(batch)["loss_actor"]
    learner.policy.eval()
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        first, second = (learner.policy(batch.copy())["action"] for _ in range(2))
    assert torch.equal(first, second) and learner.loss(batch)["loss_actor"].isfinite()
    other = iql.policy(3, 2, settings)
    other.load_state_dict(learner.policy.state_dict())


def test_actions_at_the_edge_are_moved_inside(trajectories: Any) -> None:
    """As in the authors' code."""
    trajectories["action"][0] = 1.0
    learned = iql.build(trajectories, SMALL, seed=0).sampler.trajectories["action"]
    assert float(learned.max()) == pytest.approx(1 - 1e-5)


def test_bad_data_and_settings_are_named(trajectories: Any) -> None:
    same = trajectories.clone()
    same["next", "reward"] = torch.zeros_like(same["next", "reward"])
    with pytest.raises(ValueError, match="the return 0"):
        iql.build(same, SMALL, seed=0)
    with pytest.raises(ValueError, match="expectile must"):
        iql.Settings(expectile=1.0)
