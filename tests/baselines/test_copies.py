"""Copies of a loss compute what it computes, and an interruption leaves a loss as it is."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.objectives.common import LossModule

from baselines import Learner, dt
from iwsft import HardSync, ImportanceWeightedMLE
from iwsft.samplers import TrajectorySampler
from iwsft.training import Schedule
from iwsft.trajectory import REF_LOG_PROB
from tests.baselines.conftest import MakeTrajectories
from tests.baselines.dt_cases import SMALL as SMALL_DT
from tests.baselines.test_every_critic import DROPOUT, SMALL, build
from tests.test_training import small_policy

CRITICS = [*SMALL, *DROPOUT, "cql-antmaze", "td3-bc-undelayed", "rebrac-undelayed"]
OURS: dict[str, dict[str, Any]] = {
    "lagged": {"proposal": "lagged"},
    "lagged, module itself": {"proposal": "lagged", "functional": False},
    "current": {"proposal": "current"},
    "reference": {"proposal": "reference"},
}
Fresh = Callable[[], Learner]


@pytest.fixture(params=[*CRITICS, "dt", *OURS])
def fresh(request: Any, make_trajectories: MakeTrajectories) -> Fresh:
    """Makes an untrained learner, at each call the same."""

    def make() -> Learner:
        data, case = make_trajectories(), request.param
        if case == "dt":
            return dt.build(data, SMALL_DT, seed=0)
        if case not in OURS:
            return build(case, data)
        data[REF_LOG_PROB] = torch.linspace(-3, -1, len(data))
        policy = small_policy()
        loss = ImportanceWeightedMLE(policy, **OURS[case])
        updater = HardSync(loss, every=4) if loss.proposal == "lagged" else None
        sampler = TrajectorySampler(data, 8)
        return Learner(policy, loss, sampler, Schedule(steps=6, lr=0.01), updater)

    return make


def trained(learner: Learner) -> Learner:
    learner.fit()
    return learner


def outcome(loss: LossModule, batch: TensorDictBase) -> dict[str, Tensor]:
    """All outputs of a call and all gradients."""
    if hasattr(loss, "phase"):
        loss.phase = True
    loss.zero_grad()
    torch.manual_seed(3)
    out = loss(batch)
    sum(value for name, value in out.items() if name.startswith("loss")).backward()
    gradients = {name: p.grad.clone() for name, p in loss.named_parameters() if p.grad is not None}
    assert any(name.startswith("actor_network") for name in gradients)
    return {**out.detach(), **gradients}


def into_a_fresh_one(loss: LossModule, fresh: Fresh, batch: TensorDictBase) -> LossModule:
    """Through its state_dict, into one that has been called and so has its caches."""
    other = fresh().loss
    outcome(other, batch)
    other.load_state_dict(loss.state_dict())
    return other


@pytest.mark.filterwarnings("ignore:No target network updater")
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "state_dict"])
def test_a_copy_has_the_same_loss_and_gradients(fresh: Fresh, way: str) -> None:
    learner = trained(fresh())
    batch = learner.sampler.sample()
    expected = outcome(learner.loss, batch)
    copied = {
        "deepcopy": lambda: deepcopy(learner.loss),
        "pickle": lambda: pickle.loads(pickle.dumps(learner.loss)),
        "state_dict": lambda: into_a_fresh_one(learner.loss, fresh, batch),
    }[way]()
    torch.testing.assert_close(outcome(copied, batch), expected, rtol=0, atol=0)
    # Each has its own parameters.
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.mul_(1.5)
    torch.testing.assert_close(outcome(learner.loss, batch), expected, rtol=0, atol=0)
    moved = outcome(copied, batch)
    assert not all(torch.equal(moved[name], expected[name]) for name in expected)


def test_a_copied_learner_trains_as_the_original(fresh: Fresh) -> None:
    learner = trained(fresh())
    copied = deepcopy(learner)
    states = []
    for each in (learner, copied):
        torch.manual_seed(4)
        states.append((trained(each).policy.state_dict(), each.loss.state_dict()))
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)


def test_ctrl_c_in_a_network_stays_one(fresh: Fresh) -> None:
    """While parameters are swapped into the network; the next call is as if nothing had been."""
    learner, armed = trained(fresh()), True
    batch = learner.sampler.sample()
    expected = outcome(learner.loss, batch)

    def interrupt(*_: Any) -> None:
        if armed:
            raise KeyboardInterrupt

    hooks = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _: interrupt() if isinstance(module, torch.nn.Linear) else None
    )
    with pytest.raises(KeyboardInterrupt):
        trained(learner)
    armed = False
    torch.testing.assert_close(outcome(learner.loss, batch), expected, rtol=0, atol=0)
    hooks.remove()


def test_an_error_leaves_the_network_its_own_parameters() -> None:
    loss = ImportanceWeightedMLE(small_policy())
    before = {name: id(x) for name, x in loss.actor_network.named_parameters()}
    with pytest.raises(RuntimeError, match="broken"), loss.network(lagged=True) as q:
        assert {name: id(x) for name, x in q.named_parameters()} != before
        raise RuntimeError("broken")
    assert {name: id(x) for name, x in loss.actor_network.named_parameters()} == before
