"""Behaviour that all baselines with a critic share, whatever their losses are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs.utils import ExplorationType, set_exploration_type

from baselines import BASELINES, Learner, algorithm
from iwsft import checkpoint, evaluate
from iwsft.training import Sampler, fit
from iwsft.trajectory import (
    ACTION,
    NEXT_OBSERVATION,
    OBSERVATION,
    REWARD,
    TERMINATED,
    TRUNCATED,
)
from tests.oracles.critics import PLAIN
from tests.oracles.networks import disagreement, leaves, mlp

MakeTrajectories = Callable[..., TensorDict]
Run = Callable[[Learner, Path, int | None], Learner]
Replay = Callable[[list[TensorDictBase]], Sampler]
SMALL: dict[str, dict[str, Any]] = {
    name: {"steps": 6, "batch_size": 16, "hidden": (16, 16)}
    for name in ("awac", "iql", "td3-bc", "rebrac")
} | {
    "cql": {
        "steps": 6,
        "batch_size": 12,
        "actions": 4,
        "actor_hidden": (16, 16),
        "critic_hidden": (16, 16),
    }
}
# As published for a dataset, except for the sizes: those with other rewards, losses or draws.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "awac": ("awac", "hopper-medium-v2", {}),
    "awac-antmaze": ("awac", "antmaze-umaze-v2", {}),
    "iql": ("iql", "hopper-medium-v2", {}),
    "iql-antmaze": ("iql", "antmaze-umaze-v2", {}),
    "td3-bc": ("td3-bc", "hopper-medium-v2", {}),
    "td3-bc-antmaze": ("td3-bc", "antmaze-umaze-v2", {}),
    "td3-bc-undelayed": ("td3-bc", "hopper-medium-v2", {"policy_delay": 1}),
    "td3-bc-third": ("td3-bc", "hopper-medium-v2", {"policy_delay": 3}),
    "rebrac": ("rebrac", "hopper-medium-replay-v2", {}),
    "rebrac-antmaze": ("rebrac", "antmaze-umaze-v2", {}),
    "rebrac-undelayed": ("rebrac", "hopper-medium-v2", {"policy_delay": 1}),
    "cql": ("cql", "hopper-medium-v2", {}),
    "cql-antmaze": ("cql", "antmaze-umaze-v2", {"least_gap": 1.0}),
    "cql-kitchen": ("cql", "kitchen-partial-v0", {}),
}
# Without plain implementation: dropout. The only draws of IQL's updates are its.
DROPOUT = {"iql-door": ("iql", "door-human-v1", {})}
# Those whose calls give all losses.
WHOLE = [
    case for case in CASES if CASES[case][0] not in ("td3-bc", "rebrac") or "undelayed" in case
]
OWNERS = {
    "loss_actor": "actor_network",
    "loss_qvalue": "qvalue_network",
    "loss_value": "value_network",
    "loss_cql": "qvalue_network",
    "loss_alpha": "log_alpha",
    "loss_multiplier": "log_multiplier",
}


def small(case: str, **more: Any) -> Any:
    """The settings of a case."""
    name, dataset, options = (CASES | DROPOUT)[case]
    published, _ = algorithm(name).published(dataset)
    return replace(published, **(SMALL[name] | options | more))


def rates(case: str, lr: float) -> dict[str, float]:
    """The settings that are a learning rate; where the actor has its own, it is half."""
    critic, actor = "critic_lr" if CASES[case][0] == "cql" else "lr", {"actor_lr": lr / 2}
    return {critic: lr} | (actor if CASES[case][0] in ("cql", "rebrac") else {})


def build(case: str, trajectories: TensorDictBase, *, seed: int = 0, **more: Any) -> Learner:
    name = (CASES | DROPOUT)[case][0]
    return algorithm(name).build(trajectories, small(case, **more), seed=seed)


def normalization(learner: Learner) -> Callable[[Tensor], Tensor]:
    """Of the states; IQL's stay as they are."""
    return getattr(learner.policy, "normalization", lambda x: x)


def qvalues(learner: Learner, batch: TensorDictBase) -> Tensor:
    """``[2, B]``, each network by itself."""
    inputs = torch.cat([batch[OBSERVATION], batch[ACTION]], -1)
    params = learner.loss.qvalue_network_params
    with torch.no_grad():
        return torch.cat([mlp(leaves(params, i))(inputs) for i in range(2)], -1).mT


@pytest.fixture
def trajectories(make_trajectories: MakeTrajectories) -> TensorDict:
    """States that are far from normalized, an action at the edge."""
    data = make_trajectories()
    for key in (OBSERVATION, NEXT_OBSERVATION):
        data[key] = 5 * data[key] + 3
    data[ACTION][0] = 1.0
    return data


class TestUpdate:
    @pytest.mark.parametrize("steps", [1, 8])
    @pytest.mark.parametrize("case", CASES)
    @pytest.mark.usefixtures("in_float64")
    def test_it_is_the_plain_implementations(
        self, make_trajectories: MakeTrajectories, recorded: Replay, case: str, steps: int
    ) -> None:
        """Networks, targets and multipliers after some updates, same batches and draws."""
        data = make_trajectories(dtype=torch.float64)
        # Fused Adam corrects its bias in float32.
        self.check(case, data, recorded, 1e-9, steps=steps)

    @pytest.mark.parametrize("case", [case for case in CASES if "-antmaze" not in case])
    def test_and_in_float32(
        self, make_trajectories: MakeTrajectories, recorded: Replay, case: str
    ) -> None:
        self.check(case, make_trajectories((200, 100)), recorded, 1e-5, steps=2, batch_size=256)

    @staticmethod
    def check(case: str, data: TensorDict, recorded: Replay, tolerance: float, **more: Any) -> None:
        settings = small(case, **rates(case, 3e-4), **more)
        name = CASES[case][0]
        learner = algorithm(name).build(data, settings, seed=1)
        plain = PLAIN[name](learner, settings)
        start = deepcopy(plain.networks)
        batches = [learner.sampler.sample() for _ in range(settings.steps)]
        draws = torch.get_rng_state()
        fit(learner.loss, recorded(batches), learner.schedule, updater=learner.updater)
        torch.set_rng_state(draws)
        for batch in batches:
            plain.update(batch)
        # They did move, far more than the two may differ.
        assert disagreement(start, learner.loss) > 1e-4
        assert disagreement(plain.networks, learner.loss) < tolerance
        for scalar in ("log_alpha", "log_multiplier"):
            if hasattr(learner.loss, scalar):
                ours, theirs = getattr(learner.loss, scalar), getattr(plain, scalar)
                assert theirs.item() != 0
                assert ours.item() == pytest.approx(theirs.item(), rel=1e-6, abs=tolerance)

    @pytest.mark.parametrize("case", WHOLE)
    def test_each_loss_moves_its_own_network(self, trajectories: TensorDict, case: str) -> None:
        learner = build(case, trajectories)
        batch = learner.sampler.sample()
        names = [name for name, _ in learner.loss(batch).items() if name.startswith("loss")]
        assert {"loss_actor", "loss_qvalue"} <= set(names)
        for name in names:
            learner.loss.zero_grad()
            learner.loss(batch)[name].backward()
            for owned, parameter in learner.loss.named_parameters():
                has = parameter.grad is not None and bool(parameter.grad.any())
                assert has == owned.startswith(OWNERS[name]), (name, owned)

    @pytest.mark.parametrize("case", WHOLE)
    def test_the_batch_is_left_as_it_is(
        self, trajectories: TensorDict, assert_same: Any, case: str
    ) -> None:
        learner = build(case, trajectories)
        batch = learner.sampler.sample()
        before = batch.clone()
        out = learner.loss(batch)
        sum(value for name, value in out.items() if name.startswith("loss")).backward()
        assert_same(batch, before)
        assert set(learner.loss(batch.lock_()).keys()) == set(learner.loss.out_keys)

    @pytest.mark.parametrize("case", WHOLE)
    def test_pred_value_is_the_mean_q(self, trajectories: TensorDict, case: str) -> None:
        learner = build(case, trajectories)
        batch = learner.sampler.sample()
        actual = learner.loss(batch)["pred_value"]
        assert not actual.requires_grad
        torch.testing.assert_close(actual.mean(), qvalues(learner, batch).mean())

    # ReBRAC leaves truncated steps out.
    @pytest.mark.parametrize("case", [case for case in CASES if "rebrac" not in case])
    def test_only_termination_stops_the_bootstrap(
        self, trajectories: TensorDict, case: str
    ) -> None:
        """And an episode's last step is followed by its own next state, not by the next episode.

        With targets that do not look at the action, so that no draw matters.
        """
        learner = build(case, trajectories, batch_size=500)
        loss, batch = learner.loss, learner.sampler.sample()
        states, following = (
            normalization(learner)(trajectories[key]) for key in (OBSERVATION, NEXT_OBSERVATION)
        )
        rows = (batch[OBSERVATION][:, None] == states).all(-1)
        assert bool((rows.sum(1) == 1).all())
        step = rows.int().argmax(1)
        assert len(step.unique()) == len(trajectories)
        assert torch.equal(batch[NEXT_OBSERVATION], following[step])
        terminated = trajectories[TERMINATED][step].squeeze(-1)
        truncated = trajectories[TRUNCATED][step].squeeze(-1)
        assert terminated.any() and truncated.any()

        targets = loss.target_qvalue_network_params
        with torch.no_grad():
            targets["module", "layers", "0", "weight"][..., states.shape[-1] :] = 0
            for target in targets.values(True, True):
                target.mul_(1.5)
        blind = torch.cat([following, trajectories[ACTION]], -1)[step]
        with torch.no_grad():
            if hasattr(loss, "value_network_params"):
                after = mlp(leaves(loss.value_network_params))(following[step])
            else:
                after = torch.min(*(mlp(leaves(targets, i))(blind) for i in range(2)))
        bootstrap = torch.where(terminated, 0.0, after.squeeze(-1))
        target = batch[REWARD].squeeze(-1) + 0.99 * bootstrap
        expected = (qvalues(learner, batch) - target).square().sum(0)
        loss.reduction = "none"
        actual = loss(batch)["loss_qvalue"].detach()
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
        # Far from what it would be without one.
        without = (qvalues(learner, batch) - batch[REWARD].squeeze(-1)).square().sum(0)
        assert ((actual - without).abs() > 1e-4)[truncated].all()


@pytest.mark.parametrize(
    ("case", "kill"),
    [
        ("iql-door", 3),
        # With the actor due next, and not.
        ("td3-bc", 3),
        ("td3-bc", 4),
        ("cql-antmaze", 3),
        ("cql-kitchen", 3),
    ],
)
def test_a_resumed_run_ends_in_the_same_bits(
    make_trajectories: MakeTrajectories, run_until: Run, tmp_path: Path, case: str, kill: int
) -> None:
    def run(folder: Path, stop: int | None = None) -> dict[str, Any]:
        learner = run_until(build(case, make_trajectories(), seed=5), folder, stop)
        assert learner.updater is not None
        state = checkpoint.load(folder / checkpoint.FOLDER, {})
        assert state is not None
        return {
            "loss": learner.loss.state_dict(),
            "policy": learner.policy.state_dict(),
            "updater": learner.updater.state_dict(),
            "sampler": learner.sampler.state_dict()["generator"],
            "optimizer": state["optimizer"]["state"],
            "draws": torch.get_rng_state(),
        }

    whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", stop=kill + 1)
    resumed = run(tmp_path / "killed")
    torch.testing.assert_close(resumed, whole, rtol=0, atol=0)
    if case == "td3-bc":
        assert resumed["updater"]["counter"] == 6


class TestBuild:
    @pytest.mark.parametrize("case", SMALL)
    def test_the_seed_decides(self, trajectories: TensorDict, assert_same: Any, case: str) -> None:
        one, same, other = (build(case, trajectories, seed=seed) for seed in (1, 1, 2))
        states = [learner.loss.state_dict() for learner in (one, same, other)]
        torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
        weights = [key for key in states[0] if key.endswith("weight")]
        for network in ("actor_network", "qvalue_network"):
            assert any(key.startswith(network) for key in weights)
        assert not any(torch.equal(states[0][key], states[2][key]) for key in weights)
        batches = [learner.sampler.sample() for learner in (one, same, other)]
        assert_same(batches[0], batches[1])
        assert not torch.equal(batches[0][ACTION], batches[2][ACTION])

    @pytest.mark.parametrize("case", CASES)
    def test_the_trajectories_are_left_as_they_are(
        self, trajectories: TensorDict, assert_same: Any, case: str
    ) -> None:
        before = trajectories.clone()
        build(case, trajectories, steps=2).fit(log_every=1)
        assert_same(trajectories, before)

    @pytest.mark.parametrize("case", ["awac", "iql", "td3-bc", "rebrac", "cql", "cql-kitchen"])
    def test_the_acting_policy_is_the_one_that_trains(
        self, trajectories: TensorDict, case: str
    ) -> None:
        """It takes raw states, and so does a fresh one with its state."""
        learner = build(case, trajectories)
        before = [parameter.detach().clone() for parameter in learner.policy.parameters()]
        learner.fit(log_every=1)
        after = list(learner.policy.parameters())
        assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        fresh = algorithm(CASES[case][0]).policy(3, 2, small(case))
        fresh.load_state_dict(learner.policy.state_dict())
        raw = trajectories.select(OBSERVATION)
        with set_exploration_type(ExplorationType.DETERMINISTIC):
            actions = [policy(raw.clone())[ACTION] for policy in (learner.policy, fresh)]
        assert torch.equal(*actions)
        # All act with tanh of a network's first outputs; its last weight and bias end it.
        layers = leaves(learner.loss.actor_network_params)
        layers = layers[len(layers) % 2 :]
        mean = mlp(layers)(learner.sampler.trajectories[OBSERVATION])[..., :2]
        torch.testing.assert_close(actions[0], mean.tanh())

    @pytest.mark.parametrize("case", ["awac", "td3-bc", "cql"])
    def test_states_are_normalized_once(self, trajectories: TensorDict, case: str) -> None:
        learned = build(case, trajectories).sampler.trajectories[OBSERVATION]
        torch.testing.assert_close(learned.mean(0), torch.zeros(3), rtol=0, atol=1e-5)
        torch.testing.assert_close(learned.std(0, correction=0), torch.ones(3), rtol=0, atol=1e-3)

    @pytest.mark.parametrize("key", [OBSERVATION, ACTION, NEXT_OBSERVATION, REWARD, TERMINATED])
    @pytest.mark.parametrize("case", SMALL)
    def test_a_missing_entry_is_named(self, trajectories: TensorDict, case: str, key: Any) -> None:
        with pytest.raises(KeyError) as raised:
            build(case, trajectories.exclude(key))
        assert f"{key!r} is missing" in raised.value.args[0]

    @pytest.mark.parametrize("key", [OBSERVATION, ACTION, NEXT_OBSERVATION, REWARD])
    @pytest.mark.parametrize("case", SMALL)
    def test_nan_is_named(self, trajectories: TensorDict, case: str, key: Any) -> None:
        trajectories[key][3, 0] = torch.nan
        with pytest.raises(ValueError) as raised:
            build(case, trajectories)
        assert f"{key!r} is NaN" in str(raised.value) and "step 3" in str(raised.value)

    @pytest.mark.parametrize("case", SMALL)
    def test_a_critic_that_diverges_is_stopped(self, trajectories: TensorDict, case: str) -> None:
        learner = build(case, trajectories, **rates(case, 30.0))
        with pytest.raises(FloatingPointError, match="diverged: pred_value"):
            learner.fit(log_every=1)

    @pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
    @pytest.mark.parametrize("name", BASELINES)
    def test_a_setting_that_is_not_finite_is_named(self, name: str, number: float) -> None:
        settings = algorithm(name).Settings
        fields = [field.name for field in dataclasses.fields(settings) if "float" in field.type]
        assert {"lr", "actor_lr"} & set(fields)
        for field in fields:
            if (name, field, number) != ("awac", "max_weight", math.inf):
                with pytest.raises(ValueError, match=f"{field}={number} must be finite"):
                    settings(**{field: number})

    @pytest.mark.parametrize("wrong", [{"gamma": 1.0}, {"gamma": -0.1}, {"tau": 0.0}, {"tau": 1.1}])
    @pytest.mark.parametrize("case", SMALL)
    def test_settings_out_of_range_are_named(self, case: str, wrong: dict[str, float]) -> None:
        with pytest.raises(ValueError, match=r"gamma must be in \[0, 1\), tau in \(0, 1\]"):
            small(case, **wrong)


@pytest.mark.parametrize("name", BASELINES)
def test_an_environment_of_other_bounds_is_told(name: str) -> None:
    """A policy that acts in [-1, 1] would use half of the torque, without a word."""
    module = algorithm(name)
    policy = module.policy(
        3, 1, module.Settings(**({"target_return": 0.0} if name == "dt" else {}))
    )
    short: dict[str, Any] = {"episodes": 1, "env_kwargs": {"max_episode_steps": 2}}
    with pytest.warns(UserWarning, match=r"Pendulum-v1 have the bounds \[-2.\] and \[2.\]"):
        evaluate(policy, "Pendulum-v1", **short)
