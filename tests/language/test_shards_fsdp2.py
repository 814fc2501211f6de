"""FSDP2 on two processes: shards of q, swapped in, are the whole model's moving average; DDP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from shards_models import Average, decoder, packed, sharded, values
from torch import Tensor

from iwsft import CausalLMPolicy
from iwsft.language.shards import Shards

# dtype of the computation, whether layers are sharded again after their forward; the root is not.
CASES = [(torch.float32, False), (torch.bfloat16, True)]


def _sharded(dtype: torch.dtype, reshard: bool) -> Any:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    model = decoder()
    model.model.norm.requires_grad_(False)
    options: dict[str, Any] = {
        "mesh": dist.init_device_mesh("cpu", (2,)),
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype),
    }
    for layer in model.model.layers:
        fully_shard(layer, reshard_after_forward=reshard, **options)
    fully_shard(model, **options)
    return model


def _log_prob(model: Any, seed: int) -> Tensor:
    return CausalLMPolicy(model).log_prob(packed(seed))


def _train(model: Any, optimizer: torch.optim.Optimizer, seed: int) -> float:
    optimizer.zero_grad()
    loss = -_log_prob(model, seed).mean()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _optimizer(model: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.03)


def _gathered(model: Any) -> dict[str, Tensor]:
    return {n: p.full_tensor().detach() for n, p in model.named_parameters() if p.requires_grad}


def _shards(model: Any) -> list[Tensor]:
    return [p.to_local().detach().clone() for p in model.parameters()]


def _check(model: Any, rank: int, dtype: torch.dtype) -> list[float]:
    """Train, with q swapped in before each update; the losses."""
    optimizer = _optimizer(model)
    (shards, q), truth = sharded(model), Average(_gathered(model))
    whole = decoder().to(dtype)
    loose = {"rtol": 0.02, "atol": 0.05} if dtype == torch.bfloat16 else {}
    losses = []
    for update in range(4):
        before = _shards(model)
        with shards.swapped():
            _log_prob(model, 98)
            ours = _log_prob(model, 99)
        after = _shards(model)
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        whole.load_state_dict(truth.q, strict=False)
        whole.tie_weights()
        torch.testing.assert_close(ours, CausalLMPolicy(whole).log_prob(packed(99)), **loose)
        losses.append(_train(model, optimizer, 10 * update + rank))
        # An evaluation leaves the root gathered.
        with torch.no_grad():
            _log_prob(model, 99)
        q.step()
        truth.step(_gathered(model))
    with shards.swapped():
        for name, value in _gathered(model).items():
            torch.testing.assert_close(value.double(), truth.q[name], rtol=1e-6, atol=1e-7)
    state = shards.state_dict()
    local = {n: p.to_local().shape for n, p in model.named_parameters() if p.requires_grad}
    assert {name: value.shape for name, value in state.items()} == local
    _check_exception(model, shards)
    return losses


def _check_exception(model: Any, shards: Shards) -> None:
    """A forward of q that breaks off in the middle leaves theta to shards and forward."""

    def fail(*_: object) -> None:
        raise ZeroDivisionError

    before = _shards(model)
    expected = _log_prob(model, 99).detach()
    model.zero_grad()
    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError), shards.swapped():
        _log_prob(model, 99)
    hook.remove()
    after = _shards(model)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    if hasattr(model, "reset_iter_state"):
        assert torch.equal(_log_prob(model, 99), expected)


def _check_replicated(rank: int) -> None:
    model = torch.nn.parallel.DistributedDataParallel(decoder())
    optimizer = _optimizer(model)
    (shards, q), truth = sharded(model), Average(values(model))
    for update in range(2):
        with shards.swapped():
            _log_prob(model, 99)
        _train(model, optimizer, 10 * update + rank)
        q.step()
        truth.step(values(model))
    with shards.swapped():
        for name, value in values(model).items():
            torch.testing.assert_close(value.double(), truth.q[name], rtol=1e-6, atol=1e-7)


def _work(rank: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    from torch.distributed.fsdp import FullyShardedDataParallel

    first = FullyShardedDataParallel(torch.nn.Linear(4, 4), device_id=torch.device("cpu"))
    with pytest.raises(NotImplementedError, match="use FSDP2"):
        Shards(first)
    for dtype, reshard in CASES:
        losses = _check(_sharded(dtype, reshard), rank, dtype)
        model = _sharded(dtype, reshard)
        optimizer = _optimizer(model)
        assert losses == [_train(model, optimizer, 10 * update + rank) for update in range(4)]
    _check_replicated(rank)
    dist.destroy_process_group()


def test_shards_are_the_average(on_two_processes: Any, tmp_path: Path) -> None:
    on_two_processes(_work, str(tmp_path / "store"))
