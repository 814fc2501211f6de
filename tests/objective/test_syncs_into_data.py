"""A sync writes into the trajectories themselves, and tells of batches that it does not reach."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from tensordict import LazyStackedTensorDict
from torchrl.data import LazyTensorStorage, ReplayBuffer, TensorStorage

from iwsft import HardSync, ImportanceWeightedMLE, ImportanceWeights, annotate_reference, reweight
from iwsft.trajectory import pad


@torch.no_grad()
def nudge(loss: ImportanceWeightedMLE, seed: int) -> None:
    """Move the policy as an update would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in loss.parameters():
        parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def test_syncs_write_into_a_lazy_stack(make_loss: Any, make_batch: Any) -> None:
    """Reading an entry of it makes a copy, which a sync must not write into."""
    dense = pad(make_batch([4, 4, 4]))
    lazy = LazyStackedTensorDict(*dense.clone().unbind(0), stack_dim=0)
    loss = make_loss("cached")
    syncs = [HardSync(loss, every=1, trajectories=data) for data in (dense, lazy)]
    start = syncs[1].state_dict()
    nudge(loss, 0)
    for sync in syncs:
        sync.step()
    assert not torch.equal(lazy["importance_weight"], start["importance_weight"])
    torch.testing.assert_close(lazy["importance_weight"], dense["importance_weight"])
    syncs[1].load_state_dict(start)
    assert torch.equal(lazy["importance_weight"], start["importance_weight"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss(lazy)
    shorter = HardSync(loss, every=1, trajectories=pad(make_batch([4, 4])))
    with pytest.raises(ValueError, match=r"of trajectories \[3, 4\], and these are \[2, 4\]"):
        shorter.load_state_dict(start)


@pytest.mark.parametrize("proposal", ["cached", "current"])
@pytest.mark.parametrize("copies", [True, False])
def test_a_copy_that_syncs_do_not_reach_is_told_of(
    make_loss: Any, make_batch: Any, proposal: str, copies: bool
) -> None:
    """A replay buffer copies what it is extended with: its weights would stay 1, as in SFT."""
    data, settings = make_batch(), {}
    if proposal == "current":
        settings = {"importance_weights": ImportanceWeights.psft()}
    loss = make_loss(proposal, **settings)
    sync = HardSync(loss, every=1, trajectories=data)
    buffer = ReplayBuffer(storage=LazyTensorStorage(len(data)) if copies else TensorStorage(data))
    if copies:
        buffer.extend(data)
    for update in range(3):
        batch = buffer[:]
        told = pytest.warns(UserWarning, match="it is older, of other data, or a copy")
        with told if copies and update else warnings.catch_warnings():
            warnings.simplefilter("always" if copies and update else "error")
            weight = loss(batch)["weight_max"]
        reached = loss(data)["weight_max"]
        assert (weight == reached) == (not copies or update == 0)
        nudge(loss, update)
        sync.step()


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16])
def test_an_entry_that_would_round_the_weights_is_refused(
    make_loss: Any, make_batch: Any, dtype: torch.dtype
) -> None:
    data, exact = make_batch(), make_batch()
    data["importance_weight"] = torch.ones(len(data), dtype=dtype)
    for write in (reweight, lambda x, loss: HardSync(loss, every=1, trajectories=x)):
        with pytest.raises(ValueError, match=f"'importance_weight' holds {dtype}.*exclude it"):
            write(data, make_loss("cached"))
    with pytest.raises(ValueError, match=f"'importance_weight' holds {dtype}.*exclude it"):
        make_loss("cached")(data)
    for write in (reweight, lambda x, loss: HardSync(loss, every=1, trajectories=x)):
        with pytest.raises(ValueError, match="trajectories are locked: call trajectories.unlock_"):
            write(exact.copy().lock_(), make_loss("cached"))
    data["importance_weight"] = data["importance_weight"].float()
    for each in (data, exact):
        reweight(each, make_loss("cached"))
    assert torch.equal(data["importance_weight"], exact["importance_weight"])
    assert bool((exact["importance_weight"] % 1 != 0).any())


@pytest.mark.parametrize("proposal", ["current", "lagged", "reference"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.bfloat16])
def test_a_reference_that_would_round_the_weights_is_refused(
    ready: Any, make_policy: Any, proposal: str, dtype: torch.dtype
) -> None:
    loss, data = ready(proposal)
    exact = data["ref_log_prob"]
    rounded = data.copy().set("ref_log_prob", exact.to(dtype))
    with pytest.raises(ValueError, match=f"'ref_log_prob' holds {dtype}.*exclude it"):
        loss(rounded)
    with pytest.raises(ValueError, match=f"'given_ref_log_prob' holds {dtype}.*exclude it"):
        given = data.copy().set("given_ref_log_prob", exact.to(dtype))
        annotate_reference(make_policy(), given)
    # The way out.
    annotate_reference(make_policy(seed=99), rounded)
    assert torch.equal(rounded["ref_log_prob"], exact)
    # A column takes no other shape of the data's own log-probs with it.
    column = data.copy().set("given_ref_log_prob", exact[:, None])
    assert torch.equal(annotate_reference(make_policy(), column)["ref_log_prob"], exact)
