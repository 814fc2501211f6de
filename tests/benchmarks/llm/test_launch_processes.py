"""Launched processes: their arguments, their engine, and their end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from launched_training import CONFIG, train
from transformers import AutoModelForCausalLM

from benchmarks.llm.launch import VARIABLE, Hardware, States, choose, launched, start

CPU = Hardware(gpus=0, cores=2)
BUCKET = 1_000_000
# The first process to fail ends the others.
STARTED = """import json, os, pathlib, sys, time
rank, folder = os.environ["RANK"], pathlib.Path(sys.argv[1])
part = folder / f"part-{rank}"
part.write_text(json.dumps(dict(os.environ)))
part.rename(folder / f"started-{rank}.json")
while len([*folder.glob("started-*.json")]) < 2:
    time.sleep(0.01)
sys.exit(3)
"""


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """One thread for each process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)


def test_two_ranks_train_under_zero3_and_take_the_memory_that_was_computed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    on_two_processes: Any,
) -> None:
    launch = choose("cpu_zero3", CPU)
    (tmp_path / "started.py").write_text(STARTED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert start(launch, "started", [str(tmp_path)]) == 3
    assert "Traceback" not in capfd.readouterr().err
    # In the environments of these processes.
    on_two_processes(train, tmp_path)
    started = [json.loads((tmp_path / f"started-{rank}.json").read_text()) for rank in range(2)]
    assert [each["OMP_NUM_THREADS"] for each in started] == ["1", "1"]
    seen = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert launched() is None and VARIABLE not in os.environ

    parameters = AutoModelForCausalLM.from_config(CONFIG).num_parameters()
    states = States.of(parameters, parameters, half=True, lagged=False)
    for rank in seen:
        assert rank["launch"]["stage"] == 3 and rank["launch"]["processes"] == 2
        assert rank["loss"] == seen[0]["loss"]
        assert sorted(rank["refusals"]) == ["engine", "offload_optimizer", "processes", "stage"]
        assert "stage 2, but training would run with stage 3" in rank["refusals"]["stage"]
        half = (states.weights + states.gradients) / 2 + 2 * BUCKET
        assert rank["live"]["torch.bfloat16"] == pytest.approx(half, rel=1e-3)
        assert rank["live"]["torch.float32"] == pytest.approx(states.optimizer / 2, rel=1e-2)


def test_a_killed_process_is_named_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "killed.py").write_text(
        "import os, signal, time\n"
        "if os.environ['RANK'] == '1':\n    os.kill(os.getpid(), signal.SIGKILL)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    assert start(choose("cpu_zero3", CPU), "killed", []) == 128 + signal.SIGKILL
    said = capfd.readouterr().err
    assert "error: process 1 of 2 was ended by SIGKILL; most often memory ran out" in said
    assert "Traceback" not in said


def test_a_single_process_sees_its_arguments_and_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "alone.py").write_text(
        "import json, os, sys\n"
        "open(sys.argv[1], 'w').write(json.dumps([sys.argv[2:], dict(os.environ)]))\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    out = tmp_path / "seen.json"
    assert start(choose("single", CPU), "alone", [str(out), "--algo", "sft", "a b"]) == 0
    arguments, environment = json.loads(out.read_text())
    assert arguments == ["--algo", "sft", "a b"]
    assert environment["CUDA_VISIBLE_DEVICES"] == "" and "LOCAL_RANK" not in environment


def test_a_started_process_starts_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ValueError, match="one of several processes already"):
        choose("cpu_zero3", CPU).check_startable()


def test_a_signal_to_end_reaches_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "waiting.py").write_text(
        "import os, pathlib, time\n"
        "pathlib.Path(__file__).with_name(f'{os.getpid()}.pid').touch()\n"
        "time.sleep(100)\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[3]}")
    lines = (
        "from benchmarks import stopping",
        "from benchmarks.llm.launch import Hardware, choose, start",
        "stopping.watch()",
        "with stopping.command(): start(choose('cpu_zero3', Hardware(0, 2)), 'waiting', [])",
    )
    command = [sys.executable, "-c", "\n".join(lines)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as parent:
        deadline = time.monotonic() + 100
        while len(list(tmp_path.glob("*.pid"))) < 2:
            assert parent.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        parent.send_signal(signal.SIGTERM)
        _, said = parent.communicate(timeout=60)
    assert parent.returncode == 143
    assert "the same command with --resume continues" in said and "Traceback" not in said
    for path in tmp_path.glob("*.pid"):
        with pytest.raises(ProcessLookupError):
            os.kill(int(path.stem), 0)
