"""DeepSpeed on two processes: shards of q, swapped in, are the whole model's moving average."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from shards_models import Average, decoder, packed, sharded
from torch import Tensor

from iwsft import CausalLMPolicy
from iwsft.language.shards import Shards, compile_nothing

# stage, dtype, persistence threshold: all parameters stay gathered, or none does.
CASES = [
    (3, torch.float32, 10**6),
    (3, torch.bfloat16, 0),
    (2, torch.bfloat16, 0),
    (1, torch.float32, 0),
]


def _engine(stage: int, dtype: torch.dtype, threshold: int) -> Any:
    import deepspeed

    model = decoder()
    model.model.layers[0].requires_grad_(False)
    trained = [p for p in model.parameters() if p.requires_grad]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(trained, lr=0.03),
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": dtype == torch.bfloat16},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": threshold},
            "zero_allow_untested_optimizer": True,
        },
    )
    return engine


def _log_prob(engine: Any, seed: int) -> Tensor:
    return CausalLMPolicy(engine).log_prob(packed(seed))


def _train(engine: Any, seed: int) -> float:
    loss = -_log_prob(engine, seed).mean()
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


def _masters(engine: Any) -> dict[str, Tensor]:
    """Whole float32 parameters, as DeepSpeed gathers them."""
    from deepspeed.utils import safe_get_full_fp32_param

    named = [(n, p) for n, p in engine.module.named_parameters() if p.requires_grad]
    return {name: safe_get_full_fp32_param(p).clone() for name, p in named}


def _shards(engine: Any) -> bytes:
    """What this rank computes with, bit for bit."""
    parts = [getattr(p, "ds_tensor", p.data) for p in engine.module.parameters()]
    return b"".join(bytes(value.contiguous().view(torch.uint8).numpy().data) for value in parts)


def _poison(engine: Any, rank: int) -> None:
    """NaN in what fills ZeRO-3's shards up to equal sizes, which DeepSpeed does not initialise."""
    from deepspeed.utils import safe_get_local_fp32_param

    for parameter in engine.module.parameters():
        if hasattr(parameter, "ds_tensor"):
            real = parameter.ds_numel - rank * len(parameter.ds_tensor)
            parameter.ds_tensor.data[real:] = torch.nan
            if parameter.requires_grad:
                safe_get_local_fp32_param(parameter).data[real:] = torch.nan


def _check(engine: Any, rank: int) -> list[float]:
    """Train, with q swapped in before each update; the losses."""
    _poison(engine, rank)
    (shards, q), truth = sharded(engine), Average(_masters(engine))
    dtype = next(engine.module.parameters()).dtype
    whole = decoder().to(dtype)
    loose = {"rtol": 0.02, "atol": 0.05} if dtype == torch.bfloat16 else {}
    losses = []
    for update in range(4):
        before = _shards(engine)
        with shards.swapped():
            _log_prob(engine, 98)
            ours = _log_prob(engine, 99)
        assert _shards(engine) == before
        # One rank's batch in another order of sums; all else is the same.
        whole.load_state_dict(truth.q, strict=False)
        whole.tie_weights()
        torch.testing.assert_close(ours, CausalLMPolicy(whole).log_prob(packed(99)), **loose)
        losses.append(_train(engine, 10 * update + rank))
        q.step()
        truth.step(_masters(engine))
    _check_state(shards, engine, truth)
    before = _shards(engine)
    with pytest.raises(ZeroDivisionError), shards.swapped():
        assert _shards(engine) != before
        _ = 1 / 0
    assert _shards(engine) == before
    return losses


def _check_state(shards: Shards, engine: Any, truth: Average) -> None:
    """All ranks' parts are the average, each entry once."""
    state = shards.state_dict()
    parts: list[Any] = [None, None]
    dist.all_gather_object(parts, state)
    for name, q in truth.q.items():
        pieces = [part[f"module.{name}"] for part in parts]
        # ZeRO-3 fills shards up to equal sizes.
        assert q.numel() <= sum(map(len, pieces)) <= q.numel() + 1
        assert all(piece.dtype == torch.float32 for piece in pieces)
        joined = torch.cat(pieces)[: q.numel()]
        torch.testing.assert_close(joined.double(), q.flatten(), rtol=1e-6, atol=1e-7)
    assert not any("layers.0." in name for name in state)
    again = Shards(engine)
    again.load_state_dict(state)
    for name, value in again.state_dict().items():
        torch.testing.assert_close(value, state[name], rtol=0, atol=0, equal_nan=True)


def _check_refusals() -> None:
    import deepspeed

    settings = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2},
    }
    model = torch.nn.Linear(4, 4)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters()),
        dist_init_required=False,
        config=settings,
    )
    with pytest.raises(NotImplementedError, match="set zero_hpz_partition_size to 1"):
        Shards(engine)


def _work(rank: int, store: str) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    compile_nothing()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    for case in CASES:
        losses = _check(_engine(*case), rank)
        engine = _engine(*case)
        assert losses == [_train(engine, 10 * update + rank) for update in range(4)]
    _check_refusals()
    dist.destroy_process_group()


def test_shards_are_the_average(on_two_processes: Any, tmp_path: Path) -> None:
    on_two_processes(_work, str(tmp_path / "store"))
