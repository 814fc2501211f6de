"""Run folders as the d4rl job writes them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.report.scores import Cell, cells
from benchmarks.results import CONTROL, read_runs

MakeRun = Callable[..., Path]
CellOf = Callable[..., Cell]
SCORES = {
    ("hopper-a", "sft-q"): [40.0, 50.0, 63.0],
    ("hopper-a", "iw-sft-q"): [55.0, 45.0, 80.0],
    ("cheetah-b", "sft-q"): [10.0, 12.0, 11.0],
    ("cheetah-b", "iw-sft-q"): [14.0, 9.0, 30.0],
}
QUANTILES = ("05", "25", "50", "75", "95")
# No two runs take the same time.
_count = itertools.count()


@pytest.fixture(scope="session")
def make_run() -> MakeRun:
    """``make_run(root, dataset, algo, seed, score, ...)``: write a run folder."""
    return _make_run


def _make_run(
    root: Path,
    dataset: str,
    algo: str,
    seed: int,
    score: float | None,
    *,
    config: dict[str, Any] | None = None,
    rows: list[dict[str, float]] | None = None,
    **result: Any,
) -> Path:
    folder = root / "d4rl" / dataset / algo / f"seed-{seed}"
    folder.mkdir(parents=True)
    about = {"benchmark": "d4rl", "dataset": dataset, "algo": algo, "seed": seed}
    about |= {"env_id": "Hopper-v4", "preset": "paper", "estimator": "steps"}
    about |= {key: value for key, value in result.items() if key in about}
    whole_config = {
        **about,
        "settings": {"lr": 1e-4, "seed": seed},
        "versions": {"torch": "2.13.0", "mujoco": "3.11.0"},
        "hardware": {"name": "some processor", "cpus": 2},
        "command": f"python -m benchmarks.d4rl --algo {algo} --dataset /home/me/{dataset}",
        **(config or {}),
    }
    whole_result = {
        **about,
        "steps": 100,
        "normalized_score": score,
        "return_mean": 1000.0 + seed,
        "episodes": 20,
        "wall_seconds": 10.0 * (seed + 1),
        "cpu_seconds": 5.0 + 1e-6 * next(_count),
        "versions": {"mujoco": "3.11.0"},
        **result,
    }
    (folder / "config.json").write_text(json.dumps(whole_config))
    (folder / "result.json").write_text(json.dumps(whole_result))
    lines = [json.dumps(row) + "\n" for row in rows or []]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def _curve(score: float, weighted: bool) -> list[dict[str, float]]:
    rows = []
    for step in range(0, 101, 10):
        share = step / 100
        row = {"step": step, "loss": 1.0 - share, "log_prob": share - 1.0}
        row |= {"ESS": 1.0 - 0.5 * share if weighted else 1.0, "normalized_score": score * share}
        if weighted:
            row |= {f"weight_q{q}": 1.0 + share * (int(q) - 50) / 100 for q in QUANTILES}
            row["weighted_return"] = 10.0 * score
        rows.append(row)
    return rows


@pytest.fixture(scope="session")
def fill() -> Callable[[Path], None]:
    """``fill(root)``: three seeds of SFT(Q) and iw-SFT(Q) on two datasets."""
    return _fill


def _fill(root: Path) -> None:
    for (dataset, algo), scores in SCORES.items():
        for seed, score in enumerate(scores):
            _make_run(root, dataset, algo, seed, score, rows=_curve(score, algo[0] == "i"))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A folder that is filled, see ``fill``."""
    _fill(tmp_path)
    return tmp_path


@pytest.fixture
def scores_of_runs() -> dict[tuple[str, str], list[float]]:
    """Scores of ``runs`` by dataset and algorithm."""
    return SCORES


@pytest.fixture
def cell_of() -> CellOf:
    """``cell_of(root, dataset, algo)``: one cell of the runs below a folder."""

    def find(root: Path, dataset: str, algo: str) -> Cell:
        group = cells(read_runs(root, CONTROL))
        return next(cell for cell in group if (cell.dataset, cell.algo) == (dataset, algo))

    return find
