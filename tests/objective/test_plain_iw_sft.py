"""Training with the loss against the plain version of the method, which the docs show."""

from __future__ import annotations

import inspect
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from iwsft import EMA, ImportanceWeightedMLE, ImportanceWeights, annotate_reference
from iwsft.samplers import TrajectorySampler
from iwsft.trajectory import ACTION, MASK, MULTIPLICITY, OBSERVATION, TRAJ_IDS, pad
from tests.oracles.iw_sft import NaiveIwSft
from tests.oracles.networks import PlainGaussian, mlp

K, DECAY, LR = 0.7, 0.9, 1e-2


def test_updates_are_those_of_the_plain_method(make_batch: Any, make_policy: Any) -> None:
    """Twenty updates on ragged trajectories: the same policy, the same q, weights far from 1."""
    reference = make_policy(dtype=torch.float64)
    log_std, *layers = reference.parameters()
    plain_reference = PlainGaussian(mlp(layers, nn.Tanh()), log_std).double()
    plain_reference.copy_(reference.parameters())
    trajectories = make_batch(dtype=torch.float64, multiplicity=False)
    padded = pad(trajectories)
    plain = NaiveIwSft(
        padded.get(OBSERVATION),
        padded.get(ACTION),
        padded.get(MASK),
        plain_reference,
        k=K,
        decay=DECAY,
        lr=LR,
    )

    annotate_reference(reference, trajectories)
    policy = deepcopy(reference)
    names = [tuple(name.split(".")) for name, _ in policy.named_parameters()]
    loss = ImportanceWeightedMLE(
        policy, importance_weights=ImportanceWeights.paper_control(K), proposal="lagged"
    )
    q = EMA(loss, decay=DECAY)
    optimizer = torch.optim.Adam(loss.parameters(), lr=LR)
    sampler = TrajectorySampler(trajectories, 6, seed=0)
    weights = []
    for _ in range(20):
        batch = sampler.sample()
        out = loss(batch)
        weights.append(float(out["weight_max"]))
        optimizer.zero_grad()
        out["loss_iw_mle"].backward()
        optimizer.step()
        q.step()
        ids, steps = batch.get(TRAJ_IDS).unique_consecutive(return_counts=True)
        draws = ids.repeat_interleave(batch.get(MULTIPLICITY)[steps.cumsum(0) - steps])
        assert len(draws) == 6
        plain.step(draws)

    assert weights[0] == 1 and weights[-1] > 1.05
    for params, network in (
        (loss.actor_network_params, plain.policy),
        (loss.target_actor_network_params, plain.q),
    ):
        for name, expected in zip(names, network.parameters(), strict=True):
            # The annotated log pi_ref is float32.
            torch.testing.assert_close(params[name].detach(), expected.detach(), rtol=0, atol=1e-7)


def test_the_docs_show_the_plain_method() -> None:
    page = (Path(__file__).parents[2] / "docs" / "algorithm.md").read_text()
    assert f"```python\n{inspect.getsource(NaiveIwSft)}```" in page
