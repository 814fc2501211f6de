"""torch.compile of the loss, in one graph, gives the eager numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from iwsft import EMA, ImportanceWeightedMLE, ImportanceWeights, reweight, weights
from iwsft.trajectory import pad

PROPOSALS = ("current", "reference", "lagged", "cached")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compare(
    loss: ImportanceWeightedMLE, batches: list[TensorDict], backend: str = "aot_eager"
) -> None:
    parameters = list(loss.parameters())
    eager = [loss(batch) for batch in batches]
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for batch, expected in zip(batches, eager, strict=True):
        out = compiled(batch)
        assert list(out.keys()) == list(expected.keys())
        for key in out.keys():
            torch.testing.assert_close(out[key], expected[key], equal_nan=True, msg=key)
        ours = torch.autograd.grad(out["loss_iw_mle"], parameters)
        truth = torch.autograd.grad(expected["loss_iw_mle"], parameters)
        for a, b in zip(ours, truth, strict=True):
            torch.testing.assert_close(a, b)


def serve(loss: ImportanceWeightedMLE, batch: TensorDict) -> None:
    if loss.proposal == "lagged":
        EMA(loss, decay=0.9)
        with torch.no_grad():
            for parameter in loss.parameters():
                parameter.mul_(1.2)
    if loss.proposal == "cached":
        reweight(batch, loss)


@pytest.mark.parametrize("proposal", PROPOSALS)
@pytest.mark.parametrize("functional", [True, False], ids=["functional", "module"])
def test_packed(make_loss: Any, make_batch: Any, proposal: str, functional: bool) -> None:
    loss, batch = make_loss(proposal, functional), make_batch()
    serve(loss, batch)
    compare(loss, [batch])


@pytest.mark.parametrize("proposal", PROPOSALS)
def test_padded(make_loss: Any, make_batch: Any, proposal: str) -> None:
    loss, batch = make_loss(proposal), pad(make_batch())
    serve(loss, batch)
    compare(loss, [batch])


def test_batches_of_other_sizes(make_loss: Any, make_batch: Any) -> None:
    loss = make_loss("current")
    compare(loss, [make_batch(sizes, seed=len(sizes)) for sizes in ([4, 9], [3, 8, 2], [6] * 4)])


@pytest.mark.parametrize("reduce", ["sum", None])
def test_all_transforms_with_the_inductor(make_loss: Any, make_batch: Any, reduce: Any) -> None:
    chain = ImportanceWeights(
        step=[weights.Temperature(0.5), weights.ClipLogRatio(-1, 1), weights.Scale(0.5)],
        reduce=reduce,
        trajectory=[weights.TemperWeight(0.5), weights.TargetESS(0.8), weights.SelfNormalize()],
    )
    loss, batch = make_loss("lagged", importance_weights=chain), make_batch()
    serve(loss, batch)
    compare(loss, [batch], backend="inductor")
