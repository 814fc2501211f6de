"""CQL against loops, quadrature, and TorchRL where TorchRL is right."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributions import Normal, TanhTransform, TransformedDistribution
from torchrl.objectives import CQLLoss, SoftUpdate

from baselines import algorithm, cql
from baselines.critics import qvalue_networks
from iwsft.policies import GaussianPolicy
from iwsft.trajectory import ACTION, NEXT_OBSERVATION, OBSERVATION, REWARD, TERMINATED
from tests.oracles.networks import leaves, mlp

MakeTrajectories = Callable[..., TensorDict]
SMALL = cql.Settings(
    steps=6, batch_size=12, actions=4, actor_hidden=(16, 16), critic_hidden=(16, 16)
)


def make_loss(observation_dim: int = 3, action_dim: int = 2, **options: Any) -> Any:
    """A loss whose critics have an opinion, with small networks."""
    torch.manual_seed(0)
    actor = GaussianPolicy(
        observation_dim,
        action_dim,
        hidden=(16, 16),
        squash=True,
        state_dependent_std=True,
        log_std_bounds=(-20.0, 2.0),
        log_std_init=options.pop("log_std_init", -1.0),
    )
    critics = qvalue_networks(observation_dim, action_dim, (16, 16))
    defaults = {"loss_function": "l2", "target_entropy": -float(action_dim), "num_random": 4}
    kind = options.pop("kind", cql.ConservativeLoss)
    loss = kind(actor, critics, **(defaults | options))
    SoftUpdate(loss, tau=0.1)
    for params in (loss.qvalue_network_params, loss.target_qvalue_network_params):
        params.apply(lambda x: x.data.mul_(2.0))
    loss.target_qvalue_network_params.apply(lambda x: x.data.mul_(0.9))
    return loss


class TestUpdate:
    def test_rows_at_a_time_do_not_matter(
        self, make_trajectories: MakeTrajectories, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loss, batch = make_loss(), make_trajectories()
        out = []
        for rows in (1, 3 * len(batch), 10**6):
            monkeypatch.setattr(cql, "_CACHED_ROWS", rows)
            torch.manual_seed(2)
            out.append(loss(batch))
        for other in out[1:]:
            for key, value in out[0].items():
                torch.testing.assert_close(other[key], value)


class TestPenalty:
    def test_against_a_loop_over_states_and_actions(
        self, make_trajectories: MakeTrajectories
    ) -> None:
        """log sum of exp(Q(s, a_i)) / density(a_i), all at the state s, less Q(s, a)."""
        loss, batch, n = make_loss(), make_trajectories((3, 4)), 4
        states, following = batch.get(OBSERVATION), batch.get(NEXT_OBSERVATION)
        dists = [self.policy(loss, x) for x in (states, following)]
        here, there = [(a := dist.sample((n,)), dist.log_prob(a).sum(-1)) for dist in dists]
        uniform = torch.empty(n, len(batch), 2).uniform_(-1, 1)
        q_data, gap = loss._q_and_gap(batch, uniform, here, there)
        for net in range(2):
            q = mlp(leaves(loss.qvalue_network_params, net))
            for b, state in enumerate(states):
                total = 0.0
                for i in range(n):
                    for action, density in (
                        (uniform[i, b], 0.25),
                        (here[0][i, b], here[1][i, b].exp().item()),
                        (there[0][i, b], there[1][i, b].exp().item()),
                    ):
                        total += math.exp(q(torch.cat([state, action])).item()) / density
                of_data = q(torch.cat([state, batch.get(ACTION)[b]])).item()
                assert math.isclose(q_data[net, b].item(), of_data, rel_tol=1e-4, abs_tol=1e-6)
                assert math.isclose(gap[net, b].item(), math.log(total) - of_data, rel_tol=1e-4)

    @staticmethod
    def policy(loss: Any, states: Tensor) -> TransformedDistribution:
        """The actor's, by torch's own transformed distribution."""
        head = loss.get_stateful_net("actor_network").module[0]
        with torch.no_grad():
            out = head(TensorDict({OBSERVATION: states}, [len(states)]))
        return TransformedDistribution(Normal(out["loc"], out["scale"]), TanhTransform())

    def test_draws_carry_the_log_density_of_torchs_own(
        self, make_trajectories: MakeTrajectories
    ) -> None:
        loss, batch = make_loss(), make_trajectories()
        action, log_prob = loss._policy(batch)(torch.randn(50, len(batch), 2))
        expected = self.policy(loss, batch.get(OBSERVATION)).log_prob(action).sum(-1)
        torch.testing.assert_close(log_prob, expected, rtol=1e-3, atol=1e-3)

    def test_many_draws_give_the_integral(self, make_trajectories: MakeTrajectories) -> None:
        """gap + Q(s, a) - log(3 n) estimates log of the integral of exp Q(s, .) over [-1, 1]."""
        n = 20_000
        loss = make_loss(action_dim=1, num_random=n, log_std_init=0.0)
        batch = make_trajectories((2, 2))
        batch.set(ACTION, batch.get(ACTION)[:, :1].contiguous())
        torch.manual_seed(0)
        out = loss(batch)
        grid = (torch.arange(4000) + 0.5) / 2000 - 1
        expected = 0.0
        for b in range(len(batch)):
            state = batch.get(OBSERVATION)[b].expand(len(grid), -1)
            for i in range(2):
                q = mlp(leaves(loss.qvalue_network_params, i))
                on_grid = q(torch.cat([state, grid[:, None]], -1)).double()
                integral = on_grid.exp().mean() * 2
                of_data = q(torch.cat([state[0], batch.get(ACTION)[b]]))
                expected += (integral.log() - of_data).item() / (2 * len(batch))
        assert abs(out["cql_gap"].item() - math.log(3 * n) - expected) < 0.01

    def test_it_pulls_the_data_up_and_other_actions_down(
        self, make_trajectories: MakeTrajectories
    ) -> None:
        """How far Q of the data is above Q of other actions, with the penalty and without."""
        data = make_trajectories()

        def lead(weight: float) -> float:
            settings = replace(SMALL, steps=25, critic_lr=1e-2, min_q_weight=weight)
            learner = cql.build(data, settings, seed=0)
            learner.fit()
            states = learner.sampler.trajectories
            actions = torch.stack([data.get(ACTION), -data.get(ACTION)])
            q = learner.loss._values(states, actions, learner.loss.qvalue_network_params)
            return float((q[:, 0] - q[:, 1]).mean().detach())

        assert lead(10.0) > 0.1 > lead(0.0)

    def test_a_states_penalty_is_cut_off_below(self, make_trajectories: MakeTrajectories) -> None:
        batch = make_trajectories()
        free, cut = make_loss(), make_loss(least_gap=1e3)
        assert free(batch)["cql_gap"] < 1e3
        out = cut(batch)
        assert out["cql_gap"] == 1e3
        out["loss_cql"].backward()
        assert not any(p.grad.any() for p in cut.qvalue_network_params.parameters())


class TestLagrange:
    @pytest.mark.parametrize(("threshold", "grows"), [(-100.0, True), (100.0, False)])
    def test_it_grows_while_the_penalty_is_above_the_threshold(
        self, make_trajectories: MakeTrajectories, threshold: float, grows: bool
    ) -> None:
        settings = replace(SMALL, lagrange_threshold=threshold)
        learner = cql.build(make_trajectories(), settings, seed=0)
        learner.fit()
        assert (learner.loss.log_multiplier.item() > 0) is grows

    def test_it_scales_the_penalty(self, make_trajectories: MakeTrajectories) -> None:
        batch = make_trajectories()
        gradients = []
        for loss in (make_loss(), make_loss(lagrange_threshold=2.0)):
            if loss.lagrange_threshold is not None:
                loss.log_multiplier.data.fill_(math.log(7.0))
            torch.manual_seed(1)
            out = loss(batch)
            losses = [v for k, v in out.items() if k in ("loss_cql", "loss_multiplier")]
            sum(losses).backward()
            gradients.append([p.grad for p in loss.qvalue_network_params.parameters()])
        for plain, scaled in zip(*gradients, strict=True):
            torch.testing.assert_close(scaled, 7.0 * plain)


class TestGradients:
    def test_there_are_no_other_losses(self, make_trajectories: MakeTrajectories) -> None:
        """Of TorchRL's, the actor's cloning loss is left out."""
        out = make_loss()(make_trajectories())
        names = {name for name, _ in out.items() if name.startswith("loss")}
        assert names == {"loss_actor", "loss_qvalue", "loss_cql", "loss_alpha"}


class TestWhereTorchRLIsRight:
    @pytest.mark.parametrize("max_q_backup", [False, True])
    def test_the_critics_target(
        self, make_trajectories: MakeTrajectories, max_q_backup: bool
    ) -> None:
        """With a policy without spread, whatever the draws are."""
        options = {"max_q_backup": max_q_backup, "log_std_init": -18.0}
        batch = make_trajectories()
        theirs = make_loss(kind=CQLLoss, **options)
        expected, _ = theirs.q_loss(batch.clone())
        got = make_loss(**options)(batch)["loss_qvalue"]
        torch.testing.assert_close(got, expected)

    def test_actor_temperature_and_entropy(self, make_trajectories: MakeTrajectories) -> None:
        batch = make_trajectories()
        ours, theirs = make_loss(alpha_init=0.3), make_loss(kind=CQLLoss, alpha_init=0.3)
        torch.manual_seed(4)
        out = ours(batch)
        torch.manual_seed(4)
        actor, seen = theirs.actor_loss(batch.clone())
        alpha, _ = theirs.alpha_loss(seen)
        torch.testing.assert_close(out["loss_actor"], actor)
        torch.testing.assert_close(out["loss_alpha"], alpha)
        torch.testing.assert_close(out["entropy"], -seen["_log_prob"].mean())

    def test_entropy_in_the_backup(self, make_trajectories: MakeTrajectories) -> None:
        """r + gamma (min Q' - alpha log pi), from the target without it and the draw itself."""
        batch = make_trajectories((6,))
        soft, hard = (make_loss(deterministic_backup=on, alpha_init=0.5) for on in (False, True))
        action, log_prob = torch.zeros(1, 6, 2), torch.arange(6.0)[None]
        lower = hard._target(batch, action, log_prob) - soft._target(batch, action, log_prob)
        goes_on = (~batch.get(TERMINATED)).squeeze(-1)
        torch.testing.assert_close(lower, 0.99 * 0.5 * goes_on * torch.arange(6.0))


class TestBuild:
    def test_data_are_transformed_by_the_settings(
        self, make_trajectories: MakeTrajectories
    ) -> None:
        data = make_trajectories()
        settings = replace(SMALL, normalize=False, reward_scale=10.0, reward_shift=-5.0)
        learner = cql.build(data, settings, seed=0)
        used = learner.sampler.trajectories
        assert torch.equal(used.get(OBSERVATION), data.get(OBSERVATION))
        torch.testing.assert_close(used.get(REWARD), 10 * data.get(REWARD) - 5)


class TestSettings:
    def test_locomotion(self) -> None:
        settings, source = cql.published("halfcheetah-medium-expert-v2")
        assert "CORL" in source
        assert settings == cql.Settings(
            steps=1_000_000,
            batch_size=256,
            actor_lr=3e-5,
            critic_lr=3e-4,
            gamma=0.99,
            tau=0.005,
            min_q_weight=10.0,
            actions=10,
            lagrange_threshold=None,
            max_q_backup=False,
            actor_hidden=(256, 256, 256),
            critic_hidden=(256, 256, 256),
            normalize=True,
        )

    def test_antmaze(self) -> None:
        settings, _ = algorithm("cql").published("antmaze-umaze-v2")
        assert (settings.lagrange_threshold, settings.min_q_weight) == (5 * 0.8, 5.0)
        assert (settings.reward_scale, settings.reward_shift) == (10.0, -5.0)
        assert settings.max_q_backup and not settings.normalize
        assert settings.actor_lr == 1e-4 and settings.critic_hidden == (256,) * 5

    @pytest.mark.parametrize(
        ("dataset", "words"),
        [
            ("door-human-v1", "Adroit"),
            ("kitchen-complete-v0", "kitchen"),
            ("my-own", "none published for my-own"),
        ],
    )
    def test_other_families_say_whose_they_are(self, dataset: str, words: str) -> None:
        assert words in cql.published(dataset)[1]

    @pytest.mark.parametrize(
        "wrong",
        [{"actions": 0}, {"min_q_weight": -1.0}, {"reward_scale": 0}],
    )
    def test_out_of_range(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            cql.Settings(**wrong)
