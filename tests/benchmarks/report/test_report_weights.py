"""The sweep has one row per setting of the weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.report.figures import draw_sweep
from benchmarks.report.scores import cells
from benchmarks.report.tables import sweep_grid, swept
from benchmarks.results import CONTROL, read_runs

if TYPE_CHECKING:
    from tests.benchmarks.report.conftest import MakeRun


def config(
    k: float, target: float | None = None, sync: int = 199, cut: float = 90.0, lr: float = 1e-4
) -> dict[str, Any]:
    fine_tuning = {"k": k, "alpha": 0.99, "lr": lr, "steps": 100}
    weights = {"fine_tuning": fine_tuning, "target_ess": target, "sync_every": sync}
    return {"settings": {"cuts": [cut], **weights}}


def rows(ess: float) -> list[dict[str, float]]:
    return [
        {"step": 50, "ESS": 1.0, "weight_q50": 1.0, "weighted_return": 7.0},
        {"step": 100, "ESS": ess, "weight_q50": 1.0, "weighted_return": 1000 * ess},
    ]


def test_settings_scores_and_weights_at_the_end(tmp_path: Path, make_run: MakeRun) -> None:
    for seed in range(3):
        task = (tmp_path, "hopper-a")
        make_run(*task, "sft-q", seed, 30.0 + seed, config=config(1.0))
        make_run(*task, "iql", seed, 50.0)
        make_run(*task, "iw-sft-q", seed, 40.0 + seed, config=config(1.0), rows=rows(0.9))
        for name, settings, ess in (
            ("k10", config(10.0), 0.1 * seed),
            ("ess40", config(1.0, 0.4), 0.4),
            ("lag50", config(1.0, sync=50), 0.8),
            ("auto", {"settings": config(1.0)["settings"] | {"q": "auto"}}, 0.6),
        ):
            root = tmp_path / name
            make_run(root, "hopper-a", "iw-sft-q", seed, 60.0, config=settings, rows=rows(ess))
        # A single setting is not a sweep.
        make_run(tmp_path, "cheetah-b", "iw-sft-q", seed, 1.0, config=config(1.0), rows=rows(0.9))
    group = cells(read_runs(tmp_path, CONTROL))
    assert [[row[1], *row[2:7], *row[8:]] for row in sweep_grid(swept(group)).rows] == [
        ["SFT(Q)", "-", "-", "all weights 1", "3", "31.0", "-", "-"],
        ["auto/iw-SFT(Q)", "auto", "-", "sync every 199", "3", "60.0", "0.6", "600"],
        ["ess40/iw-SFT(Q)", "-", "0.4", "sync every 199", "3", "60.0", "0.4", "400"],
        ["lag50/iw-SFT(Q)", "1", "-", "sync every 50", "3", "60.0", "0.8", "800"],
        ["iw-SFT(Q)", "1", "-", "sync every 199", "3", "41.0", "0.9", "900"],
        ["k10/iw-SFT(Q)", "10", "-", "sync every 199", "3", "60.0", "0.1", "100"],
    ]
    assert sweep_grid(swept(group)).rows[0][7] == "28.5 to 33.5"  # 30, 31, 32
    (panel,) = draw_sweep(swept(group))["hopper-a"].axes
    assert panel.figure.get_suptitle() == "hopper-a"
    words = {text.get_text() for text in panel.texts}
    assert words == {
        *("ESS 0.4, sync every 199", "k 1, sync every 50"),
        *("k 1, sync every 199", "k 10, sync every 199", "auto, sync every 199"),
    }


def test_runs_that_differ_in_more_than_weights_are_separate_sweeps(
    tmp_path: Path, make_run: MakeRun
) -> None:
    scores = {"top50": 70.0, "top10": 30.0}
    for name, cut in (("top50", 50.0), ("top10", 90.0)):
        for seed in range(3):
            task = ("hopper-a", "sft-q", seed, scores[name])
            make_run(tmp_path / name, *task, config=config(1.0, cut=cut, lr=4e-5))
            for k in (1.0, 10.0):
                root, score = tmp_path / f"{name}-k{k:g}", scores[name] + k
                settings = config(k, cut=cut)
                make_run(
                    root, "hopper-a", "iw-sft-q", seed, score, config=settings, rows=rows(1 / k)
                )
    # The only setting with this cut.
    make_run(tmp_path / "top30", "hopper-a", "iw-sft-q", 0, 1.0, config=config(1.0, cut=70.0))
    rows_of_sweep = swept(cells(read_runs(tmp_path, CONTROL)))
    assert [(cell.algo, cell.mean) for _, cell in rows_of_sweep] == [
        *(("top10/sft-q", 30.0), ("top10-k1/iw-sft-q", 31.0), ("top10-k10/iw-sft-q", 40.0)),
        *(("top50/sft-q", 70.0), ("top50-k1/iw-sft-q", 71.0), ("top50-k10/iw-sft-q", 80.0)),
    ]
    (panel,) = draw_sweep(rows_of_sweep)["hopper-a"].axes
    # Lines and points are named where there are several.
    words = {text.get_text() for text in panel.texts}
    assert {"top10/SFT(Q)", "top50/SFT(Q)", "top50-k10"} <= words


def test_seeds_of_one_folder_with_several_settings_are_told_apart(
    tmp_path: Path, make_run: MakeRun
) -> None:
    for seed, k in enumerate((1.0, 1.0, 3.0)):
        make_run(tmp_path, "hopper-a", "iw-sft-q", seed, 10.0 * k, config=config(k), rows=rows(0.5))
    rows_of_sweep = sweep_grid(swept(cells(read_runs(tmp_path, CONTROL)))).rows
    assert [(row[2], row[5], row[6], row[7]) for row in rows_of_sweep] == [
        ("1", "2", "10.0", "- [1]"),
        ("3", "1", "30.0", "- [1]"),
    ]


def test_a_moving_average_is_named_by_its_decay(tmp_path: Path, make_run: MakeRun) -> None:
    for k in (1.0, 2.0):
        root = tmp_path / f"k{k:g}"
        settings = config(k, sync=1)
        make_run(root, "a", "iw-sft", 0, 1.0, config=settings, estimator="trajectories")
    assert [row[4] for row in sweep_grid(swept(cells(read_runs(tmp_path, CONTROL)))).rows] == [
        "average, 0.99",
        "average, 0.99",
    ]


@pytest.mark.parametrize("algo", ["bc", "sft-q", "iql", "iw-sft-step"])
def test_algorithms_without_weights_of_trajectories_are_not_in_a_sweep(
    tmp_path: Path, make_run: MakeRun, algo: str
) -> None:
    for k in (1.0, 2.0):
        make_run(tmp_path / f"k{k:g}", "hopper-a", algo, 0, 1.0, config=config(k))
    assert swept(cells(read_runs(tmp_path, CONTROL))) == []
