"""The report's table of weights, against means by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.report.grid import NOTHING
from benchmarks.report.scores import cells
from benchmarks.report.weights import weight_grid
from benchmarks.results import FinishedRun


def run(seed: int, algo: str, metrics: list[dict[str, float]]) -> FinishedRun:
    result: dict[str, Any] = {"dataset": "hopper", "algo": algo, "seed": seed}
    result |= {"normalized_score": 1.0, "return_mean": 1.0, "episodes": 1}
    return FinishedRun(Path(f"{algo}/seed-{seed}"), "", result, {}, metrics)


def test_the_last_look_of_each_seed_is_averaged() -> None:
    quantiles = {"weight_q05": 0.5, "weight_q95": 2.0}
    first = [
        {"step": 1, "ESS": 1.0, "weight_q50": 1.0, **quantiles},
        {"step": 9, "ESS": 0.5, "weight_q50": 0.8, "pareto_k": 0.3, **quantiles},
        {"step": 10, "ESS": 0.1},
    ]
    second = [{"step": 9, "ESS": 0.7, "weight_q50": 0.6, **quantiles}]
    runs = [run(0, "iw-sft", first), run(1, "iw-sft", second), run(0, "sft", [{"step": 1}])]
    # The seed without a k-hat does not count in its mean; runs without weights have no row.
    assert weight_grid(cells(runs)).rows == [
        ["hopper", "iw-SFT", "0.6", "0.5", "0.7", "2", "0.3", NOTHING]
    ]
