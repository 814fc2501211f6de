"""The command for a machine with a GPU, rehearsed on the CPU with tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "on_gpu.sh"


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)}
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_rehearsal_measures_everything_and_skips_the_tests(tmp_path: Path) -> None:
    done = run(tmp_path / "out", "--rehearse")
    log = (tmp_path / "out" / "log.txt").read_text()
    assert done.returncode == 0, log
    assert "missing" not in log and "on CPU" in log
    (suite,) = ElementTree.parse(tmp_path / "out" / "tests.xml").getroot()
    counts = {name: int(suite.get(name, -1)) for name in ("tests", "skipped", "failures", "errors")}
    assert counts["tests"] == counts["skipped"] > 20
    assert counts["failures"] == counts["errors"] == 0
    report = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert report["hardware"]["device"] == "cpu"
    names = [row["name"] for row in report["rows"]]
    for part in ("iw-SFT(Q)", "iql", "awac", "td3-bc", "cql"):
        assert sum(name.startswith(part) for name in names) == 2
    assert "a million IQL updates" in names
    for part in (
        "log-prob and gradient, bfloat16",
        "SFT, tiny decoder",
        "iw-SFT, EMA, tiny decoder",
    ):
        assert any(part in name for name in names)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_at_once(tmp_path: Path) -> None:
    done = run(tmp_path / "out")
    assert done.returncode == 1 and "torch sees no GPU; --rehearse takes the CPU" in done.stdout
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["log.txt"]


def test_arguments_that_are_wrong_are_answered_with_the_usage() -> None:
    assert run().returncode == run("out", "--fast").returncode == 2
