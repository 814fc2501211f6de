"""The library makes the updates of iw-SFT in plain torch, and docs show exactly that code."""

from __future__ import annotations

import inspect
from copy import deepcopy
from pathlib import Path

import torch
from tensordict import TensorDict

from iwsft import EMA, GaussianPolicy, ImportanceWeightedMLE, ImportanceWeights
from iwsft.trajectory import ACTION, MASK, OBSERVATION, REF_LOG_PROB, TRAJ_IDS
from tests.oracles.iw_sft import NaiveIwSft
from tests.oracles.networks import PlainGaussian


def test_thirty_updates_are_those_of_the_plain_version() -> None:
    torch.manual_seed(0)
    lengths = torch.tensor([3, 7, 1, 5, 7, 2])
    mask = torch.arange(7) < lengths[:, None]
    observation = torch.randn(6, 7, 4, dtype=torch.float64)
    action = torch.rand(6, 7, 2, dtype=torch.float64) * 2 - 1
    reference = GaussianPolicy(4, 2).double()
    plain = PlainGaussian.of_sizes(4, 2).double()
    plain.copy_(reference.parameters())
    oracle = NaiveIwSft(observation, action, mask, plain, k=3.0, decay=0.8, lr=1e-3)

    policy = deepcopy(reference)
    data = TensorDict(
        {
            OBSERVATION: observation,
            ACTION: action,
            MASK: mask,
            TRAJ_IDS: torch.arange(6)[:, None].expand(6, 7),
        },
        batch_size=[6, 7],
    )
    # annotate_reference keeps float32; in float64 the two sides agree to the last digits.
    data.set(REF_LOG_PROB, reference.log_prob(data).detach())
    loss = ImportanceWeightedMLE(policy, importance_weights=ImportanceWeights.paper_control(3.0))
    q = EMA(loss, decay=0.8)
    optimizer = torch.optim.Adam(loss.parameters(), lr=1e-3)
    for _ in range(30):
        draws = torch.randperm(6)[:4]
        oracle.step(draws)
        optimizer.zero_grad()
        loss(data[draws])["loss_iw_mle"].backward()
        optimizer.step()
        q.step()
    for ours, theirs in zip(policy.parameters(), oracle.policy.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    # The comparison says nothing about policies that have not moved.
    start = reference.log_prob(data)[mask]
    assert (policy.log_prob(data)[mask] - start).abs().max() > 0.1


def test_docs_show_the_plain_version() -> None:
    page = (Path(__file__).parents[2] / "docs" / "algorithm.md").read_text()
    assert f"```python\n{inspect.getsource(NaiveIwSft)}```" in page
