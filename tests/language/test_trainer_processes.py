"""Two processes train as one does, with data parallelism and with DeepSpeed ZeRO-3."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import losses, trainer, trajectories

from iwsft import ImportanceWeights, weights
from iwsft.checkpoint import CheckpointError
from iwsft.language.shards import compile_nothing

PROPOSALS: list[dict[str, Any]] = [
    {"proposal": "current"},
    {"proposal": "cached", "sync_every": 2},
    {"proposal": "lagged", "ema_decay": 0.7},
]
# Weights of the current policy need no model but the one that is trained.
OF_ENGINE = {"data-parallel": PROPOSALS, "zero3": PROPOSALS[1:]}
ZERO3 = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
}
# The third update is cut short: of its 3 entries, the fourth micro-batch has none. The checkpoint
# is written within a window of cached weights.
SETTINGS: dict[str, Any] = {
    "data": trajectories(weighted=True),
    "normalize_data_weights": True,
    "importance_weights": ImportanceWeights(trajectory=[weights.ClipWeight(max=3.0)]),
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 3,
}
SPLIT = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
LOGGED = "loss", "ESS", "weight_max", "kl_approx", "unweighted_loss", "weight_top1"


def _rows(run: Any) -> list[dict[str, float]]:
    return [{name: row[name] for name in LOGGED} for row in run.state.log_history if "loss" in row]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, float]]]:
    """What one process logs with each proposal."""
    rows = []
    for proposal in PROPOSALS:
        run = trainer(tmp_path_factory.mktemp("alone"), **SETTINGS, **proposal)
        run.train()
        rows.append(_rows(run))
    return rows


def _port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
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
    own: dict[str, Any] = {**SETTINGS, **SPLIT}
    if engine == "zero3":
        compile_nothing()
        own["deepspeed"] = ZERO3
    rows = []
    for number, proposal in enumerate(OF_ENGINE[engine]):
        run = trainer(folder / str(number), **own, **proposal)
        run.train()
        again = trainer(folder / str(number), **own, **proposal)
        again.train(resume_from_checkpoint=str(folder / str(number) / "checkpoint-3"))
        assert losses(again)[3:] == losses(run)[3:]
        rows.append(_rows(run))
    if rank == 0:
        torch.save(rows, folder / "rows.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("engine", OF_ENGINE)
def test_two_processes_are_one(
    on_two_processes: Any, alone: Any, tmp_path: Path, engine: str
) -> None:
    on_two_processes(_work, _port(), tmp_path, engine)
    together = torch.load(tmp_path / "rows.pt", weights_only=True)
    proposals = OF_ENGINE[engine]
    for proposal, ours, theirs in zip(proposals, together, alone[-len(proposals) :], strict=True):
        assert len(ours) == len(theirs) == 4
        for update, row in enumerate(ours):
            for name, value in row.items():
                expected = pytest.approx(theirs[update][name], rel=1e-4, abs=1e-5)
                assert value == expected, (proposal, update, name)
    with pytest.raises(CheckpointError, match="plan.processes=2 .now 1"):
        trainer(tmp_path / "0", **SETTINGS, **SPLIT, **proposals[0]).train(
            resume_from_checkpoint=True
        )
