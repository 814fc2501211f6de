"""The TorchRL example runs as a user runs it, and trains."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "torchrl_pipeline.py"
SMALL = {"reference_updates": 20, "updates": 30, "slices": 8, "slice_len": 32}


@pytest.fixture(scope="module")
def example() -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLE))


@pytest.mark.filterwarnings("error::UserWarning")
def test_it_runs_from_the_command_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    monkeypatch.setattr(sys, "argv", [str(EXAMPLE), *options])
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    printed = capsys.readouterr().out
    found = re.search(r"30 updates, loss (-?[\d.]+) -> (-?[\d.]+), ESS ([\d.]+)", printed)
    assert found, printed
    first, last, ess = map(float, found.groups())
    assert last < first and 0 < ess <= 1


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
