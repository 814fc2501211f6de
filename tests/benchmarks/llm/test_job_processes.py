"""The job in separate processes: killed and resumed, on several cores, under DeepSpeed."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.llm import job
from benchmarks.llm.__main__ import main, run
from benchmarks.llm.launch import Launch, start
from benchmarks.llm.recipes import RECIPES

ROOT = Path(__file__).parents[3]
HERE = Path(__file__).parent
PLACE = Path("llm", "chat")
SAME = ("score", "interval", "log_probs", "ESS", "weight_max", "steps", "epochs")


@pytest.fixture(scope="module")
def flags(small: tuple[str, str]) -> list[str]:
    """Flags of runs that save often, also in the middle of a sync's window."""
    own = ["--recipe", "chat", "--model", small[0], "--data", small[1], "--seeds", "0"]
    return [*own, "--max-steps", "20", "--sync-every", "8", "--save-every", "5"]


@pytest.fixture(scope="module")
def whole(flags: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that nothing disturbs, one at a time in this process."""
    out = tmp_path_factory.mktemp("whole")
    main([*flags, "--algo", "sft", "iw-sft-hard", "--jobs", "1", "--out", str(out)])
    return out / PLACE


def losses(run: Path) -> list[float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def assert_same(run: Path, other: Path) -> None:
    """Equal weights, losses and test, bit for bit."""
    model = Path("checkpoint", "model.safetensors")
    assert (run / model).read_bytes() == (other / model).read_bytes()
    assert losses(run) == losses(other)
    ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (run, other))
    assert [ours[name] for name in SAME] == [theirs[name] for name in SAME]


def command(words: list[str], threads: int) -> None:
    """What ``python -m benchmarks.llm`` does, in a process that is killed."""
    torch.set_num_threads(threads)
    sys.argv = ["benchmarks.llm", *words]
    run()


def test_killed_and_resumed(
    flags: list[str], whole: Path, tmp_path: Path, forkserver: BaseContext
) -> None:
    """SIGKILL between two checkpoints: the same model and score as without."""
    run = tmp_path / PLACE / "iw-sft-hard" / "seed-0"
    words = [*flags, "--algo", "iw-sft-hard", "--jobs", "1", "--out", str(tmp_path)]
    process = forkserver.Process(target=command, args=(words, torch.get_num_threads()))
    process.start()
    deadline = time.monotonic() + 300
    while not any((run / "checkpoints").glob("checkpoint-*")):
        assert process.is_alive() and time.monotonic() < deadline
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not (run / "checkpoints" / "checkpoint-20").exists(), "it was too fast to be killed"
    main([*words, "--resume"])
    assert_same(run, whole / "iw-sft-hard" / "seed-0")


def test_runs_share_the_cores(flags: list[str], whole: Path, tmp_path: Path) -> None:
    """Two at a time are what one at a time is."""
    main([*flags, "--algo", "sft", "iw-sft-hard", "--jobs", "2", "--out", str(tmp_path)])
    for algo in ("sft", "iw-sft-hard"):
        assert_same(tmp_path / PLACE / algo / "seed-0", whole / algo / "seed-0")


def test_two_processes_under_zero3_train_as_one_does(
    small: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{HERE}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    compiled = tmp_path / "compiled"
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(compiled))

    def start_small(launch: Launch, module: str, words: Sequence[str]) -> int:
        assert module == "benchmarks.llm"
        return start(launch, "launched_job", words)

    monkeypatch.setattr(job, "start", start_small)
    monkeypatch.setitem(RECIPES, "small", "small_job")

    def run_job(out: str, *more: str) -> str:
        # Without rows: the model's own samples, for which each run loads it anew.
        words = ["--recipe", "small", "--model", small[0], "--seeds", "0", "--max-steps", "6"]
        words += ["--algo", "base", "sft", "iw-sft", "--out", str(tmp_path / out), *more]
        # What accelerate starts in each process.
        monkeypatch.setattr(sys, "argv", ["benchmarks.llm", *words])
        main(words)
        return capfd.readouterr().out

    def result(out: str, algo: str) -> dict[str, Any]:
        path = tmp_path / out / "llm" / "small" / algo / "seed-0" / "result.json"
        content: dict[str, Any] = json.loads(path.read_text())
        return content

    assert "3 done" in run_job("single", "--jobs", "1")
    assert "3 done" in run_job("sharded", "--deepspeed")
    for algo in ("sft", "iw-sft"):
        alone, together = (
            losses(tmp_path / out / "llm" / "small" / algo / "seed-0")
            for out in ("single", "sharded")
        )
        assert len(alone) == len(together) == 6
        assert together == pytest.approx(alone, rel=1e-4)
    tuned = result("sharded", "iw-sft")
    assert (tuned["engine"], tuned["processes"]) == ("deepspeed zero3", 2)
    # The update's weights are compared with each other: computed before it, by both processes.
    assert (tuned["proposal"], tuned["sync_every"]) == ("cached", 1)
    assert result("sharded", "base")["score"] == result("single", "base")["score"]
    assert "0 done, 3 finished before" in run_job("sharded", "--deepspeed", "--resume")
    assert "LOCAL_RANK" not in os.environ
    # DeepSpeed's collectives for inference would take minutes.
    assert not compiled.exists()
