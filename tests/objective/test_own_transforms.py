"""Transforms that a user writes: what they may read, and what they must give."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tensordict import NestedKey
from torch import Tensor

from iwsft import ImportanceWeightedMLE, ImportanceWeights, weights
from iwsft.trajectory import MULTIPLICITY, TRAJ_IDS, pad


class _Cautious:
    """Log-ratios count less where an entry of the batch is larger."""

    def __init__(self, reads: NestedKey) -> None:
        self.reads = reads

    def __call__(self, log_ratio: Tensor, doubt: Tensor) -> Tensor:
        return log_ratio * (1 - doubt)


@pytest.mark.parametrize("key", ["doubt", ("critic", "doubt")])
@pytest.mark.parametrize("padded", [False, True])
def test_any_entry_of_the_batch_can_be_read(
    make_batch: Any, make_policy: Any, key: NestedKey, padded: bool
) -> None:
    policy, batch = make_policy(), make_batch()
    doubt = torch.rand(len(batch), generator=torch.Generator().manual_seed(0))
    chain = ImportanceWeights(step=[_Cautious(key)])
    loss = ImportanceWeightedMLE(policy, importance_weights=chain, proposal="current")
    assert key in loss.in_keys
    with pytest.raises(KeyError, match=r"doubt.* in the batch: your own code writes it"):
        loss(batch)
    batch.set(key, doubt)
    with torch.no_grad():
        log_p = policy.log_prob(batch.copy())
    ratio = (log_p - batch["ref_log_prob"]) * (1 - doubt)
    expected, draws = 0.0, 0
    for trajectory in batch[TRAJ_IDS].unique():
        steps = batch[TRAJ_IDS] == trajectory
        count = int(batch[MULTIPLICITY][steps][0])
        expected -= count * float(ratio[steps].mean().exp() * log_p[steps].mean())
        draws += count
    out = loss(pad(batch) if padded else batch)
    assert float(out["loss_iw_mle"]) == pytest.approx(expected / draws, rel=1e-5)


@pytest.mark.parametrize(
    ("place", "transform", "gave"),
    [
        ("step", lambda x: x.unsqueeze(-1), r"\[18, 1\]"),
        ("step", lambda x: x.mean(), r"\[\]"),
        ("step", lambda x: x.numpy(), "ndarray"),
        ("trajectory", lambda x, share: x[:2], r"\[2\]"),
    ],
)
@pytest.mark.parametrize("reduce", ["mean", None])
def test_a_transform_gives_a_weight_for_each_that_it_takes(
    make_batch: Any,
    make_policy: Any,
    place: str,
    transform: Callable[..., Any],
    gave: str,
    reduce: Any,
) -> None:
    """A column of step weights would weigh each step by all of them."""
    chain: Any = ImportanceWeights(**{place: [transform]}, reduce=reduce)
    loss = ImportanceWeightedMLE(make_policy(), importance_weights=chain, proposal="current")
    loss.select_out_keys("loss_iw_mle")
    with pytest.raises(ValueError, match=rf"lambda.* gave {gave}; it must give a tensor"):
        loss(make_batch())


def test_what_is_no_function_is_no_transform() -> None:
    for given in (weights.Temperature, 2.0):
        with pytest.raises(TypeError, match="a transform is a function of weights"):
            ImportanceWeights(step=[given])  # type: ignore[list-item]


class _Greedy:
    """Uses the memory of all that it reads."""

    reads = "doubt"

    def __init__(self, place: str) -> None:
        self.place = place

    def __call__(self, x: Tensor, *others: Tensor) -> Tensor:
        for each in others:
            each.mul_(torch.linspace(0, 1, len(each), dtype=each.dtype))
        return x * others[-1]


@pytest.mark.parametrize("place", ["step", "trajectory"])
@pytest.mark.parametrize("reduce", ["mean", None])
def test_what_a_transform_reads_stays_as_it_is(
    ready: Any, assert_same: Any, place: str, reduce: Any
) -> None:
    chain: Any = ImportanceWeights(**{place: [_Greedy(place)]}, reduce=reduce)
    loss, batch = ready("current", importance_weights=chain)
    batch["doubt"] = torch.rand(len(batch), generator=torch.Generator().manual_seed(0))
    before, share = batch.clone(), loss.share(batch, loss.segments(batch))
    assert torch.equal(loss.terms(batch).share, share)
    assert_same(batch, before)


class _Clip:
    """A clip that works in place, or does not."""

    clips = True

    def __init__(self, in_place: bool, place: str) -> None:
        self.in_place, self.place = in_place, place

    def __call__(self, x: Tensor, *share: Tensor) -> Tensor:
        return x.clamp_(-0.1, 0.1) if self.in_place else x.clamp(-0.1, 0.1)


@pytest.mark.parametrize("place", ["step", "trajectory"])
@pytest.mark.parametrize("reduce", ["mean", None])
@pytest.mark.parametrize("signed", [False, True])
def test_a_transform_may_work_in_place(
    ready: Any, assert_same: Any, place: str, reduce: Any, signed: bool
) -> None:
    """Steps of negative data weight are weighed by a chain of their own."""
    found = []
    for in_place in (True, False):
        other: Any = ImportanceWeights(trajectory=[weights.ClipWeight(max=5.0)], reduce=reduce)
        clip = {place: [_Clip(in_place, place)]}
        chain: Any = ImportanceWeights(**clip, reduce=reduce, negative=other if signed else None)
        loss, batch = ready("current", importance_weights=chain)
        batch["data_weight"] = 1.0 - 1.5 * signed * (batch[TRAJ_IDS] % 2)
        found.append(loss(batch))
    assert_same(*found)
    assert found[0]["clip_fraction"] > 0
