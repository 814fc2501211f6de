"""The cost of choosing a setting, against closed forms; critics that have not levelled off."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks.report.page import write_report
from benchmarks.report.scores import cells, curve_of
from benchmarks.report.tables import matrix_grid, score_grid
from benchmarks.report.tuning import (
    EPISODES,
    episode_groups,
    find_settings,
    tune,
    tune_all,
    tuning_grid,
)
from benchmarks.results import CONTROL, read_runs

if TYPE_CHECKING:
    from tests.benchmarks.report.conftest import MakeRun

Curve = Callable[[float], float]


def make_settings(make_run: MakeRun, root: Path, scores: dict[str, list[float]]) -> None:
    """One run for each setting of iw-SFT(Q), a folder each, with these episodes."""
    for name, episodes in scores.items():
        mean = float(np.mean(episodes))
        make_run(root / name, "a", "iw-sft-q", 0, mean, episode_scores=episodes)


def test_policies_without_spread_are_known_when_each_was_played(
    tmp_path: Path, make_run: MakeRun
) -> None:
    make_settings(make_run, tmp_path, {"k1": [0.0] * 5, "k3": [30.0] * 5, "k10": [60.0] * 5})
    make_run(tmp_path, "a", "bc", 0, 7.0, episode_scores=[6.0, 8.0])
    settings = find_settings(cells(read_runs(tmp_path, CONTROL)))
    assert {names: len(found) for names, found in settings.items()} == {
        ("a", "bc"): 1,
        ("a", "iw-sft-q"): 3,
    }
    _, expected, best = tune(settings["a", "iw-sft-q"])
    assert len(expected) == EPISODES + 1
    # Any one; the one that was played; the better of two, whose mean is (30 + 60 + 60) / 3; then
    # the best.
    assert expected[0] == 30.0 and best == 60.0
    assert expected[1:3] == pytest.approx([30.0, 50.0], abs=2.5)
    assert set(expected[3:]) == {60.0}
    (row,) = tuning_grid(tune_all(settings)).rows
    assert row == ["a", "iw-SFT(Q)", "3", "30.0", "60.0", "60.0", "60.0", "60.0"]


def test_noise_costs_episodes(tmp_path: Path, make_run: MakeRun) -> None:
    source = np.random.default_rng(0)
    episodes = {f"k{k}": list(source.normal(50 + 5 * k, 20, 100)) for k in range(4)}
    make_settings(make_run, tmp_path, episodes)
    (found,) = find_settings(cells(read_runs(tmp_path, CONTROL))).values()
    _, expected, best = tune(found)
    means = [np.mean(scores) for scores in episodes.values()]
    assert expected[0] == pytest.approx(np.mean(means), abs=0.01)
    assert best == pytest.approx(max(means), abs=0.01)
    assert expected[0] < expected[10] < expected[100] < expected[-1] < best
    assert expected[-1] > 0.9 * best + 0.1 * expected[0]


@pytest.mark.parametrize("count", [1, 3, 7, 15, 20, 30, 50, 110])
def test_each_episode_counts_alike(tmp_path: Path, make_run: MakeRun, count: int) -> None:
    """Whatever their number: the mean of a setting is that of its episodes."""
    episodes = {f"k{k}": list(np.arange(count) ** 2.0 / count + k) for k in (0, 5)}
    make_settings(make_run, tmp_path, episodes)
    (found,) = find_settings(cells(read_runs(tmp_path, CONTROL))).values()
    _, expected, best = tune(found)
    means = [np.mean(scores) for scores in episodes.values()]
    assert [expected[0], best] == pytest.approx([np.mean(means), max(means)], abs=0.01)
    groups = episode_groups(found[0].runs[0])
    assert len(groups) == 20 and groups == sorted(groups)


def test_a_report_s_record_says_the_same(tmp_path: Path, make_run: MakeRun) -> None:
    source = np.random.default_rng(0)
    make_settings(make_run, tmp_path, {f"k{k}": list(source.normal(k, 3, 50)) for k in (1, 2)})
    for seed in range(3):
        rows = [{"step": s, "pred_value": s + seed, "normalized_score": 5.0} for s in range(1, 101)]
        make_run(tmp_path, "a", "iql", seed, 5.0 + seed, rows=rows)
    page = (write_report(tmp_path, tmp_path / "report").page.parent / "report.md").read_text()
    assert "critics of 3 have not levelled off" in page and "Expected score of the chosen" in page
    assert "One setting each" not in page
    groups = [cells(read_runs(tmp_path / part, CONTROL)) for part in (".", "report/runs.json")]
    first, second = (tuning_grid(tune_all(find_settings(group))) for group in groups)
    assert first == second
    moving = [{cell.algo: cell.moving for cell in group} for group in groups]
    assert moving[0] == moving[1] and moving[0]["iql"]
    for run in json.loads((tmp_path / "report/runs.json").read_text()):
        assert len(json.dumps(run.get("curve"))) < 300
        assert len(run.get("episode_groups", [])) in (0, 20)


@pytest.mark.parametrize(
    ("q", "score", "seeds", "moving"),
    [
        (lambda s: 10.0, lambda s: 50.0, 3, []),
        (lambda s: float(s), lambda s: 50.0, 3, ["Q"]),
        (lambda s: 10.0, lambda s: -float(s), 3, ["score"]),
        # Early growth, a change below 1 %, too few seeds, no critic.
        (lambda s: min(s, 50.0), lambda s: 50.0, 3, []),
        (lambda s: 100 + s / 100, lambda s: 50.0, 3, []),
        (lambda s: float(s), lambda s: 50.0, 2, []),
        (None, lambda s: float(s), 3, []),
    ],
)
def test_a_critic_that_still_changes_is_marked(
    tmp_path: Path, make_run: MakeRun, q: Curve | None, score: Curve, seeds: int, moving: list[str]
) -> None:
    for seed in range(seeds):
        rows = []
        for step in range(5, 101, 5):
            noise = (seed + 1) * (-1) ** step / 1000
            rows.append({"step": step, "log_prob": 0.0})
            if q is not None:
                rows[-1]["pred_value"] = q(step) * (1 + noise)
            if step % 10 == 0:
                rows[-1]["normalized_score"] = score(step) * (1 + noise)
        make_run(tmp_path, "a", "iql", seed, 50.0 + seed, rows=rows)
    (cell,) = cells(read_runs(tmp_path, CONTROL))
    assert list(cell.moving) == moving
    curve = curve_of(cell.runs[0])
    assert len(curve["score"]) == 10 and None not in curve["score"]
    notes = [*score_grid([cell]).notes, *matrix_grid([cell]).notes]
    assert [note.split(":")[0] for note in notes].count("Not levelled off") == 2 * len(moving)
    for name in moving:
        assert any(note.startswith(f"Not levelled off: {name} changes by") for note in notes)
        low, high = cell.moving[name]
        assert low <= 30 * np.sign(low + high) + 0.1 and high >= 30 * np.sign(low + high) - 0.1
