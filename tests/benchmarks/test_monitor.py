"""What a command shows of runs that other processes do."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from benchmarks import monitor, runs
from iwsft import progress


@dataclass(frozen=True)
class Options:
    out: Path
    # As a config file gives them; such runs have no hash.
    words: list[str] = field(default_factory=list)


class Run(runs.Run[Options]):
    benchmark = "control"


def test_running_runs_are_shown_and_others_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    several = [Run("data", "sft", seed, Options(tmp_path)) for seed in range(4)]
    for run in several:
        run.folder.mkdir(parents=True)
    # What a killed command left is not progress.
    monitor.note(several[3].folder, "tuning", 7, 9)
    monkeypatch.setattr(progress, "INTERVAL", 0.1)
    monkeypatch.setattr(monitor, "SECONDS", 0.01)

    def wait(due: Callable[[set[str]], bool]) -> None:
        """Wait until the lines of a moment are as they should be."""
        deadline = time.monotonic() + 60
        while not due(set(capsys.readouterr().err.splitlines())):
            assert time.monotonic() < deadline
            time.sleep(0.3)

    with monitor.shown(several):
        monitor.note(several[0].folder, "tuning", 3, 9, {"loss": 0.25, "step": 3, "ESS": 0.5})
        (several[1].folder / monitor.FILE).write_text('{"stage": "tun')
        with monitor.noted(several[2].folder):
            monitor.note(several[2].folder, "reference")
            wait(lambda lines: "data sft seed 2 reference" in lines)
        (several[2].folder / runs.RESULT).write_text("{}")
        wait(lambda lines: "runs: 1/4" in {line[:9] for line in lines})
        capsys.readouterr()
        rows = {"data sft seed 0 tuning: 3/9  loss 0.25  ESS 0.50"}
        wait(lambda lines: {line for line in lines if not line.startswith("runs")} == rows)
