"""What there is to run on: GPUs, cores and memory of this node, and its place among other nodes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace

from benchmarks.places import cores


@dataclass(frozen=True)
class Hardware:
    """One node, and its place among several.

    Attributes:
        gpus: GPUs of this node that torch sees (CUDA or ROCm); every node has as many.
        cores: Cores that this process may use.
        gpu_memory: Bytes of the smallest GPU; None where it is not known.
        host_memory: Bytes of this node; None where it is not known.
        nodes: Number of nodes that take part.
        node_rank: Number of this node, from 0.
        address: Address of node 0, as the others reach it.
        port: A free port of node 0.
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
        """Look at this node.

        Other nodes are known from the environment variables that users of torchrun know:
        ``NNODES``, ``NODE_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT``.

        Raises:
            ValueError: If there are several nodes and one of the variables is missing or wrong.
        """
        import psutil  # type: ignore[import-untyped]
        import torch

        gpus = torch.cuda.device_count()
        node = cls(
            gpus=gpus,
            cores=cores(),
            gpu_memory=_gpu_memory() if gpus else None,
            host_memory=psutil.virtual_memory().total,
        )
        if environ.get("NNODES", "1") == "1":
            return node
        try:
            nodes, rank = int(environ["NNODES"]), int(environ["NODE_RANK"])
            address, port = environ["MASTER_ADDR"], int(environ["MASTER_PORT"])
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"NNODES={environ['NNODES']}: every node needs NNODES, NODE_RANK, MASTER_ADDR and "
                "MASTER_PORT in its environment, as in benchmarks/llm/slurm/job.sh; missing or "
                f"wrong: {error}"
            ) from error
        if not 0 <= rank < nodes:
            raise ValueError(f"NODE_RANK={rank} must be in [0, NNODES={nodes})")
        return replace(node, nodes=nodes, node_rank=rank, address=address, port=port)


def _gpu_memory() -> int | None:
    """Ask a process of its own, as a look takes half a GB of the GPU as long as it lives."""
    look = (
        "import torch; n = torch.cuda.device_count(); "
        "print(min(torch.cuda.get_device_properties(i).total_memory for i in range(n)))"
    )
    done = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True, check=False)
    # A driver may print before the number.
    words = done.stdout.split()
    return int(words[-1]) if done.returncode == 0 and words else None
