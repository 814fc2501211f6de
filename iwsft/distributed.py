"""Objects exchanged by the processes of a distributed run; without one, a world of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def rank_and_world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) where nothing is distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gathered(value: T) -> list[T]:
    """Every process's value, in the order of the ranks, on all of them; tensors are on the CPU."""
    _, world = rank_and_world()
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


def from_first(work: Callable[[], T]) -> T:
    """Run ``work`` on the first process alone and give its result to all.

    An ``OSError``, ``ValueError`` or ``RuntimeError`` that it raises is raised on all of them, so
    that none waits for the others.
    """
    rank, world = rank_and_world()
    if world == 1:
        return work()
    outcome: list[Any] = [None, None]
    if rank == 0:
        try:
            outcome[0] = work()
        except (OSError, ValueError, RuntimeError) as error:
            outcome[1] = error
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
