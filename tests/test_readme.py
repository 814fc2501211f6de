"""The README's Python runs as it is, and its figures of language are those of the records."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report.document import interval_text
from iwsft.samplers import TrajectorySampler

ROOT = Path(__file__).parents[1]


def test_the_lines_of_python_train_and_score_a_policy(capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert re.search(r"Hopper-v4 .* 5 episodes, .* normalised score -?\d", capsys.readouterr().out)
    # Fine-tuning made the curated trajectories likelier than the reference made them.
    batch = TrajectorySampler(names["best"], 64, seed=1).sample()
    gained = names["policy"].log_prob(batch) - batch["ref_log_prob"]
    assert gained.mean() > 0
    # q follows the policy at a distance, so the weights are not 1 any more.
    out = names["loss"](batch)
    assert 0 < out["ESS"] < 1
    assert out["weight_mean"] > 1


def test_its_figures_are_those_of_the_recorded_runs() -> None:
    text = (ROOT / "README.md").read_text()
    lines = [line.strip("| ").split(" | ") for line in text.splitlines() if line[:2] == "| "]
    rows = json.loads((ROOT / "docs/results/arithmetic.json").read_text())["rows"]
    shown = [f"{row['score']:.3f} ({interval_text(row['interval'], digits=3)})" for row in rows[1:]]
    (line,) = (line for line in lines if line[0] == f"{rows[0]['score']:.3f}")
    assert line[1:] == shown
