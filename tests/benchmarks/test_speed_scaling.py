"""The scaling subject ends and writes a row for each stage and size; slopes are exponents."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import tyro

from benchmarks.speed import scaling
from benchmarks.speed.job import main
from benchmarks.speed.measure import Cost, slope
from benchmarks.speed.options import Options

STAGES = {
    "steps": ["curation", "reference", "sync", "sampler", "update"],
    "trajectories": ["curation", "reference", "sync", "sampler", "update"],
    "rows": ["reading", "tokenising", "batching"],
    "turns": ["tokenizer alone", "chat encoding"],
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("scaling") / "cost.json"
    line = ["scaling", "--scale", "small", "--repeats", "1", "--json", str(path)]
    main(tyro.cli(Options, args=line))
    return path


def test_a_row_for_each_stage_and_size(path: Path) -> None:
    rows = json.loads(path.read_text())["rows"]
    expected = [
        (stage, of, size)
        for of, sizes in scaling.SIZES["small"].items()
        for size in sizes
        for stage in STAGES[of]
    ]
    assert [(row["stage"], row["of"], row["size"]) for row in rows] == expected
    assert all(row["seconds"] > 0 for row in rows)


def test_slopes_of_the_file_are_those_of_its_rows(path: Path) -> None:
    report = json.loads(path.read_text())
    assert [(s["stage"], s["of"]) for s in report["slopes"]] == [
        (stage, of) for of, stages in STAGES.items() for stage in stages
    ]
    for each in report["slopes"]:
        own = [r for r in report["rows"] if (r["stage"], r["of"]) == (each["stage"], each["of"])]
        logs = np.log([(row["size"], row["seconds"]) for row in own])
        assert each["seconds"] == pytest.approx(np.polyfit(*logs.T, 1)[0])


def test_the_plot_names_axes_and_stages(path: Path) -> None:
    root = ElementTree.fromstring(path.with_suffix(".svg").read_text())
    texts = {"".join(node.itertext()).split(":")[0] for node in root.iter() if "text" in node.tag}
    assert {*STAGES, *sum(STAGES.values(), [])} <= texts


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 1.0, 1.7])
def test_the_slope_of_a_power_law_is_its_exponent(exponent: float) -> None:
    sizes = [10, 1_000, 70_000]
    costs = [3e-4 * size**exponent for size in sizes]
    assert slope(sizes, costs) == pytest.approx(exponent)
    rows = [Cost("sort", n, "rows", cost, None) for n, cost in zip(sizes, costs, strict=True)]
    # Peaks below a MB are left out: they are the allocator's.
    rows += [Cost("sort", n, "steps", 1.0, mb) for n, mb in ((1, 0.5), (10, 2.0), (100, 200.0))]
    by_rows, by_steps = scaling.growth(rows)
    assert (by_rows.seconds, by_rows.mb) == (pytest.approx(exponent), None)
    assert by_steps.mb == pytest.approx(2.0)


@pytest.mark.skipif(sys.platform != "linux", reason="peaks are reset on Linux only")
def test_memory_is_that_of_one_call_above_what_was_there() -> None:
    """In a process of its own: a system may take idle pages away from a large one meanwhile."""
    code = """
import torch
from benchmarks.speed.measure import measured

held = torch.ones(20_000_000)
cost, result = measured("fill", lambda: torch.ones(5_000_000), size=1, of="rows", repeats=2)
assert len(result) == 5_000_000 and held[0] == 1
print(cost.mb)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == pytest.approx(20, abs=1)
