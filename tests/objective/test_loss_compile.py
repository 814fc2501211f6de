"""torch.compile of the loss, in one graph, gives the eager numbers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from iwsft import EMA, ImportanceWeightedMLE, ImportanceWeights, reweight, weights
from iwsft.trajectory import Segments, pad


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
        for key, value in out.items():
            torch.testing.assert_close(value, expected[key], equal_nan=True, msg=key)
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


@pytest.mark.parametrize("proposal", ["reference", "cached"])
def test_packed(make_loss: Any, make_batch: Any, proposal: str) -> None:
    loss, batch = make_loss(proposal, importance_weights=None), make_batch()
    serve(loss, batch)
    # A lagged q, and what the default backend makes of the graph, are tested once, below.
    compare(loss, [batch], backend="eager")


def test_packed_batches_of_other_sizes(make_loss: Any, make_batch: Any) -> None:
    loss = make_loss("current", importance_weights=None, normalize_data_weights=True)
    batches = [make_batch([4, 9]), make_batch([3, 8, 2, 9], seed=1)]
    for batch in batches:
        batch["data_weight"] = torch.linspace(0.0, 2.0, len(batch))
    compare(loss, batches, backend="eager")


@pytest.mark.parametrize("functional", [True, False], ids=["functional", "module"])
def test_padded(make_loss: Any, make_batch: Any, functional: bool) -> None:
    loss, batch = make_loss("lagged", functional), pad(make_batch())
    serve(loss, batch)
    compare(loss, [batch])


def test_default_backend(make_loss: Any, make_batch: Any) -> None:
    loss, batch = make_loss("lagged", importance_weights=None), make_batch()
    serve(loss, batch)
    compare(loss, [batch], backend="inductor")


@pytest.mark.parametrize("reduce", ["sum", None])
def test_every_transform(make_batch: Any, reduce: Any) -> None:
    chain = ImportanceWeights(
        step=[
            weights.Temperature(0.5),
            weights.ClipLogRatio(-1, 1),
            weights.ClipRatio(0.5, 2),
            weights.Scale(0.3),
        ],
        reduce=reduce,
        trajectory=[
            weights.TemperWeight(0.5),
            weights.ClipWeight(0.1, 1.2),
            weights.TargetESS(0.8),
            weights.SelfNormalize(),
        ],
    )
    batch = make_batch()
    segments = Segments.of(batch)
    count = batch["multiplicity"] / segments.spread(segments.lengths)
    log_ratio = torch.linspace(-2, 2, len(count))
    expected = chain(log_ratio, segments, count)
    compiled = torch.compile(chain.__call__, fullgraph=True, backend="eager")
    for ours, truth in zip(compiled(log_ratio, segments, count), expected, strict=True):
        torch.testing.assert_close(ours, truth)
