"""Runs of two commits are equal where every number is, and a difference is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from scripts.compare_numbers import compare


@pytest.fixture
def before(tmp_path: Path) -> Path:
    run = tmp_path / "before" / "d4rl" / "data" / "bc" / "seed-0"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"settings": {"lr": 0.1}, "command": "one"}))
    (run / "result.json").write_text(json.dumps({"score": 1.5, "wall_seconds": 3.0}))
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 0.25}\n{"step": 2, "loss": NaN}\n')
    torch.save({"state": {"weight": torch.arange(3.0)}}, run / "policy.pt")
    return tmp_path / "before"


@pytest.fixture
def after(before: Path) -> Path:
    return Path(shutil.copytree(before, before.parent / "after"))


RUN = Path("d4rl/data/bc/seed-0")


def test_times_and_commands_do_not_count(before: Path, after: Path) -> None:
    (after / RUN / "config.json").write_text(json.dumps({"settings": {"lr": 0.1}, "command": "x"}))
    (after / RUN / "result.json").write_text(json.dumps({"score": 1.5, "wall_seconds": 4.0}))
    assert compare(before, after) == []


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("result.json", '{"score": 1.5000000000000002}', "result.json/score"),
        ("result.json", '{"score": "1.5"}', "result.json/score"),
        ("metrics.jsonl", '{"step": 1, "loss": 0.25}\n', "metrics.jsonl/1/loss"),
        ("config.json", '{"settings": {"lr": 0.1, "k": 1}}', "config.json/settings/k"),
    ],
)
def test_any_other_difference_is_named(
    before: Path,
    after: Path,
    file: str,
    content: str,
    named: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (after / RUN / file).write_text(content)
    assert compare(before, after) == [str(RUN)]
    assert named in capsys.readouterr().out


def test_parameters_are_compared_bit_by_bit(before: Path, after: Path) -> None:
    weight = torch.arange(3.0)
    weight[1] = torch.nextafter(weight[1], torch.tensor(2.0))
    torch.save({"state": {"weight": weight}}, after / RUN / "policy.pt")
    assert compare(before, after) == [str(RUN)]


def test_a_run_of_one_side_alone_differs(before: Path, after: Path) -> None:
    shutil.rmtree(after / RUN)
    assert compare(before, after) == [str(RUN)]
    assert compare(after, before) == [str(RUN)]
