"""Two processes (replicated, FSDP2, ZeRO-3): the reference is one process's, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from reference_cases import VOCABULARY, dataset, decoder
from tensordict import TensorDictBase
from torch import Tensor

from iwsft.language.batches import TrajectoryDataset, collate
from iwsft.language.reference import annotate_tokens, cached_reference
from iwsft.policies import CausalLMPolicy

# One more than two processes share evenly.
BATCHES = [[5, 1, 7], [2, 0], [9, 4, 3], [8], [6]]
# Parameters that two processes do not divide evenly.
UNEVEN = {
    "hidden_size": 21,
    "intermediate_size": 27,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 4,
}


class Breaking(CausalLMPolicy):
    """Counts forwards, and breaks before one of them."""

    def __init__(self, model: Any, *, breaks_at: int | None = None) -> None:
        super().__init__(model)
        self._forwards = 0
        self._breaks_at = breaks_at

    def log_prob(self, trajectories: TensorDictBase) -> Tensor:
        if self._forwards == self._breaks_at:
            raise InterruptedError
        self._forwards += 1
        return super().log_prob(trajectories)


def _replicated(model: Any) -> Any:
    return torch.nn.parallel.DistributedDataParallel(model)


def _fsdp2(model: Any) -> Any:
    from torch.distributed.fsdp import fully_shard

    mesh = dist.init_device_mesh("cpu", (2,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def _zero3(model: Any) -> Any:
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.03),
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
        },
    )
    padded = 0
    for parameter in engine.module.parameters():
        # What is left of the last shard holds whatever memory held.
        filled = parameter.ds_numel - dist.get_rank() * parameter.ds_tensor.ds_numel
        parameter.ds_tensor.data[filled:] = torch.rand(()).add(os.getpid())
        padded += filled < parameter.ds_tensor.ds_numel
    assert (padded > 0) == (dist.get_rank() == 1)
    return engine


def _one_process() -> Tensor:
    """In this process alone, batch by batch."""
    data, theta = dataset(), CausalLMPolicy(decoder(**UNEVEN).eval())
    entries = TrajectoryDataset(data)
    found: dict[int, Tensor] = {}
    for batch in BATCHES:
        rows = theta.log_prob(collate([entries[number] for number in batch])).detach()
        for row, number in zip(rows, sorted(batch), strict=True):
            found[number] = row[: len(entries[number])]
    return torch.cat([found[number] for number in sorted(found)])


def _check(wrap: Callable[[Any], Any], rank: int, folder: Path) -> None:
    truth, data = _one_process(), dataset()
    # Only the first process's folder is used.
    cache = folder / wrap.__name__ / str(rank)
    with pytest.raises(InterruptedError):
        interrupted = Breaking(wrap(decoder(**UNEVEN)), breaks_at=1)
        annotate_tokens(interrupted, data, BATCHES, cache=cache, save_every=0)
    engine = wrap(decoder(**UNEVEN))
    theta = Breaking(engine)
    made = annotate_tokens(theta, data, BATCHES, cache=cache, save_every=0)
    assert torch.equal(data["ref_log_prob"], truth)
    assert (made.batches, made.computed, theta._forwards) == (5, 5, 3)
    dist.barrier()
    assert cache.exists() == (rank == 0)

    # The first update's log-probs are these, with the engine's hooks and gradient.
    theta.train()
    entries = TrajectoryDataset(data)
    batch = collate([entries[number] for number in BATCHES[rank]])
    found = theta.log_prob(batch)
    assert found.requires_grad and torch.equal(found, batch["ref_log_prob"])
    engine.backward(found.sum()) if hasattr(engine, "backward") else found.sum().backward()

    again, resumed = dataset(), dataset()
    kept = annotate_tokens(Breaking(wrap(decoder(**UNEVEN))), again, BATCHES, cache=cache)
    assert (kept.key, kept.computed) == (made.key, 2)
    keys: list[Any] = [None, None]
    dist.all_gather_object(keys, kept.key)
    assert keys[0] == keys[1]
    cached_reference(resumed, keys[0], cache=cache)
    assert torch.equal(again["ref_log_prob"], truth) and torch.equal(resumed["ref_log_prob"], truth)

    for end in (0, -1):
        # In one process's shard alone; the tokens are in no trajectory.
        moved = decoder(**UNEVEN)
        with torch.no_grad():
            moved.model.embed_tokens.weight[end] += 1e-6
        other = annotate_tokens(Breaking(wrap(moved)), dataset(), BATCHES, cache=cache)
        assert other.key not in keys
        keys.append(other.key)
        assert torch.equal(data["ref_log_prob"], truth)


def _check_errors(rank: int, folder: Path) -> None:
    """What one process finds wrong is an error on all."""
    theta = CausalLMPolicy(decoder())
    (folder / "0").write_text("")
    with pytest.raises(FileExistsError):
        annotate_tokens(theta, dataset(), BATCHES, cache=folder / str(rank))
    with pytest.raises(ValueError, match="process 1 holds other trajectories than process 0"):
        annotate_tokens(theta, dataset(seed=rank), BATCHES)
    broken, data = CausalLMPolicy(decoder()), dataset()
    broken.model.model.embed_tokens.weight.data[VOCABULARY - 1] = torch.nan
    # Trajectory 8, process 1's in the second round, has 3 tokens from 80 on.
    data["tokens", "full"][80] = VOCABULARY - 1
    with pytest.raises(ValueError, match="log-prob nan at token 1 of trajectory 8: look at"):
        annotate_tokens(broken, data, BATCHES)
    data = dataset()
    with pytest.raises(FileNotFoundError, match="is gone"):
        key = annotate_tokens(theta, data, cache=folder / "new").key
        dist.barrier()
        (folder / "new" / f"ref_log_prob-{key}.npy").unlink(missing_ok=True)
        cached_reference(data, str(key), cache=folder / "new")


def _work(rank: int, folder: str) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    import deepspeed.comm.torch

    # Its collectives for one machine take minutes to compile; gloo has the same.
    deepspeed.comm.torch.build_shm_op = lambda: None
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for wrap in (_replicated, _fsdp2, _zero3):
        _check(wrap, rank, Path(folder))
    _check_errors(rank, Path(folder))
    dist.destroy_process_group()


def test_two_processes_are_one(tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    mp.spawn(_work, (str(tmp_path),), nprocs=2)
