"""A job killed by SIGKILL at every stage and resumed, against one that ran through."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from torch import Tensor

from benchmarks.d4rl.__main__ import main
from benchmarks.d4rl.options import Options
from benchmarks.d4rl.run import Run
from benchmarks.d4rl.train import train_and_score
from iwsft import metrics

STEPS = 60
SETTINGS: dict[str, Any] = {
    "steps": STEPS,
    "reference_steps": STEPS,
    "eval_episodes": 20,
    "curve_episodes": 1,
    "jobs": 1,
}
# Syncs q every 19 updates; checkpoints fall in between, every 6.
WEIGHTED = SETTINGS | {"alpha": 0.9, "q": "auto", "reference_steps": STEPS + 20}
Job = Callable[..., Path]


@pytest.fixture
def dataset(tiny_dataset: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(tiny_dataset, tmp_path / "hopper-like.hdf5"))


def start(dataset: Path, out: Path, algo: str) -> BaseProcess:
    """The job in a process of its own."""
    options = Options(algo=(algo,), dataset=(str(dataset),), out=out, resume=True, **WEIGHTED)
    process = multiprocessing.get_context("fork").Process(target=main, args=(options,))
    process.start()
    return process


def kill_when(process: BaseProcess, due: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not due():
        assert process.is_alive(), "the job ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def rows(folder: Path) -> list[dict[str, Any]]:
    path = folder / metrics.FILE
    return metrics.read(path) if path.exists() else []


def reached(folder: Path, step: int) -> Callable[[], bool]:
    return lambda: any(row["step"] >= step for row in rows(folder))


def parameters(folder: Path) -> dict[str, Tensor]:
    state = torch.load(folder / "checkpoint" / "state.pt", weights_only=True)["state"]
    assert state["step"] == STEPS
    return {name: value for name, value in state["loss"].items() if isinstance(value, Tensor)}


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
    main(Options(algo=("iw-sft-q",), dataset=(str(dataset),), out=out, resume=True, **WEIGHTED))

    whole = job(tmp_path / "whole", ["iw-sft-q"], dataset=str(dataset), **WEIGHTED)
    check_equal(run, whole / "iw-sft-q" / "seed-0")
    assert not list(out.rglob("*.partial"))


def test_bc_killed_while_it_shares_the_reference(job: Job, tmp_path: Path) -> None:
    """The run's folder holds a part of the copy; a damaged one is written again."""
    folder = job(tmp_path / "killed", ["bc"], **SETTINGS) / "bc" / "seed-0"
    whole = shutil.copytree(folder, tmp_path / "whole")
    (folder / "result.json").unlink()
    (folder / metrics.FILE).unlink()
    (folder / "checkpoint" / "state.pt").write_bytes(b"half")
    job(tmp_path / "killed", ["bc"], **SETTINGS, resume=True)
    check_equal(folder, whole)


def test_data_that_change_while_runs_are_at_work_are_refused(dataset: Path, tmp_path: Path) -> None:
    options = Options(algo=("bc",), dataset=(str(dataset),), out=tmp_path / "runs", **SETTINGS)
    main(options)
    run = Run("hopper-like", "bc", 0, options, str(dataset))
    (run.folder / "result.json").unlink()
    with h5py.File(dataset, "a") as file:
        file["rewards"][0] += 1
    with pytest.raises(ValueError, match="has changed since these runs began"):
        train_and_score([run], [lambda *_: None])
    assert not (run.folder / "result.json").exists()
