"""The job by its command line: killed and resumed, on several cores, under DeepSpeed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_job

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags that make the job take a small model and rows."""
    model, data = small_job.write(tmp_path_factory.mktemp("small"))
    return ["--model", model, "--data", data]


def command(out: Path, *words: str) -> list[str]:
    return [sys.executable, "-m", "benchmarks.llm", "--out", str(out), "--seeds", "0", *words]


def run(out: Path, *words: str) -> str:
    done = subprocess.run(command(out, *words), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def losses(out: Path, algo: str) -> list[float]:
    path = out / "llm" / "arithmetic" / algo / "seed-0" / "metrics.jsonl"
    found = [json.loads(line) for line in path.read_text().splitlines()]
    return [row["loss"] for row in found if "loss" in row]


def test_killed_and_resumed(small: list[str], tmp_path: Path) -> None:
    """SIGKILL between two checkpoints, in mid-window of a sync: the same model and score."""
    flags = [*small, "--algo", "iw-sft-hard", "--max-steps", "60", "--sync-every", "8"]
    flags += ["--save-every", "5", "--jobs", "1"]
    run(tmp_path / "whole", *flags)
    place = Path("llm", "arithmetic", "iw-sft-hard", "seed-0")
    killed = tmp_path / "killed" / place
    with subprocess.Popen(
        command(tmp_path / "killed", *flags), stderr=subprocess.DEVNULL, cwd=ROOT
    ) as process:
        deadline = time.monotonic() + 300
        while not any((killed / "checkpoints").glob("checkpoint-[1-4]*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert not (killed / "checkpoints" / "checkpoint-60").exists(), "it was too fast to be killed"
    run(tmp_path / "killed", *flags, "--resume")

    whole = tmp_path / "whole" / place
    for name in ("checkpoint/model.safetensors",):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()
    assert losses(tmp_path / "killed", "iw-sft-hard") == losses(tmp_path / "whole", "iw-sft-hard")
    theirs, ours = (json.loads((f / "result.json").read_text()) for f in (whole, killed))
    for key in ("score", "interval", "share_careful", "ESS", "weight_max", "steps", "epochs"):
        assert ours[key] == theirs[key]


def test_two_processes_under_zero3_train_as_one_does(small: list[str], tmp_path: Path) -> None:
    # Without rows: the model's own samples, for which each run loads it anew.
    flags = [*small[:2], "--algo", "base", "sft", "iw-sft", "--max-steps", "50"]
    single = run(tmp_path / "single", *flags, "--jobs", "1")
    sharded = run(tmp_path / "sharded", *flags, "--deepspeed")
    for algo in ("sft", "iw-sft"):
        alone, together = losses(tmp_path / "single", algo), losses(tmp_path / "sharded", algo)
        assert len(alone) == len(together) == 50
        assert together == pytest.approx(alone, rel=1e-4)
    where = tmp_path / "sharded" / "llm" / "arithmetic"
    result = json.loads((where / "iw-sft" / "seed-0" / "result.json").read_text())
    assert (result["engine"], result["processes"]) == ("deepspeed zero3", 2)
    # The update's weights are compared with each other: computed before it, by both processes.
    assert (result["proposal"], result["sync_every"]) == ("cached", 1)
    assert json.loads((where / "base" / "seed-0" / "result.json").read_text())["steps"] == 0
    assert "3 done" in single and "3 done" in sharded
    again = run(tmp_path / "sharded", *flags, "--deepspeed", "--resume")
    assert "0 done, 3 finished before" in again


def test_runs_share_the_cores(small: list[str], tmp_path: Path) -> None:
    """Two at a time are what one at a time is."""
    flags = [*small, "--algo", "sft", "iw-sft-ema", "--max-steps", "4"]
    run(tmp_path / "two", *flags, "--jobs", "2")
    run(tmp_path / "one", *flags, "--jobs", "1")
    for algo in ("sft", "iw-sft-ema"):
        assert losses(tmp_path / "two", algo) == losses(tmp_path / "one", algo)
    assert os.path.exists(tmp_path / "two" / "llm" / "arithmetic" / "results.png")
