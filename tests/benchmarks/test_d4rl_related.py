"""Related methods in control: the loss of a run against the equations of the papers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch import Tensor

from benchmarks.d4rl.options import RELATED, Estimator, Options
from benchmarks.d4rl.run import Run
from benchmarks.d4rl.train import build_fine_tuning
from iwsft import GaussianPolicy, ImportanceWeights
from iwsft.trajectory import (
    ACTION,
    DATA_WEIGHT,
    DONE,
    MULTIPLICITY,
    OBSERVATION,
    REF_LOG_PROB,
    REWARD,
    TRAJ_IDS,
    from_steps,
    lengths,
)
from tests.oracles import family

SIZES = torch.tensor([5, 1, 9, 3, 4])


def episodes() -> TensorDict:
    draw = torch.Generator().manual_seed(0)
    ids = torch.arange(len(SIZES)).repeat_interleave(SIZES)
    done = torch.zeros(len(ids), dtype=torch.bool)
    done[SIZES.cumsum(0) - 1] = True
    return from_steps(
        {
            OBSERVATION: torch.randn(len(ids), 3, generator=draw, dtype=torch.float64),
            ACTION: torch.rand(len(ids), 2, generator=draw, dtype=torch.float64) * 1.6 - 0.8,
            REWARD: torch.randn(len(ids), generator=draw, dtype=torch.float64),
            DONE: done,
            REF_LOG_PROB: torch.zeros(len(ids), dtype=torch.float64),
        },
        ids,
    )


def make_run(algo: str, **options: Any) -> Run:
    return Run("tracking", algo, 0, Options(algo=(algo,), **options), "tracking")


def by_step(equation: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """An equation of whole trajectories, where each step is one."""
    return lambda log_p, old: torch.stack(
        [equation(*pair) for pair in zip(log_p, old, strict=True)]
    )


@pytest.mark.parametrize("estimator", ["steps", "trajectories"])
@pytest.mark.parametrize("algo", RELATED)
def test_the_gradient_is_that_of_the_equation(algo: str, estimator: Estimator) -> None:
    signed = RELATED[algo].signed
    run = make_run(algo, estimator=estimator, **({} if signed else {"top": 80.0}))
    torch.manual_seed(0)
    policy = GaussianPolicy(3, 2).double()
    data = run.curate(episodes())
    # Ratios on both sides of 1.
    before = policy.get_dist(data).log_prob(data[ACTION]).detach()
    data[REF_LOG_PROB].copy_(before + 0.3 * torch.randn(len(data), dtype=torch.float64))
    loss = build_fine_tuning(run, data, policy)[0].loss
    if algo == "psft":
        # The reference is the policy at the sync, from which it moves.
        torch.testing.assert_close(data[REF_LOG_PROB], before)
        with torch.no_grad():
            for value in loss.actor_network_params.values(True, True):
                value.add_(0.1 * torch.randn_like(value))
    scores = torch.stack([part.sum() for part in data[REWARD].split(lengths(data).tolist())])
    reward = (scores - scores.mean()) / scores.std(correction=0)
    log_p, truth = loss.log_prob(data), torch.zeros((), dtype=torch.float64)
    for j in range(len(scores)):
        steps = data[TRAJ_IDS] == data[TRAJ_IDS].unique()[j]
        equations: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "psft": lambda log_p, old: family.psft(log_p, old, 0.2),
            # k = 1 is that of the mean log-ratio.
            "minor-sft": lambda log_p, old: family.minor_sft(log_p, old, 1 / len(log_p))[None],
            "topr": by_step(lambda x, old, r=float(reward[j]): family.topr(x, old, r)),
        }
        of_steps = equations[algo](log_p[steps], data[REF_LOG_PROB][steps])
        divisor = 1 if algo == "minor-sft" else int(steps.sum())
        truth = truth + of_steps.sum() / divisor / len(scores)
    parameters = list(loss.actor_network_params.values(True, True))
    expected = torch.autograd.grad(truth, parameters)
    actual = torch.autograd.grad(loss(data)["loss_iw_mle"], parameters)
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)
    ratio = (log_p - data[REF_LOG_PROB]).exp()
    assert bool((ratio > 1.2).any()) and bool((ratio < 1).any())


def test_signed_methods_weigh_all_data_by_their_returns() -> None:
    data, topr = (make_run(algo).curate(episodes()) for algo in ("bc", "topr"))
    assert len(topr) == len(data) and set(topr[MULTIPLICITY].tolist()) == {1}
    ends = SIZES.cumsum(0) - 1
    weights = topr[DATA_WEIGHT][ends]
    assert float(weights.mean()) == pytest.approx(0, abs=1e-6)
    assert float(weights.square().mean()) == pytest.approx(1, abs=1e-6)
    equal = episodes()
    equal[REWARD].zero_()
    with pytest.raises(ValueError, match="topr: all 5 returns are equal"):
        make_run("topr").curate(equal)


def test_the_temperature_of_minor_sft_is_an_option() -> None:
    chain = make_run("minor-sft", temperature=2.0).weights
    assert chain.trajectory == ImportanceWeights.minor_sft(2.0).trajectory
