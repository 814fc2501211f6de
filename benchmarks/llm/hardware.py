"""What there is to run on: GPUs, cores and memory of this node, and the nodes beside it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

NODE_VARIABLES = ("NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Hardware:
    """One node, and its place among several.

    Attributes:
        gpus: of this node that torch sees (CUDA or ROCm); every node has as many.
        cores: that this process may use.
        gpu_memory: bytes of the smallest GPU; None where it is not known.
        host_memory: bytes of this node; None where it is not known.
        nodes: that take part.
        node_rank: this one's number, from 0.
        address: of node 0, as the others reach it.
        port: on it.
    """

    gpus: int
    cores: int
    gpu_memory: int | None = None
    host_memory: int | None = None
    nodes: int = 1
    node_rank: int = 0
    address: str | None = None
    port: int | None = None

    @classmethod
    def here(cls, environ: Mapping[str, str] = os.environ) -> Hardware:
        """This node. That there are others is read from the environment variables that torchrun's
        users know: ``NNODES``, ``NODE_RANK``, ``MASTER_ADDR``, ``MASTER_PORT``.

        Raises:
            ValueError: several nodes, and one of these variables is missing or no such number.
        """
        import torch

        gpus = torch.cuda.device_count()
        nodes = _number(environ, "NNODES", 1)
        if nodes > 1:
            missing = [name for name in NODE_VARIABLES if not environ.get(name)]
            if missing:
                raise ValueError(
                    f"NNODES={nodes}, but {', '.join(missing)} is not set: every node needs "
                    f"{', '.join(NODE_VARIABLES)}, as in benchmarks/llm/slurm/job.sh"
                )
        rank = _number(environ, "NODE_RANK", 0) if nodes > 1 else 0
        if not 0 <= rank < nodes:
            raise ValueError(f"NODE_RANK={rank} must be in [0, NNODES={nodes})")
        return cls(
            gpus=gpus,
            cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else _cores(),
            gpu_memory=_gpu_memory() if gpus else None,
            host_memory=_host_memory(),
            nodes=nodes,
            node_rank=rank,
            address=environ["MASTER_ADDR"] if nodes > 1 else None,
            port=_number(environ, "MASTER_PORT", 0) if nodes > 1 else None,
        )


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name) or str(default)
    if not text.isdecimal() or (name == "NNODES" and int(text) < 1):
        raise ValueError(f"{name}={text!r} in the environment is no such number")
    return int(text)


def _cores() -> int:
    return os.cpu_count() or 1


def _host_memory() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def _gpu_memory() -> int | None:
    """In a process of its own: a look takes a context of half a GB for as long as it lives."""
    look = (
        "import torch; n = torch.cuda.device_count(); "
        "print(min(torch.cuda.get_device_properties(i).total_memory for i in range(n)))"
    )
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=False)
    # What a driver has to say stands before the number.
    words = done.stdout.split()
    return int(words[-1]) if done.returncode == 0 and words else None
