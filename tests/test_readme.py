"""The README's Python runs as it is."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from iwsft.samplers import TrajectorySampler


def test_the_lines_of_python_train_and_score_a_policy(capsys: pytest.CaptureFixture[str]) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text()
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
