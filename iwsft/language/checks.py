"""What a training run refuses, or warns of, when its engine is known."""

from __future__ import annotations

import warnings

from torch import nn
from transformers import Trainer

from iwsft.objective import Proposal
from iwsft.weights import ImportanceWeights


def check_engine(trainer: Trainer, proposal: Proposal, weights: ImportanceWeights) -> None:
    """Refuse ways of running that would change the result.

    Raises:
        ValueError: several GPUs in one process, trajectories cut into parts, or transforms that
            compare weights where no process ever holds the whole batch.
    """
    args = trainer.args
    if args.n_gpu > 1:
        raise ValueError(
            f"one process sees {args.n_gpu} GPUs; start one process a GPU (accelerate launch, "
            "or python -m benchmarks.llm --deepspeed)"
        )
    cut = (trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size())
    if any(size > 1 for size in cut):
        raise ValueError(
            "tensor, context and sequence parallelism cut a trajectory into parts, which is "
            "not supported; use ZeRO-3 or FSDP2"
        )
    parts = args.gradient_accumulation_steps * trainer.accelerator.num_processes
    if proposal == "current" and weights.compares and parts > 1:
        raise ValueError(
            f"{weights} compares all weights of an update, which is divided here into {parts} "
            "micro-batches; use proposal='cached' with sync_every=1, which computes them first"
        )


def warn_of_half_precision(trainer: Trainer, model: nn.Module) -> None:
    """Say so where the optimizer would step on half-precision weights."""
    # DeepSpeed keeps float32 weights of its own; FSDP2 may upcast them when it shards.
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    half = {str(p.dtype) for p in trained if p.itemsize < 4}
    if half:
        warnings.warn(
            f"the weights are {', '.join(sorted(half))}: small steps of the optimizer are "
            "rounded away; load the model with dtype='float32' and set bf16=True",
            UserWarning,
            stacklevel=4,
        )
