"""The examples of docs/extending.md, run as a user would."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from test_every_algorithm import start
from tracking import BEST, STANDING, write_dataset

import baselines
from benchmarks.d4rl.train import train_and_score
from iwsft.trajectory import lengths

DOCUMENT = Path(__file__).parents[2] / "docs" / "extending.md"


def block(start: str) -> str:
    """The Python block of the document that starts with a line."""
    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), flags=re.DOTALL)
    return next(code for code in blocks if code.startswith(start))


def test_the_new_algorithm_is_trained_scored_and_improves_on_the_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("baselines.rwr")
    monkeypatch.setitem(sys.modules, "baselines.rwr", module)
    exec(block("# baselines/rwr.py"), module.__dict__)
    line = re.fullmatch(r'\s*"(.+)": "(.+)",\s*', block('    "rwr"'))
    assert line is not None
    monkeypatch.setitem(baselines.BASELINES, line[1], line[2])
    data = tmp_path / "tracking.hdf5"
    write_dataset(data, episodes=1000)
    run, _ = start("rwr", data, tmp_path / "runs", steps=150)
    (result,) = train_and_score([run], [lambda *_: None])
    assert (result["return_mean"] - STANDING) / (BEST - STANDING) > 0.5


def test_the_new_source_gives_trajectories(tmp_path: Path) -> None:
    rows: dict[str, Any] = {
        "observations": np.zeros((5, 11)),
        "actions": np.zeros((5, 3)),
        "rewards": np.ones(5),
        "terminals": [0, 0, 1, 0, 0],
        "timeouts": [0, 0, 0, 0, 1],
    }
    path = tmp_path / "mine.npz"
    np.savez(path, **rows)
    space: dict[str, Any] = {}
    exec(block("import numpy as np"), space)
    data = space["read"](str(path))
    assert lengths(data.trajectories).tolist() == [3, 2]


def test_the_baselines_page_trains_and_scores(capsys: pytest.CaptureFixture[str]) -> None:
    """Unchanged, except for the numbers of updates and episodes."""
    page = (DOCUMENT.parent / "baselines.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    short = code.replace("steps=1000)", "steps=3)")
    short = short.replace("evaluate(learner.policy,", "evaluate(learner.policy, episodes=1,")
    assert short.count("steps=3)") == short.count("episodes=1") == 1
    exec(short.replace("data.env_id, reference", "env_id=data.env_id, reference"), {})
    assert "Hopper-v4" in capsys.readouterr().out
