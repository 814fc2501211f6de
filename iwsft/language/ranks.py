"""Objects exchanged by the processes of a distributed run; without one, a world of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

T = TypeVar("T")


def rank_and_world(group: Any = None) -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) where nothing is distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def gathered(value: T, group: Any = None) -> list[T]:
    """Every process's value, in the order of the ranks, on all of them.

    Args:
        value: anything that pickles; tensors on the CPU.
        group: process group; all processes by default.
    """
    _, world = rank_and_world(group)
    if world == 1:
        return [value]
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value, group=group)
    return values


def from_first(work: Callable[[], T], group: Any = None) -> T:
    """Run ``work`` on the first process alone and hand its result to all.

    An ``OSError`` or ``ValueError`` that it raises is raised on all of them, so that none waits for
    the others.
    """
    rank, world = rank_and_world(group)
    if world == 1:
        return work()
    found: list[Any] = [None, None]
    if rank == 0:
        try:
            found[0] = work()
        except (OSError, ValueError) as error:
            found[1] = error
    dist.broadcast_object_list(found, group=group, group_src=0)
    if found[1] is not None:
        raise found[1]
    result: T = found[0]
    return result
