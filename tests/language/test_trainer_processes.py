"""Two processes train as one does, with data parallelism and with DeepSpeed ZeRO-3."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import losses, trainer

from iwsft import ImportanceWeights, weights
from iwsft.checkpoint import CheckpointError

PROPOSALS: list[dict[str, Any]] = [
    {"proposal": "current"},
    {"proposal": "cached", "sync_every": 2},
    {"proposal": "lagged", "ema_decay": 0.7},
]
ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}
# Batches of 1 accumulated on two processes, a chain that clips, an update cut short.
SETTINGS: dict[str, Any] = {"max_steps": 6, "save_strategy": "steps", "save_steps": 4}
CHAIN = ImportanceWeights(trajectory=[weights.ClipWeight(max=3.0)])


def _port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


def _work(rank: int, port: int, folder: Path, engine: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "DS_ACCELERATOR": "cpu",
    }
    own: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    if engine == "zero3":
        import deepspeed.comm.torch

        # It compiles for minutes where it never ran, and only speeds reductions up.
        deepspeed.comm.torch.build_shm_op = lambda: None
        own["deepspeed"] = ZERO3
    found = {}
    for number, proposal in enumerate(PROPOSALS):
        run = trainer(folder / str(number), importance_weights=CHAIN, **SETTINGS, **own, **proposal)
        run.train()
        again = trainer(
            folder / str(number), importance_weights=CHAIN, **SETTINGS, **own, **proposal
        )
        again.train(resume_from_checkpoint=str(folder / str(number) / "checkpoint-4"))
        assert losses(again)[4:] == losses(run)[4:]
        found[number] = [
            {k: row[k] for k in ("loss", "ESS", "weight_max", "kl_approx")}
            for row in run.state.log_history
            if "loss" in row
        ]
    if rank == 0:
        torch.save(found, folder / "found.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("engine", ["data-parallel", "zero3"])
def test_two_processes_are_one(on_two_processes: Any, tmp_path: Path, engine: str) -> None:
    on_two_processes(_work, _port(), tmp_path, engine)
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    for number, proposal in enumerate(PROPOSALS):
        alone = trainer(
            tmp_path / f"alone-{number}", importance_weights=CHAIN, **SETTINGS, **proposal
        )
        alone.train()
        rows = [row for row in alone.state.log_history if "loss" in row]
        assert len(rows) == len(found[number]) == 6
        for ours, theirs in zip(found[number], rows, strict=True):
            for name, value in ours.items():
                assert value == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), (proposal, name)
    with pytest.raises(CheckpointError, match="written by 2 processes, this run has 1"):
        trainer(
            tmp_path / "0",
            importance_weights=CHAIN,
            per_device_train_batch_size=1,
            gradient_accumulation_steps=2,
            **SETTINGS,
            **PROPOSALS[0],
        ).train(resume_from_checkpoint=True)
