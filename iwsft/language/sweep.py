"""One forward pass over many micro-batches, shared out over processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor

from iwsft.language.batches import PLACE, TrajectoryDataset
from iwsft.policies.log_prob import evaluating
from iwsft.trajectory import ATTENTION_MASK, Segments


@torch.no_grad()
def swept_log_prob(
    policy: Any,
    dataset: TrajectoryDataset,
    make: Callable[[Sequence[TensorDictBase]], TensorDictBase],
    batches: list[list[int]],
    accelerator: Any,
) -> Tensor:
    """log p of each token in some micro-batches, in eval mode and without gradient.

    Process r runs ``batches[r::processes]``; each process gets all results. Where a trajectory
    stands in several batches, that of the first is taken.

    Args:
        policy: with ``log_prob(batch)``.
        dataset: Trajectories with :data:`PLACE`.
        make: Collates examples to a batch.
        batches: entries of each, the same on all processes.
        accelerator: accelerate's, which knows the processes and the device.

    Returns:
        ``[N]`` float32 on the CPU, in the layout of all trajectories; 0 for those in no batch.
    """
    processes, process = accelerator.num_processes, accelerator.process_index
    trajectory = Segments.of(dataset.trajectories).index
    out = torch.zeros(len(trajectory))
    # Whether a trajectory has had no batch yet.
    fresh = torch.ones(int(trajectory[-1]) + 1, dtype=torch.bool)
    # Sharded models gather parameters together: where batches run short, the last is run again.
    short = -len(batches) % processes
    with evaluating(policy):
        for number, entries in enumerate([*batches, *batches[-1:] * short]):
            held = [dataset.trajectory(entry) for entry in entries]
            if number % processes == process:
                batch = make(dataset.__getitems__(entries))
                log_prob = policy.log_prob(batch.to(accelerator.device)).float().cpu()
                real = batch.get(ATTENTION_MASK)
                place = batch.get(PLACE)[real]
                first = fresh[trajectory[place]] & (len(entries) > 0)
                out[place[first]] = log_prob[real][first]
            fresh[held] = False
    return accelerator.reduce(out.to(accelerator.device), "sum").cpu()
