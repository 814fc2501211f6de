"""Published numbers have columns of their own, and only where they belong."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from benchmarks.d4rl.options import find_algorithm
from benchmarks.report.aggregates import aggregate
from benchmarks.report.page import write_report
from benchmarks.report.scores import cells
from benchmarks.report.tables import published_scores, score_grid
from benchmarks.results import CONTROL, read_runs

if TYPE_CHECKING:
    from tests.benchmarks.report.conftest import MakeRun


def test_numbers_only_in_their_columns_and_for_the_exact_name(
    tmp_path: Path, make_run: MakeRun
) -> None:
    for dataset in ("hopper-medium-replay-v2", "hopper-medium-replay", "hopper-replay"):
        make_run(tmp_path, dataset, "iw-sft-q", 0, 1.25)
    grid = score_grid(cells(read_runs(tmp_path, CONTROL)))
    assert grid.columns[10:] == ["paper, Table 5", "paper, Table 2"]
    rows = {row[0]: row for row in grid.rows}
    assert rows["hopper-medium-replay-v2"][10].startswith("85.0 ± 4.1 [")
    assert rows["hopper-medium-replay-v2"][11].startswith("83.0 [")
    assert all(row[4] == "1.2" for row in grid.rows)
    for other in ("hopper-medium-replay", "hopper-replay"):
        assert rows[other][10:] == ["-", "-"]
    assert any("83.0 in Table 2, 85.0 in Table 5" in note for note in grid.notes)


def test_published_runs_enter_no_aggregate(tmp_path: Path, make_run: MakeRun) -> None:
    for seed in range(3):
        make_run(tmp_path, "hopper-medium-replay-v2", "sft-q", seed, 50.0)
    aggregates = aggregate(cells(read_runs(tmp_path, CONTROL)))
    assert list(aggregates.estimates) == ["sft-q"]
    assert aggregates.estimates["sft-q"][0].point == pytest.approx(50.0)


def test_tables_agree_where_the_paper_does() -> None:
    five, two = (t for t in published_scores()[1] if t.label[-1] in "52")
    differ = {
        key
        for key in five.numbers.keys() & two.numbers.keys()
        if five.numbers[key]["score"] != two.numbers[key]["score"]
    }
    hopper = "hopper-medium-replay-v2"
    assert differ == {(hopper, "iw-sft-q"), (hopper, "td3-bc")}
    assert all("two readings" in " ".join(five.numbers[key]["caveats"]) for key in differ)
    own = {"sft", "sft-q", "iw-sft-q"}
    for (_, algo), number in five.numbers.items():
        assert ("std" in number) == (algo in own)


def test_a_published_number_is_marked_and_apart_in_both_pages(
    tmp_path: Path, make_run: MakeRun
) -> None:
    make_run(tmp_path, "hopper-medium-replay-v2", "iw-sft-q", 0, 12.5)
    html = write_report(tmp_path, tmp_path / "report").page.read_text()
    assert re.search(r"<td[^>]*><em>85\.0 ± 4\.1 <sup>\[", html)
    assert re.search(r"<td[^>]*>12\.5</td>", html)
    page = (tmp_path / "report/report.md").read_text()
    assert "*85.0 ± 4.1 [" in page and "| 12.5 |" in page
    assert "arxiv.org/abs/2507.12856" in page


def test_the_kitchen_experiment(tmp_path: Path, make_run: MakeRun) -> None:
    task = "kitchen-partial-v0--to--kitchen-complete-v0+kitchen-mixed-v0"
    for algo in ("bc-5", "sft", "sft-q", "iw-sft-q"):
        make_run(tmp_path, task, algo, 0, 1.0)
    make_run(tmp_path, "kitchen-partial-v0", "bc", 0, 1.0)
    make_run(tmp_path, "kitchen-complete-v0", "bc", 0, 1.0)
    make_run(tmp_path, "my-kitchen--to--kitchen-complete-v0", "sft-q", 0, 1.0)
    grid = score_grid(cells(read_runs(tmp_path, CONTROL)))
    assert grid.columns[10:] == ["paper, Table 3"]
    published_scores = {(row[0], row[1]): row[10].split(" [")[0] for row in grid.rows}
    name = "kitchen-partial-v0 -> kitchen-complete-v0+kitchen-mixed-v0"
    assert published_scores == {
        ("kitchen-partial-v0", "BC"): "37.0 ± 4.2",
        ("kitchen-complete-v0", "BC"): "62.5 ± 2.0",
        (name, "BC-5%"): "28.9 ± 8.4",
        (name, "SFT"): "45.6 ± 8.5",
        (name, "SFT(Q)"): "58.2 ± 6.2",
        (name, "iw-SFT(Q)"): "61.8 ± 4.1",
        ("my-kitchen -> kitchen-complete-v0", "SFT(Q)"): "-",
    }


def test_every_published_number_names_a_known_algorithm() -> None:
    for table in published_scores()[1]:
        for _, algo in table.numbers if table.label != "paper, Table 1" else ():
            find_algorithm(algo)
