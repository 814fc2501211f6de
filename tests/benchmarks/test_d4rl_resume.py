"""A job killed by SIGKILL at every stage and resumed, against one that ran through."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from iwsft import metrics

STEPS = 120
Job = Callable[..., Path]


@pytest.fixture
def dataset(tiny_dataset: Path, tmp_path: Path) -> Path:
    """The row of walker2d syncs q every 19 updates; checkpoints fall in between, every 12."""
    return Path(shutil.copy(tiny_dataset, tmp_path / "walker2d-like.hdf5"))


def start(dataset: Path, out: Path, algo: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "benchmarks.d4rl", "--algo", algo, "--dataset", str(dataset)]
    command += ["--steps", str(STEPS), "--reference-steps", str(STEPS), "--eval-episodes", "40"]
    command += ["--jobs", "1", "--out", str(out), "--resume"]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def kill_when(process: subprocess.Popen[bytes], due: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not due():
        assert process.poll() is None, "the job ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL


def rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / metrics.FILE
    return metrics.read(path) if path.exists() else []


def reached(folder: Path, step: int) -> Callable[[], bool]:
    return lambda: any(row["step"] >= step for row in rows(folder))


def parameters(folder: Path) -> dict[str, Tensor]:
    held = torch.load(folder / "checkpoint" / "state.pt", weights_only=True)["state"]
    assert held["step"] == STEPS
    return {name: value for name, value in held["loss"].items() if isinstance(value, Tensor)}


def check_equal(killed: Path, whole: Path) -> None:
    ours, theirs = parameters(killed), parameters(whole)
    assert ours.keys() == theirs.keys() and len(ours) >= 9
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name
    without_time = [
        [{k: v for k, v in row.items() if k != "wall_seconds"} for row in rows(each)]
        for each in (killed, whole)
    ]
    assert without_time[0] == without_time[1]
    results = [json.loads((each / "result.json").read_text()) for each in (killed, whole)]
    for key in (
        "episode_returns",
        "episode_lengths",
        "episode_scores",
        "normalized_score",
        "steps",
    ):
        assert results[0][key] == results[1][key]


def test_killed_in_reference_tuning_and_evaluation(job: Job, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    data = out / "d4rl" / dataset.stem
    run = data / "iw-sft-q" / "seed-0"

    def in_reference() -> bool:
        return any(reached(each, STEPS // 3)() for each in (data / "reference").glob("*-seed-0"))

    kill_when(start(dataset, out, "iw-sft-q"), in_reference)
    assert rows(run) == []
    kill_when(start(dataset, out, "iw-sft-q"), reached(run, STEPS // 2))
    assert not (run / "result.json").exists()
    kill_when(start(dataset, out, "iw-sft-q"), reached(run, STEPS))
    assert start(dataset, out, "iw-sft-q").wait() == 0

    settings = {"steps": STEPS, "reference_steps": STEPS, "eval_episodes": 40}
    whole = job(tmp_path / "whole", ["iw-sft-q"], dataset=str(dataset), **settings)
    check_equal(run, whole / "iw-sft-q" / "seed-0")
    assert not list(out.rglob("*.partial"))


def test_bc_killed_while_it_shares_the_reference(job: Job, tmp_path: Path) -> None:
    """The run's folder holds a part of the copy; a damaged one is written again."""
    folder = job(tmp_path / "killed", ["bc"], steps=STEPS, reference_steps=STEPS) / "bc" / "seed-0"
    whole = shutil.copytree(folder, tmp_path / "whole")
    (folder / "result.json").unlink()
    (folder / metrics.FILE).unlink()
    (folder / "checkpoint" / "state.pt").write_bytes(b"half")
    job(tmp_path / "killed", ["bc"], steps=STEPS, reference_steps=STEPS, resume=True)
    check_equal(folder, whole)
