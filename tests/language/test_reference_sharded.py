"""Two processes (replicated, FSDP2, ZeRO-3): the reference is one process's, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from reference_cases import VOCABULARY, annotate, dataset, decoder
from tensordict import TensorDictBase
from torch import Tensor

from iwsft import reference
from iwsft.forward_pass import ForwardPass
from iwsft.language.batches import TrajectoryDataset, collate
from iwsft.language.loss import token_loss
from iwsft.language.shards import compile_nothing
from iwsft.policies import CausalLMPolicy
from iwsft.reference import cached_reference

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
        # The rest of the last shard is uninitialised memory.
        filled = parameter.ds_numel - dist.get_rank() * parameter.ds_tensor.ds_numel
        parameter.ds_tensor.data[filled:] = torch.rand(()).add(os.getpid())
        padded += filled < parameter.ds_tensor.ds_numel
    assert (padded > 0) == (dist.get_rank() == 1)
    return engine


def _one_process() -> Tensor:
    """In this process alone, batch by batch."""
    data, theta = dataset(), CausalLMPolicy(decoder(**UNEVEN).eval())
    entries = TrajectoryDataset(data)
    parts: dict[int, Tensor] = {}
    for batch in BATCHES:
        rows = theta.log_prob(collate([entries[number] for number in batch])).detach()
        for row, number in zip(rows, sorted(batch), strict=True):
            parts[number] = row[: len(entries[number])]
    return torch.cat([parts[number] for number in sorted(parts)])


def _check(wrap: Callable[[Any], Any], rank: int, folder: Path) -> None:
    truth, data = _one_process(), dataset()
    # Only the first process's folder is used.
    cache = folder / wrap.__name__ / str(rank)
    with pytest.raises(InterruptedError):
        annotate(Breaking(wrap(decoder(**UNEVEN)), breaks_at=1), data, BATCHES, cache=cache)
    engine = wrap(decoder(**UNEVEN))
    theta = Breaking(engine)
    annotate(theta, data, BATCHES, cache=cache)
    assert torch.equal(data["ref_log_prob"], truth)
    assert theta._forwards == 3
    dist.barrier()
    assert cache.exists() == (rank == 0)

    # The first update's log-probs are these, with the engine's hooks and gradient.
    theta.train()
    entries = TrajectoryDataset(data)
    batch = collate([entries[number] for number in BATCHES[rank]])
    log_prob = theta.log_prob(batch)
    assert log_prob.requires_grad and torch.equal(log_prob, batch["ref_log_prob"])
    total = log_prob.sum()
    engine.backward(total) if hasattr(engine, "backward") else total.backward()

    # Nor does dropout reach the weights: q runs again in eval mode, before the backward.
    for layer in theta.modules():
        if hasattr(layer, "attention_dropout"):
            layer.attention_dropout = 0.5
    terms = token_loss(theta, proposal="current").terms(batch)
    assert not torch.equal(terms.log_prob, batch["ref_log_prob"])
    assert bool((terms.log_weight == 0).all())
    total = terms.log_prob.sum()
    engine.backward(total) if hasattr(engine, "backward") else total.backward()

    again = Breaking(wrap(decoder(**UNEVEN)))
    key = annotate(again, dataset(), BATCHES, cache=cache)
    assert again._forwards == 1
    keys: list[Any] = [None, None]
    dist.all_gather_object(keys, key)
    assert keys[0] == keys[1]
    resumed = dataset()
    cached_reference(resumed, key, cache=cache)
    assert torch.equal(resumed["ref_log_prob"], truth)

    for end in (0, -1):
        # In one process's shard alone; the tokens are in no trajectory.
        moved = decoder(**UNEVEN)
        with torch.no_grad():
            moved.model.embed_tokens.weight[end] += 1e-6
        other = annotate(Breaking(wrap(moved)), dataset(), BATCHES, cache=cache)
        assert other not in keys
        keys.append(other)


def _check_errors(rank: int, folder: Path) -> None:
    """What one process finds wrong is an error on all."""
    theta = CausalLMPolicy(decoder())
    (folder / "0").write_text("")
    with pytest.raises(FileExistsError):
        annotate(theta, dataset(), BATCHES, cache=folder / str(rank))
    with pytest.raises(ValueError, match="process 1 holds other trajectories than process 0"):
        annotate(theta, dataset(seed=rank), BATCHES)
    # A pass that is not shared is each process's own.
    own = dataset((5, 3, 9), seed=rank)
    log_prob = ForwardPass(theta, own, [[0, 1, 2]]).log_prob()
    torch.testing.assert_close(log_prob, theta.log_prob(own).detach())
    broken, data = CausalLMPolicy(decoder()), dataset()
    broken.model.model.embed_tokens.weight.data[VOCABULARY - 1] = torch.nan
    # Trajectory 8, process 1's in the second round, has 3 tokens from 80 on.
    data["tokens", "full"][80] = VOCABULARY - 1
    with pytest.raises(ValueError, match="log-prob nan at step 1 of trajectory 8, and 2 of"):
        annotate(broken, data, BATCHES)
    key = annotate(theta, dataset(), cache=folder / "new")
    dist.barrier()
    (folder / "new" / f"ref_log_prob-{key}.pt").unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError, match="is gone"):
        cached_reference(dataset(), key, cache=folder / "new")


def _work(rank: int, folder: str) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    compile_nothing()
    torch.set_num_threads(1)
    # Sharded layers take torch's products, so whole ones do here, too.
    torch.backends.mkldnn.enabled = False
    reference._PART = 1
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for wrap in (_replicated, _fsdp2, _zero3):
        _check(wrap, rank, Path(folder))
    _check_errors(rank, Path(folder))
    dist.destroy_process_group()


def test_two_processes_are_one(on_two_processes: Any, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed")
    on_two_processes(_work, str(tmp_path))
