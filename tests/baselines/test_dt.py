from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from dt_cases import SIZES, SMALL, data
from torch import Tensor

from baselines import algorithm, dt


def network(settings: dt.Settings = SMALL) -> dt.DTNetwork:
    """A network that does something: parameters well away from their small start."""
    torch.manual_seed(0)
    net = dt.DTNetwork(3, 2, settings).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return net


def window(length: int, rows: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(rows, length, size, generator=generator) for size in (3, 2, 1)]


class TestNetwork:
    @pytest.mark.parametrize(("which", "sees_itself"), [(0, True), (1, False), (2, True)])
    def test_causality(self, which: int, sees_itself: bool) -> None:
        """An action is predicted from its observation and return-to-go, and from what was before;
        never from itself or from what follows."""
        net, inputs, t = network(), window(5), 2
        before = net(*inputs)
        inputs[which] = inputs[which].clone()
        inputs[which][:, t] += 1.0
        moved = (net(*inputs) != before).any(-1)[0].tolist()
        assert moved == [False, False, sees_itself, True, True]

    def test_filling_up_behind_has_no_influence(self) -> None:
        net = network()
        inputs = window(3)
        filled = [torch.cat([x, 1e3 * torch.ones(1, 2, x.shape[-1])], 1) for x in inputs]
        torch.testing.assert_close(net(*filled)[:, :3], net(*inputs), rtol=0, atol=1e-6)

    def test_equals_filling_up_in_front_with_an_attention_mask(self) -> None:
        """The paper's way of padding, on the same GPT-2 with mask and positions of its own."""
        net = network()
        inputs = window(3)
        core = net.actor.transformer
        observation, action, return_to_go = (
            torch.cat([torch.full((1, 2, x.shape[-1]), -10.0), x], 1) for x in inputs
        )
        tokens = torch.stack(
            [
                core.embed_return(return_to_go / net.return_scale),
                core.embed_state(net.normalization(observation)),
                core.embed_action(action),
            ],
            2,
        ).reshape(1, 15, 32)
        mask = torch.tensor([[0] * 6 + [1] * 9])
        hidden = core.transformer(
            inputs_embeds=core.embed_ln(tokens),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
        ).last_hidden_state
        expected = net.actor.action_layer(hidden[:, 7::3]).tanh()
        torch.testing.assert_close(net(*inputs), expected, rtol=0, atol=1e-5)

    def test_observations_and_returns_in_other_units(self) -> None:
        net, inputs = network(), window(4)
        before = net(*inputs)
        net.normalization.mean.fill_(5.0)
        net.normalization.std.fill_(2.0)
        net.return_scale.fill_(1000.0)
        observation, action, return_to_go = inputs
        after = net(5 + 2 * observation, action, 1000 * return_to_go)
        torch.testing.assert_close(after, before, rtol=0, atol=1e-5)

    def test_dropout_is_set_everywhere(self) -> None:
        assert all(
            module.p == 0.25
            for module in network(dataclasses.replace(SMALL, dropout=0.25)).modules()
            if isinstance(module, torch.nn.Dropout)
        )
        net = network(dataclasses.replace(SMALL, dropout=0.0)).train()
        inputs = window(5)
        assert torch.equal(net(*inputs), net(*inputs))

    def test_no_words_about_text_tokens(self, capfd: pytest.CaptureFixture[str]) -> None:
        network()
        assert capfd.readouterr() == ("", "")


class TestBuild:
    def test_loss_is_the_mean_over_valid_steps(self) -> None:
        """Windows one by one, without anything behind them, and their steps counted by hand."""
        learner = dt.build(data(SIZES), dataclasses.replace(SMALL, dropout=0.0), seed=0)
        batch = learner.sampler.sample()
        loss = learner.loss(batch)["loss"]
        loss.backward()
        gradients = {
            n: p.grad.clone() for n, p in learner.policy.named_parameters() if "wte" not in n
        }
        learner.policy.zero_grad()
        total, count = torch.zeros(()), 0
        valid = batch["collector", "mask"].sum(1).tolist()
        assert min(valid) < SMALL.context  # there are short windows
        for row, steps in zip(batch, valid, strict=True):
            inputs = [row[key][None, :steps] for key in ("observation", "action", "return_to_go")]
            error = learner.policy.network(*inputs) - row["action"][None, :steps]
            total, count = total + error.square().sum(), count + error.numel()
        expected = total / count
        expected.backward()
        torch.testing.assert_close(loss, expected)
        for name, parameter in learner.policy.named_parameters():
            if name in gradients:
                torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)

    def test_settings_that_depend_on_the_data(self) -> None:
        trajectories = data(SIZES)
        settings = dataclasses.replace(SMALL, target_return=None)
        policy = dt.build(trajectories, settings, seed=0).policy
        returns = [
            float(part.sum()) for part in trajectories["next", "reward"].double().split(SIZES)
        ]
        assert float(policy.target_return) == pytest.approx(max(returns))
        # Rewards are positive: the largest return-to-go is a whole return.
        assert float(policy.network.return_scale) == pytest.approx(max(returns))
        observation = trajectories["observation"]
        normal = policy.network.normalization(observation)
        torch.testing.assert_close(normal.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
        torch.testing.assert_close(normal.std(0, correction=0), torch.ones(3), rtol=0, atol=1e-3)

    def test_settings_win_over_the_data(self) -> None:
        settings = dataclasses.replace(SMALL, target_return=7.0, return_scale=3.0)
        policy = dt.build(data(SIZES), settings, seed=0).policy
        assert (float(policy.target_return), float(policy.network.return_scale)) == (7.0, 3.0)

    def test_a_seed_decides_the_parameters(self) -> None:
        a, b, c = (dt.build(data(SIZES), SMALL, seed=seed).policy for seed in (3, 3, 4))
        assert all(map(torch.equal, a.parameters(), b.parameters()))
        assert not all(map(torch.equal, a.parameters(), c.parameters()))


class TestSettings:
    @pytest.mark.parametrize(
        ("dataset", "target"),
        [
            ("hopper-medium-replay-v2", 3600.0),
            ("halfcheetah-medium-v2", 6000.0),
            ("walker2d-expert-v2", 5000.0),
        ],
    )
    def test_published(self, dataset: str, target: float) -> None:
        settings, source = algorithm("dt").published(dataset)
        # The table of hyperparameters in the paper's appendix.
        assert dataclasses.asdict(settings) == {
            "steps": 100_000,
            "batch_size": 64,
            "lr": 1e-4,
            "warmup": 0.1,
            "weight_decay": 1e-4,
            "clip_norm": 0.25,
            "context": 20,
            "layers": 3,
            "heads": 1,
            "width": 128,
            "dropout": 0.1,
            "target_return": target,
            "return_scale": 1000.0,
        }
        assert "2106.01345" in source and f"{target:.0f}" in source

    def test_others_ask_for_the_best_return_of_the_data(self) -> None:
        settings, source = dt.published("door-human-v1")
        assert settings.target_return is None and settings.return_scale is None
        assert "nothing published for door-human-v1" in source
        assert "best return of the dataset" in source

    def test_a_shortened_run_warms_up_for_the_same_share(self) -> None:
        settings, _ = dt.published("hopper-medium-v2")
        small = dataclasses.replace(settings, steps=200, width=32, layers=1)
        schedule = dt.build(data(SIZES), small, seed=0).schedule
        assert schedule.warmup == 20
        assert [schedule.factor(step) for step in (10, 20, 199)] == [0.5, 1.0, 1.0]

    @pytest.mark.parametrize(
        "wrong",
        [
            {"steps": 0},
            {"batch_size": 0},
            {"context": 0},
            {"layers": 0},
            {"heads": 3},
            {"warmup": 1.0},
            {"dropout": 1.0},
            {"target_return": float("nan")},
            {"return_scale": 0.0},
        ],
    )
    def test_out_of_range(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            dataclasses.replace(dt.Settings(), **wrong)


class TestErrors:
    def test_no_transformers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        models = "torchrl.modules.models.decision_transformer"
        monkeypatch.setattr(f"{models}._has_transformers", False)
        with pytest.raises(ImportError, match="pip install transformers"):
            dt.build(data(SIZES), SMALL, seed=0)

    def test_no_reward(self) -> None:
        with pytest.raises(KeyError, match="reward.* is missing"):
            dt.build(data(SIZES).exclude(("next", "reward")), SMALL, seed=0)

    def test_reward_that_is_not_finite(self) -> None:
        trajectories = data(SIZES)
        trajectories["next", "reward"][4] = torch.nan
        with pytest.raises(ValueError, match=r"reward'\) is NaN or infinite .* step 4"):
            dt.build(trajectories, SMALL, seed=0)

    def test_no_step(self) -> None:
        with pytest.raises(ValueError, match="not a single step"):
            dt.build(data(SIZES)[:0], SMALL, seed=0)

    def test_rewards_that_are_all_0(self) -> None:
        trajectories = data(SIZES)
        trajectories["next", "reward"].zero_()
        with pytest.raises(ValueError, match="all rewards are 0"):
            dt.build(trajectories, SMALL, seed=0)
