"""Which folders are runs, and errors that name the damaged ones."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks.report.page import write_report
from benchmarks.report.scores import cells
from benchmarks.report.tables import score_grid
from benchmarks.results import CONTROL, ResultsError, read_all, read_runs

if TYPE_CHECKING:
    from tests.benchmarks.report.conftest import MakeRun


def remove_curves(runs: Path) -> None:
    """Leave the last update alone, because figures take long."""
    for path in runs.rglob("metrics.jsonl"):
        path.write_text('{"step": 100}\n')


def test_unfinished_runs_are_listed_with_how_far_they_came(runs: Path, make_run: MakeRun) -> None:
    remove_curves(runs)
    (runs / "d4rl/hopper-a/sft-q/seed-1/result.json").unlink()
    settings = {"settings": {"baseline": {"steps": 5000, "lr": 0.1}}}
    for seed in (0, 1):
        cut = make_run(runs / "lag50", "hopper-a", "iql", seed, 1.0, config=settings)
        (cut / "result.json").unlink()
    (cut / "metrics.jsonl").write_text('{"step": 1}\n{"step": 70}\n')
    (runs / "lag50/d4rl/hopper-a/iql/seed-0/metrics.jsonl").unlink()
    # A reference policy is not a run, nor is a run of another benchmark.
    reference = runs / "d4rl/hopper-a/reference/1a2b3c4d-seed-0"
    reference.mkdir(parents=True)
    (reference / "metrics.jsonl").write_text("")
    other = runs / "llm/chat/iw-sft/seed-0"
    other.mkdir(parents=True)
    (other / "config.json").write_text("{}")
    unfinished = [
        (run.folder, run.dataset, run.algo, run.seed, run.step, run.steps)
        for run in read_all(runs, CONTROL)[1]
    ]
    assert unfinished == [
        (runs / "d4rl/hopper-a/sft-q/seed-1", "hopper-a", "sft-q", 1, 100, None),
        (runs / "lag50/d4rl/hopper-a/iql/seed-0", "hopper-a", "lag50/iql", 0, 0, 5000),
        (runs / "lag50/d4rl/hopper-a/iql/seed-1", "hopper-a", "lag50/iql", 1, 70, 5000),
    ]
    assert len(read_runs(runs, CONTROL)) == 11
    write_report(runs, runs / "report")
    page = (runs / "report/report.md").read_text()
    assert "They enter nothing here" in page and "3 more are unfinished" in page
    assert "- hopper-a, lag50/iql, seed 1: update 70 of 5000" in page
    # In the table of scores they are missing, with no number.
    assert "| hopper-a | SFT(Q) | 2 of 3 |" in page
    assert "| hopper-a | lag50/IQL | 0 of 2 | - | - | - | - |" in page


def test_folders_above_the_benchmark_are_variants(runs: Path, make_run: MakeRun) -> None:
    make_run(runs / "authors", "hopper-a", "sft-q", 0, 99.0)
    group = cells(read_runs(runs, CONTROL))
    assert [(c.algo, c.mean) for c in group if c.dataset == "hopper-a"] == [
        ("sft-q", pytest.approx(51.0)),
        ("authors/sft-q", 99.0),
        ("iw-sft-q", pytest.approx(60.0)),
    ]


@pytest.mark.parametrize("place", ["d4rl/old/hopper-a/sft-q", "d4rl/hopper-a/sft-q/old"])
def test_further_folders_below_the_benchmark_are_variants_too(
    tmp_path: Path, make_run: MakeRun, place: str
) -> None:
    folder = make_run(tmp_path, "hopper-a", "sft-q", 0, 99.0)
    (tmp_path / place).mkdir(parents=True)
    folder.rename(tmp_path / place / "seed-0")
    (run,) = read_runs(tmp_path, CONTROL)
    assert (run.dataset, run.algo, run.variant) == ("hopper-a", "old/sft-q", "old")


def test_a_part_of_the_tree_can_be_read(runs: Path) -> None:
    assert [run.algo for run in read_runs(runs / "d4rl/hopper-a/sft-q", CONTROL)] == ["sft-q"] * 3


def test_other_benchmarks_are_not_read(runs: Path, make_run: MakeRun) -> None:
    make_run(runs, "chat", "iw-sft", 0, 1.0, benchmark="llm")
    assert len(read_runs(runs, CONTROL)) == 12


def damage(runs: Path) -> str:
    """What is wrong with the one damaged run; the others are read."""
    finished, (run,) = read_all(runs, CONTROL)
    assert len(finished) == 11
    assert run.folder == runs / DAMAGED and (run.algo, run.seed) == ("sft-q", 1)
    return run.damage


DAMAGED = "d4rl/hopper-a/sft-q/seed-1"


def test_a_report_marks_a_damaged_run(runs: Path) -> None:
    remove_curves(runs)
    (runs / DAMAGED / "result.json").write_text("[1]")
    write_report(runs, runs / "report")
    page = (runs / "report/report.md").read_text()
    assert re.search(rf"^- hopper-a, sft-q, seed 1: .*{DAMAGED}/result.json", page, re.MULTILINE)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        *(("result.json", text) for text in ("", '{"seed": 1', "[1]", "\x00", "[" * 100_000)),
        *(("metrics.jsonl", text) for text in ('{"step": \n{"step": 2}\n', "3\n", '{"loss": 1}\n')),
    ],
)
def test_a_corrupt_file_is_named_and_its_run_left_out(runs: Path, name: str, content: str) -> None:
    (runs / DAMAGED / name).write_text(content)
    assert f"{DAMAGED}/{name}" in damage(runs)


@pytest.mark.parametrize(
    ("name", "key", "value"),
    [
        ("result.json", "steps", None),
        ("result.json", "benchmark", True),
        ("result.json", "normalized_score", "many"),
        ("result.json", "normalized_score", True),
        ("result.json", "normalized_score", float("nan")),
        ("result.json", "return_mean", float("inf")),
        ("result.json", "success_rate", 40),
        ("result.json", "seed", True),
        ("result.json", "steps", -1),
        ("result.json", "episodes", 0),
        ("result.json", "interval", [0.5, 0.1]),
        ("result.json", "n", "many"),
        # Of another run than the result.
        ("config.json", "algo", "iql"),
        ("config.json", "seed", 4),
        ("config.json", "settings", {"baseline": {"steps": 5000}}),
    ],
)
def test_a_wrong_entry_is_named_with_its_file(
    runs: Path, name: str, key: str, value: object
) -> None:
    path = runs / DAMAGED / name
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    wrong = f"result.json: '{key}'" if name == "result.json" else f"{DAMAGED} mixes two runs"
    assert wrong in damage(runs)


@pytest.mark.parametrize("name", ["result.json", "config.json", "metrics.jsonl"])
def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_named(runs: Path, name: str) -> None:
    for make in (os.mkfifo, os.mkdir):
        path = runs / DAMAGED / name
        if path.is_dir():
            path.rmdir()
        else:
            path.unlink()
        make(path)
        assert f"{DAMAGED}/{name} is not a file" in damage(runs)


def test_the_same_run_twice(runs: Path) -> None:
    folder = runs / "d4rl/hopper-a/sft-q/seed-1"
    for path in (folder / "result.json", folder / "config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"seed": 0}))
    with pytest.raises(ResultsError, match=r"seed-1 and .*seed-0 hold the same run"):
        read_runs(runs, CONTROL)


@pytest.mark.parametrize("change", [{}, {"seed": 7}])
@pytest.mark.parametrize(
    "to",
    [
        *("d4rl/hopper-a/sft-q/seed-7", "d4rl/a/sft/seed-1", "old/" + DAMAGED, DAMAGED + "-old"),
        *("d4rl/hopper-a/sft-q/best", DAMAGED + " (copy)", DAMAGED + ".bak", "best"),
    ],
)
def test_a_copied_run_is_named_and_left_out(runs: Path, to: str, change: dict[str, int]) -> None:
    """Under another name, in another folder, also where its seed was changed."""
    shutil.copytree(runs / DAMAGED, runs / to)
    for path in ((runs / to) / "result.json", (runs / to) / "config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    finished, (copy,) = read_all(runs, CONTROL)
    assert len(finished) == 12 and copy.folder == runs / to
    assert copy.damage == f"{runs / to} holds a copy of the run in {runs / DAMAGED}"
    # A copy does not count as a missing seed.
    grid = score_grid(cells(finished), [copy])
    assert {row[2] for row in grid.rows} == {"3"}


def test_a_run_whose_folder_has_another_name_is_named_and_left_out(
    runs: Path, make_run: MakeRun
) -> None:
    home = runs / "d4rl/hopper-a/sft-q"
    (runs / DAMAGED).rename(home / "best")
    cut = make_run(runs, "hopper-a", "sft-q", 3, 1.0)
    (cut / "result.json").unlink()
    cut.rename(home / "last")
    # The configuration of a model, and what another program wrote.
    for place in (home / "seed-0/checkpoint", runs / "notes"):
        place.mkdir()
        (place / "config.json").write_text('{"model_type": "qwen2"}')
        (place / "result.json").write_text('{"seed": 1}')
    finished, others = read_all(runs, CONTROL)
    assert len(finished) == 11
    told = f"{home / 'best'} holds a run, and is not named seed-1: rename it"
    assert [(run.folder.name, run.algo, run.seed, run.damage) for run in others] == [
        ("best", "sft-q", 1, told),
        ("last", "sft-q", 3, ""),
    ]
    # It counts as a missing seed. A folder by itself has no place in a tree.
    assert score_grid(cells(finished), others).rows[2][2] == "2 of 4"
    assert [run.damage for run in read_all(home / "best", CONTROL)[1]] == [told]


@pytest.mark.parametrize(
    "change",
    [
        {"normalized_score": 0.5, "episode_scores": [50.0, 60.0]},
        {"episode_returns": [0.0]},
        {"episode_scores": ["many"]},
        {"episode_scores": []},
    ],
)
def test_a_score_that_is_not_the_mean_of_its_episodes_is_named(
    runs: Path, change: dict[str, object]
) -> None:
    path = runs / DAMAGED / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert "result.json: '" in damage(runs)


def test_a_mean_near_zero_may_be_rounded(runs: Path) -> None:
    """Here numpy adds in pairs: its mean of numbers that cancel is another than that of sum."""
    half = [1000.1 + k / 7 for k in range(10)]
    returns = [*half, *(-x for x in reversed(half))]
    mean, path = float(np.mean(returns)), runs / DAMAGED / "result.json"
    assert not math.isclose(mean, sum(returns) / len(returns), rel_tol=1e-6)
    result = json.loads(path.read_text()) | {"episode_returns": returns}
    path.write_text(json.dumps(result | {"return_mean": mean}))
    assert len(read_runs(runs, CONTROL)) == 12
    path.write_text(json.dumps(result | {"return_mean": 0.01}))
    assert "'return_mean' is 0.01, not the mean of" in damage(runs)


def test_missing_folder_and_no_runs(tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="is not a folder"):
        read_runs(tmp_path / "nowhere", CONTROL)
    for content in ('{"seed": 0}', "[1]"):
        (tmp_path / "result.json").write_text(content)
        with pytest.raises(ResultsError, match="is not the runs.json of a report"):
            read_runs(tmp_path / "result.json", CONTROL)
    (tmp_path / "result.json").unlink()
    with pytest.raises(ResultsError, match="no finished run below"):
        write_report(tmp_path, tmp_path / "report")
    assert not (tmp_path / "report").exists()


def test_runs_behind_links_are_read_once(
    runs: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def names() -> list[tuple[str, str, int]]:
        finished, others = read_all(runs, CONTROL)
        assert others == []
        return sorted((run.dataset, run.algo, run.seed) for run in finished)

    before = names()
    # The disk was full, so runs went to another one, or to another folder of this one.
    elsewhere = (tmp_path_factory.mktemp("disk") / "sft", runs / "large")
    for home, moved in zip(elsewhere, ("sft-q", "iw-sft-q/seed-0"), strict=True):
        shutil.move(runs / "d4rl/hopper-a" / moved, home)
        (runs / "d4rl/hopper-a" / moved).symlink_to(home)
    assert names() == before
    # Links to what is there already, to what is above, and to nothing.
    (runs / "d4rl/hopper-a/best").symlink_to(runs / "d4rl/hopper-a/iw-sft-q")
    (runs / "d4rl/hopper-a/sft-q/up").symlink_to(runs)
    (runs / "d4rl/hopper-a/sft-q/seed-9").symlink_to("nowhere")
    assert names() == before


@pytest.mark.parametrize("name", ["index.html", "report.md", "runs.json"])
def test_files_of_a_user_are_not_replaced(runs: Path, tmp_path: Path, name: str) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / name).write_text("<html>[1]</html>")
    with pytest.raises(FileExistsError, match=f"{name} is not a file of iwsft; choose another"):
        write_report(runs, site)
    assert [path.read_text() for path in site.iterdir()] == ["<html>[1]</html>"]


def test_a_report_takes_the_place_of_one(runs: Path) -> None:
    remove_curves(runs)
    report = runs / "report"
    for gone in (("report.md",), ("index.html",), ("index.html", "report.md"), ()):
        write_report(runs, report)
        for name in gone:
            (report / name).unlink()
    # Records have no curves, so those of their own report would be less.
    with pytest.raises(FileExistsError, match=r"runs.json would be replaced by a report of it"):
        write_report(report / "runs.json", report)
