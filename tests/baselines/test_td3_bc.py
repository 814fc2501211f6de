"""TD3+BC against TorchRL, and its delays."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.objectives import SoftUpdate, TD3BCLoss

from baselines import algorithm, td3_bc
from baselines.critics import qvalue_networks
from baselines.learner import Learner
from iwsft.training import Probe

MakeTrajectories = Callable[..., TensorDict]
SMALL = td3_bc.Settings(steps=8, batch_size=16, hidden=(16, 16))


def parameters(learner: Learner, name: str) -> list[torch.Tensor]:
    params = getattr(learner.loss, f"{name}_params")
    return [x.detach().clone() for x in params.values(True, True)]


def moved(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


class TestUpdate:
    def test_values_and_gradients_are_torchrls(self, make_trajectories: MakeTrajectories) -> None:
        actor = td3_bc.policy(3, 2, SMALL).actor
        critics = qvalue_networks(3, 2, SMALL.hidden)
        options = {"bounds": (-1.0, 1.0), "loss_function": "l2", "alpha": 1.7}
        ours = td3_bc.DelayedTD3BCLoss(actor, critics, **options)
        theirs = TD3BCLoss(actor, critics, **options)
        for loss in (ours, theirs):
            SoftUpdate(loss, tau=0.1)
            loss.target_qvalue_network_params.apply(lambda x: x.data.mul_(1.1))
            loss.target_actor_network_params.apply(lambda x: x.data.mul_(0.9))
        batch, out = make_trajectories(), {}
        for loss in (ours, theirs):
            torch.manual_seed(3)
            out[loss] = loss(batch.clone())
            (out[loss]["loss_actor"] + out[loss]["loss_qvalue"]).backward()
        assert set(out[ours].keys()) == set(theirs.out_keys)
        for key in theirs.out_keys:
            torch.testing.assert_close(out[ours][key], out[theirs][key], msg=key)
        # The actor's parameters are shared: its gradient is the sum of both.
        mine, other = (list(loss.qvalue_network_params.parameters()) for loss in (ours, theirs))
        for a, b in zip(mine, other, strict=True):
            torch.testing.assert_close(a.grad, b.grad)


class TestDelay:
    def test_actor_and_targets_move_at_every_second_update(
        self, make_trajectories: MakeTrajectories
    ) -> None:
        learner = td3_bc.build(make_trajectories(), SMALL, seed=0)
        names = ("actor_network", "target_actor_network", "target_qvalue_network")
        seen = []

        def look(batch: TensorDictBase) -> dict[str, float]:
            # Before the updater's step: the actor has moved, its target has not.
            seen.append({name: parameters(learner, name) for name in (*names, "qvalue_network")})
            return {}

        start = {name: parameters(learner, name) for name in (*names, "qvalue_network")}
        learner.fit(probes=[Probe(1, look)])
        steps = [start, *seen]
        change = {
            name: [moved(a[name], b[name]) for a, b in zip(steps, steps[1:], strict=False)]
            for name in start
        }
        assert change["qvalue_network"] == [True] * 8
        assert change["actor_network"] == [False, True] * 4
        for name in ("target_actor_network", "target_qvalue_network"):
            assert change[name] == [False, False, True, False, True, False, True, False]

    def test_a_call_does_not_change_the_next_one(self, make_trajectories: MakeTrajectories) -> None:
        learner = td3_bc.build(make_trajectories(), SMALL, seed=0)
        assert isinstance(learner.updater, td3_bc.DelayedUpdate)
        batch = learner.sampler.sample()
        for due in (False, True, False, True):
            for _ in range(3):
                assert ("loss_actor" in set(learner.loss(batch).keys())) is due
            learner.updater.step()


class TestSettings:
    def test_published(self) -> None:
        """The numbers of the paper, written down again."""
        settings, source = td3_bc.published("hopper-medium-replay-v2")
        assert "2106.06860" in source
        assert settings == td3_bc.Settings(
            steps=1_000_000,
            batch_size=256,
            lr=3e-4,
            gamma=0.99,
            tau=0.005,
            alpha=2.5,
            policy_noise=0.2,
            noise_clip=0.5,
            policy_delay=2,
            hidden=(256, 256),
            rewards="as they are",
        )

    @pytest.mark.parametrize(
        ("dataset", "rewards", "words"),
        [
            ("antmaze-umaze-v2", "minus one", "CORL"),
            ("door-human-v1", "as they are", "CORL"),
            ("kitchen-partial-v0", "as they are", "none published for kitchen"),
            ("my-own", "as they are", "none published for my-own"),
        ],
    )
    def test_other_families(self, dataset: str, rewards: str, words: str) -> None:
        settings, source = algorithm("td3-bc").published(dataset)
        assert settings == replace(td3_bc.Settings(), rewards=rewards) and words in source

    @pytest.mark.parametrize(
        "wrong",
        [{"policy_delay": 0}, {"alpha": -1.0}, {"noise_clip": -0.1}],
    )
    def test_out_of_range(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            td3_bc.Settings(**wrong)
