"""FSDP2 on two processes: sharded models give the log-probs and gradients of whole ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from language_models import alone, decoder, packed

from iwsft.policies import CausalLMPolicy

# tied embeddings, the output layer sharded by itself, outputs cast (as accelerate asks for).
CASES = [(True, False, True), (False, True, False), (False, False, True)]


def _work(rank: int, store: str) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    mesh = dist.init_device_mesh("cpu", (2,))
    batch = packed(seed=rank)
    weight = torch.arange(30.0)
    for tied, head_apart, cast in CASES:
        whole, model = (decoder(dtype=torch.float32, tie_word_embeddings=tied) for _ in range(2))
        truth = alone(whole, batch)
        (weight * truth).sum().backward()
        output = MixedPrecisionPolicy(output_dtype=torch.bfloat16 if cast else None)
        for layer in (*model.model.layers, *([model.lm_head] if head_apart else [])):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh, mp_policy=output)
        log_prob = CausalLMPolicy(model).log_prob(batch)
        torch.testing.assert_close(log_prob, truth, rtol=1e-5, atol=1e-5)
        (weight * log_prob).sum().backward()
        for ours, true in zip(model.parameters(), whole.parameters(), strict=True):
            dist.all_reduce(true.grad)
            difference = ours.grad.full_tensor() - true.grad / 2
            assert float(difference.norm() / true.grad.norm()) < 1e-5
    dist.destroy_process_group()


def test_sharded_is_whole(on_two_processes: Any, tmp_path: Path) -> None:
    on_two_processes(_work, str(tmp_path / "store"))
