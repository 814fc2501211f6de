"""Means and deviations over seeds, against the standard library."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.report.scores import cells, uneven
from benchmarks.results import CONTROL, read_runs

if TYPE_CHECKING:
    from tests.benchmarks.report.conftest import CellOf, MakeRun

Scores = dict[tuple[str, str], list[float]]


def test_mean_and_deviation(runs: Path, cell_of: CellOf, scores_of_runs: Scores) -> None:
    for (dataset, algo), scores in scores_of_runs.items():
        cell = cell_of(runs, dataset, algo)
        assert cell.mean == pytest.approx(statistics.mean(scores))
        assert cell.std == pytest.approx(statistics.stdev(scores))
        assert cell.seeds == [0, 1, 2]


def test_seeds_that_were_run_differently_are_named(tmp_path: Path, make_run: MakeRun) -> None:
    make_run(tmp_path, "hopper-a", "bc", 0, 1.0)
    make_run(tmp_path, "hopper-a", "bc", 1, 1.0, steps=7)
    make_run(tmp_path, "hopper-a", "bc", 2, 1.0, config={"settings": {"lr": 0.5, "seed": 2}})
    assert uneven(cells(read_runs(tmp_path, CONTROL))) == [
        "hopper-a, BC: seeds differ in steps (100, 7)",
        "hopper-a, BC: seeds differ in lr (0.0001, 0.5)",
    ]
