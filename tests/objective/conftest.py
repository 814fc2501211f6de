"""Small batches and losses, built from a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from iwsft import (
    EMA,
    GaussianPolicy,
    ImportanceWeightedMLE,
    ImportanceWeights,
    reweight,
    weights,
)
from iwsft.trajectory import MULTIPLICITY, REF_LOG_PROB, from_steps

OBSERVATION_DIM, ACTION_DIM = 3, 2
LENGTHS = (5, 1, 9, 3)
MakeBatch = Callable[..., TensorDict]
MakePolicy = Callable[..., GaussianPolicy]
MakeLoss = Callable[..., ImportanceWeightedMLE]


@pytest.fixture(scope="session")
def make_policy() -> MakePolicy:
    """``make_policy(seed=0, dtype=torch.float32, **settings)``: a small Gaussian policy."""

    def make(seed: int = 0, dtype: torch.dtype = torch.float32, **settings: Any) -> GaussianPolicy:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            defaults: dict[str, Any] = {"hidden": (8, 8), "log_std_init": -0.3}
            policy = GaussianPolicy(OBSERVATION_DIM, ACTION_DIM, **defaults | settings)
        return policy.to(dtype)

    return make


@pytest.fixture(scope="session")
def make_batch(make_policy: MakePolicy) -> MakeBatch:
    """``make_batch(lengths, seed=0, dtype=torch.float32, multiplicity=True)``: packed.

    ``ref_log_prob`` is that of another policy, so weights differ from 1.
    """

    def make(
        lengths: Sequence[int] = LENGTHS,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        multiplicity: bool = True,
    ) -> TensorDict:
        generator = torch.Generator().manual_seed(seed)
        sizes = torch.tensor(lengths)
        n = int(sizes.sum())
        ids = torch.repeat_interleave(torch.arange(len(lengths)), sizes)
        batch = from_steps(
            {
                "observation": torch.randn(n, OBSERVATION_DIM, generator=generator, dtype=dtype),
                "action": 2 * torch.rand(n, ACTION_DIM, generator=generator, dtype=dtype) - 1,
            },
            ids,
        )
        with torch.no_grad():
            batch.set(REF_LOG_PROB, make_policy(seed=99, dtype=dtype).log_prob(batch.copy()))
        if multiplicity:
            draws = torch.randint(1, 4, (len(lengths),), generator=generator)
            batch.set(MULTIPLICITY, draws[ids])
        return batch

    return make


@pytest.fixture(scope="session")
def make_loss(make_policy: MakePolicy) -> MakeLoss:
    """``make_loss(proposal, functional=True, policy=None, **settings)``: weights far from 1."""

    def make(
        proposal: str = "lagged",
        functional: bool = True,
        policy: torch.nn.Module | None = None,
        **settings: Any,
    ) -> ImportanceWeightedMLE:
        chain = ImportanceWeights(
            step=[weights.Temperature(2.0), weights.ClipRatio(0.1, 10.0)],
            reduce="mean",
            trajectory=[weights.ClipWeight(max=2.0), weights.SelfNormalize()],
        )
        return ImportanceWeightedMLE(
            make_policy() if policy is None else policy,
            proposal=proposal,  # type: ignore[arg-type]
            functional=functional,
            **{"importance_weights": chain} | settings,
        )

    return make


@pytest.fixture(scope="session")
def ready(make_loss: MakeLoss, make_batch: MakeBatch) -> Callable[..., Any]:
    """``ready(proposal, functional=True, **settings)``: a loss whose q is served, and a batch."""

    def make(
        proposal: str, functional: bool = True, **settings: Any
    ) -> tuple[ImportanceWeightedMLE, TensorDict]:
        loss, batch = make_loss(proposal, functional, **settings), make_batch()
        if proposal == "lagged":
            EMA(loss, decay=0.9)
        if proposal == "cached":
            reweight(batch, loss)
        return loss, batch

    return make
