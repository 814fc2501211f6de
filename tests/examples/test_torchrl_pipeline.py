"""The TorchRL example runs as a user runs it, and trains."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "torchrl_pipeline.py"
SMALL = {"reference_updates": 20, "updates": 30, "slices": 8, "slice_len": 32}


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


def test_it_runs_from_the_command_line() -> None:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), *options], capture_output=True, text=True, check=True
    )
    found = re.search(r"30 updates, loss (-?[\d.]+) -> (-?[\d.]+), ESS ([\d.]+)", done.stdout)
    assert found, done.stdout
    first, last, ess = map(float, found.groups())
    assert last < first and 0 < ess <= 1
    assert "Warning" not in done.stderr


def test_the_loss_falls_and_q_follows(example: dict[str, Any]) -> None:
    runs = {}
    for updater in ("ema", "soft"):
        runs[updater] = example["main"](example["Settings"](**SMALL, updater=updater))
    history = runs["ema"]
    assert len(history) == 30
    assert sum(row["loss_iw_mle"] for row in history[-10:]) < sum(
        row["loss_iw_mle"] for row in history[:10]
    )
    # q starts at the reference and leaves it.
    assert history[0]["weight_mean"] == history[0]["weight_max"] == history[0]["ESS"] == 1.0
    assert history[-1]["weight_max"] > 1.0 and history[-1]["ESS"] < 1.0
    for ours, theirs in zip(runs["ema"], runs["soft"], strict=True):
        assert ours["loss_iw_mle"] == pytest.approx(theirs["loss_iw_mle"], rel=1e-5)
