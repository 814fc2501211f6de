from __future__ import annotations

import itertools
import json
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
from rich.console import Console
from rliable import metrics as rliable_metrics

from benchmarks.report import published
from benchmarks.report.__main__ import Report, main
from benchmarks.report.aggregates import aggregate, probability_of_improvement
from benchmarks.report.page import write_report
from benchmarks.report.runs import ReportError, read_runs, unfinished_runs
from benchmarks.report.scores import Cell, bootstrap_interval, cells, uneven
from benchmarks.report.tables import cost_grid, score_grid, score_table

PNG = b"\x89PNG\r\n\x1a\n"


def make_run(
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
    """A run folder as the d4rl job leaves it."""
    folder = root / "d4rl" / dataset / algo / f"seed-{seed}"
    folder.mkdir(parents=True)
    about = {"benchmark": "d4rl", "dataset": dataset, "algo": algo, "seed": seed}
    about |= {"env_id": "Hopper-v4", "preset": "paper", "estimator": "steps"}
    (folder / "config.json").write_text(
        json.dumps(
            about
            | {
                "settings": {"lr": 1e-4, "seed": seed},
                "versions": {"torch": "2.13.0", "mujoco": "3.11.0"},
                "hardware": {"name": "some processor", "cpus": 2},
                "command": f"python -m benchmarks.d4rl --algo {algo} --dataset {dataset}",
            }
            | (config or {})
        )
    )
    (folder / "result.json").write_text(
        json.dumps(
            about
            | {
                "steps": 100,
                "normalized_score": score,
                "return_mean": 1000.0 + seed,
                "episodes": 20,
                "wall_seconds": 10.0 * (seed + 1),
                "cpu_seconds": 5.0,
                "versions": {"mujoco": "3.11.0"},
            }
            | result
        )
    )
    lines = [json.dumps(row) + "\n" for row in rows or []]
    (folder / "metrics.jsonl").write_text("".join(lines))
    return folder


def curve(score: float, weighted: bool) -> list[dict[str, float]]:
    rows = []
    for step in range(0, 101, 10):
        share = step / 100
        row = {"step": step, "loss": 1.0 - share, "ESS": 1.0 - 0.5 * share if weighted else 1.0}
        row["normalized_score"] = score * share
        if weighted:
            row |= {f"weight_q{q}": 1.0 + share * (int(q) - 50) / 100 for q in QUANTILES}
        rows.append(row)
    return rows


QUANTILES = ("05", "25", "50", "75", "95")
SCORES = {
    ("hopper-a", "sft-q"): [40.0, 50.0, 63.0],
    ("hopper-a", "iw-sft-q"): [55.0, 45.0, 80.0],
    ("cheetah-b", "sft-q"): [10.0, 12.0, 11.0],
    ("cheetah-b", "iw-sft-q"): [14.0, 9.0, 30.0],
}


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """rliable is slow; what is tested here does not hang on the number of its resamples."""
    monkeypatch.setattr("benchmarks.report.aggregates._RESAMPLES", 200)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for (dataset, algo), scores in SCORES.items():
        for seed, score in enumerate(scores):
            rows = curve(score, algo.startswith("iw"))
            make_run(tmp_path, dataset, algo, seed, score, rows=rows)
    return tmp_path


def cell_of(root: Path, dataset: str, algo: str) -> Cell:
    return next(
        cell for cell in cells(read_runs(root)) if (cell.dataset, cell.algo) == (dataset, algo)
    )


class TestScores:
    def test_mean_and_deviation(self, runs: Path) -> None:
        for (dataset, algo), scores in SCORES.items():
            cell = cell_of(runs, dataset, algo)
            assert cell.mean == pytest.approx(statistics.mean(scores))
            assert cell.std == pytest.approx(statistics.stdev(scores))
            assert cell.seeds == [0, 1, 2]

    def test_interval_is_that_of_all_resamples(self) -> None:
        values = np.array([40.0, 50.0, 63.0, 41.0, 90.0])
        means = [np.mean(draw) for draw in itertools.product(values, repeat=5)]
        low, high = bootstrap_interval(values)
        # 10,000 draws: the 2.5 % and 97.5 % ranks are known to 0.16 % (one deviation).
        assert scipy.stats.percentileofscore(means, low, kind="mean") == pytest.approx(2.5, abs=0.7)
        assert scipy.stats.percentileofscore(means, high, kind="mean") == pytest.approx(
            97.5, abs=0.7
        )

    def test_interval_agrees_with_scipy_and_is_repeatable(self) -> None:
        values = np.random.default_rng(1).normal(50, 10, size=(6, 4))
        low, high = bootstrap_interval(values)
        for column in range(4):
            reference = scipy.stats.bootstrap(
                (values[:, column],), np.mean, method="percentile", n_resamples=20_000
            ).confidence_interval
            assert low[column] == pytest.approx(reference.low, abs=0.5)
            assert high[column] == pytest.approx(reference.high, abs=0.5)
        again = bootstrap_interval(values)
        assert np.array_equal(low, again[0]) and np.array_equal(high, again[1])

    def test_equal_seeds_have_an_interval_of_no_width(self) -> None:
        assert bootstrap_interval(np.full(5, 7.5)) == pytest.approx((7.5, 7.5))

    @pytest.mark.parametrize(("seeds", "printed"), [(1, False), (2, False), (3, True)])
    def test_statistics_need_three_seeds(self, tmp_path: Path, seeds: int, printed: bool) -> None:
        for seed in range(seeds):
            make_run(tmp_path, "hopper-a", "sft", seed, 10.0 * seed)
        cell = cell_of(tmp_path, "hopper-a", "sft")
        assert (cell.std is not None) == (cell.interval is not None) == printed
        row = score_grid([cell]).rows[0]
        assert (row[5:7] == ["-", "-"]) == (not printed)

    def test_table_numbers(self, runs: Path) -> None:
        grid = score_grid(cells(read_runs(runs)))
        rows = {(row[0], row[1]): row for row in grid.rows}
        assert list(rows) == [
            ("cheetah-b", "sft-q"),
            ("cheetah-b", "iw-sft-q"),
            ("hopper-a", "sft-q"),
            ("hopper-a", "iw-sft-q"),
        ]
        assert rows["hopper-a", "sft-q"][2:6] == ["3", "20", "51.0", "11.5"]
        low, high = rows["hopper-a", "sft-q"][6].split(" to ")
        assert 40.0 <= float(low) < 51.0 < float(high) <= 63.0

    def test_cost(self, runs: Path) -> None:
        rows = cost_grid(cells(read_runs(runs))).rows
        assert rows[0] == ["cheetah-b", "sft-q", "100", "11.0", "5", "20", "-"]

    def test_return_stands_in_where_there_is_no_reference_score(self, tmp_path: Path) -> None:
        for seed in range(3):
            make_run(tmp_path, "own-data", "bc", seed, None)
        grid = score_grid(cells(read_runs(tmp_path)))
        assert grid.rows[0][4] == "1001.0 [1]"
        assert "return" in grid.notes[0]
        aggregates = aggregate(cells(read_runs(tmp_path)))
        assert aggregates.estimates == {}

    def test_terminal_table_fits_80_columns(self, tmp_path: Path) -> None:
        for seed in range(3):
            make_run(tmp_path, "hopper-medium-replay-v2", "iw-sft-q", seed, 80.0 + seed)
        console = Console(width=80)
        with console.capture() as capture:
            console.print(score_table(read_runs(tmp_path)))
        text = capture.get()
        assert "81.0" in text and "85.0 ± 4.1" in text and "83.0" in text and "…" not in text

    def test_seeds_that_were_run_differently_are_named(self, tmp_path: Path) -> None:
        make_run(tmp_path, "hopper-a", "bc", 0, 1.0)
        make_run(tmp_path, "hopper-a", "bc", 1, 1.0, steps=7)
        make_run(tmp_path, "hopper-a", "bc", 2, 1.0, config={"settings": {"lr": 0.5, "seed": 2}})
        assert uneven(cells(read_runs(tmp_path))) == [
            "hopper-a, bc: seeds differ in steps (100, 7)",
            "hopper-a, bc: seeds differ in lr (0.0001, 0.5)",
        ]


class TestPublished:
    def test_numbers_only_in_their_columns_and_for_the_exact_name(self, tmp_path: Path) -> None:
        for dataset in ("hopper-medium-replay-v2", "hopper-medium-replay", "hopper-replay"):
            make_run(tmp_path, dataset, "iw-sft-q", 0, 1.25)
        grid = score_grid(cells(read_runs(tmp_path)))
        assert grid.columns[7:] == ["paper, Table 5", "paper, Table 2"]
        rows = {row[0]: row for row in grid.rows}
        assert rows["hopper-medium-replay-v2"][7].startswith("85.0 ± 4.1 [")
        assert rows["hopper-medium-replay-v2"][8].startswith("83.0 [")
        assert all(row[4] == "1.2" for row in grid.rows)
        for other in ("hopper-medium-replay", "hopper-replay"):
            assert rows[other][7:] == ["-", "-"]
        assert any("83.0 in Table 2, 85.0 in Table 5" in note for note in grid.notes)

    def test_no_columns_without_a_match(self, runs: Path) -> None:
        assert len(score_grid(cells(read_runs(runs))).columns) == 7

    def test_published_runs_enter_no_aggregate(self, tmp_path: Path) -> None:
        for seed in range(3):
            make_run(tmp_path, "hopper-medium-replay-v2", "sft-q", seed, 50.0)
        aggregates = aggregate(cells(read_runs(tmp_path)))
        assert list(aggregates.estimates) == ["sft-q"]
        assert aggregates.estimates["sft-q"][0].point == pytest.approx(50.0)

    def test_tables_agree_where_the_paper_does(self) -> None:
        five, two = published.tables()
        differ = {
            key
            for key in five.numbers.keys() & two.numbers.keys()
            if five.numbers[key].score != two.numbers[key].score
        }
        hopper = "hopper-medium-replay-v2"
        assert differ == {(hopper, "iw-sft-q"), (hopper, "td3-bc")}
        assert all("two readings" in " ".join(five.numbers[key].caveats) for key in differ)
        own = {"sft", "sft-q", "iw-sft-q"}
        for (_, algo), number in five.numbers.items():
            assert (number.std is not None) == (algo in own)


class TestAggregates:
    def test_closed_forms(self, runs: Path) -> None:
        aggregates = aggregate(cells(read_runs(runs)))
        assert aggregates.datasets == ["cheetah-b", "hopper-a"]
        for algo in ("sft-q", "iw-sft-q"):
            scores = [SCORES[dataset, algo] for dataset in aggregates.datasets]
            everything = np.array(scores).ravel()
            iqm, mean, median, gap = aggregates.estimates[algo]
            assert iqm.point == pytest.approx(scipy.stats.trim_mean(everything, 0.25))
            assert mean.point == pytest.approx(everything.mean())
            assert median.point == pytest.approx(statistics.median(map(statistics.mean, scores)))
            assert gap.point == pytest.approx(100 - np.minimum(everything, 100).mean())
            for estimate in aggregates.estimates[algo]:
                assert estimate.low <= estimate.point <= estimate.high

    def test_probability_of_improvement_by_counting(self, runs: Path) -> None:
        aggregates = aggregate(cells(read_runs(runs)))
        assert aggregates.candidate == "iw-sft-q"
        wins = [
            statistics.mean(
                x > y for x in SCORES[dataset, "iw-sft-q"] for y in SCORES[dataset, "sft-q"]
            )
            for dataset in aggregates.datasets
        ]
        estimate = aggregates.improvement["sft-q"]
        assert estimate.point == pytest.approx(statistics.mean(wins))
        assert estimate.low <= estimate.point <= estimate.high

    def test_probability_of_improvement_is_that_of_rliable(self) -> None:
        generator = np.random.default_rng(0)
        for _ in range(20):
            x = generator.integers(0, 5, size=(4, 3)).astype(float)
            y = generator.integers(0, 5, size=(6, 3)).astype(float)
            expected = rliable_metrics.probability_of_improvement(x, y)
            assert probability_of_improvement(x, y) == pytest.approx([expected])

    def test_intervals_are_repeatable_and_leave_numpy_alone(self, runs: Path) -> None:
        group = cells(read_runs(runs))
        np.random.seed(3)
        state = np.random.get_state()[1].copy()
        first = aggregate(group)
        assert np.array_equal(state, np.random.get_state()[1])
        np.random.seed(4)
        assert aggregate(group) == first

    def test_left_out_with_the_reason(self, runs: Path) -> None:
        make_run(runs, "hopper-a", "bc", 0, 1.0)
        for dataset in ("hopper-a", "cheetah-b"):
            for seed in range(2):
                make_run(runs, dataset, "sft", seed, 1.0)
        aggregates = aggregate(cells(read_runs(runs)))
        assert aggregates.left_out == {
            "bc": "no runs on cheetah-b",
            "sft": "fewer than 3 seeds on cheetah-b, hopper-a",
        }
        assert set(aggregates.estimates) == {"sft-q", "iw-sft-q"}


class TestFolders:
    def test_unfinished_runs_are_named(self, runs: Path) -> None:
        (runs / "d4rl/hopper-a/sft-q/seed-1/result.json").unlink()
        # A reference policy is no run.
        reference = runs / "d4rl/hopper-a/reference/seed-0-1a2b3c4d"
        reference.mkdir(parents=True)
        (reference / "metrics.jsonl").write_text("")
        assert unfinished_runs(runs) == [runs / "d4rl/hopper-a/sft-q/seed-1"]
        assert len(read_runs(runs)) == 11
        page = write_report(runs, runs / "report").read_text()
        assert "1 unfinished" in page and "d4rl/hopper-a/sft-q/seed-1" in page

    def test_folders_above_the_benchmark_are_variants(self, runs: Path) -> None:
        make_run(runs / "authors", "hopper-a", "sft-q", 0, 99.0)
        group = cells(read_runs(runs))
        assert [(c.algo, c.mean) for c in group if c.dataset == "hopper-a"] == [
            ("sft-q", pytest.approx(51.0)),
            ("authors/sft-q", 99.0),
            ("iw-sft-q", pytest.approx(60.0)),
        ]

    def test_a_part_of_the_tree_can_be_read(self, runs: Path) -> None:
        assert [run.algo for run in read_runs(runs / "d4rl/hopper-a/sft-q")] == ["sft-q"] * 3

    def test_other_benchmarks_are_not_read(self, runs: Path) -> None:
        make_run(runs, "chat", "iw-sft", 0, 1.0, benchmark="llm")
        assert len(read_runs(runs)) == 12

    @pytest.mark.parametrize("content", ["", '{"seed": 1', "[1]", "\x00"])
    def test_corrupt_result_names_the_file(self, runs: Path, content: str) -> None:
        (runs / "d4rl/hopper-a/sft-q/seed-1/result.json").write_text(content)
        with pytest.raises(ReportError, match=r"hopper-a/sft-q/seed-1/result\.json"):
            read_runs(runs)

    @pytest.mark.parametrize(
        ("key", "value"),
        [("steps", None), ("normalized_score", "many"), ("normalized_score", float("nan"))],
    )
    def test_wrong_entry_names_file_and_key(self, runs: Path, key: str, value: object) -> None:
        path = runs / "d4rl/hopper-a/sft-q/seed-1/result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
        with pytest.raises(ReportError, match=rf"result\.json: '{key}'"):
            read_runs(runs)

    def test_corrupt_metrics_name_the_file(self, runs: Path) -> None:
        (runs / "d4rl/hopper-a/sft-q/seed-1/metrics.jsonl").write_text('{"step": \n{"step": 2}\n')
        with pytest.raises(ReportError, match=r"seed-1/metrics\.jsonl"):
            read_runs(runs)

    def test_the_same_run_twice(self, runs: Path) -> None:
        path = runs / "d4rl/hopper-a/sft-q/seed-1/result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"seed": 0}))
        with pytest.raises(ReportError, match=r"seed-1 and .*seed-0 hold the same run"):
            read_runs(runs)

    def test_missing_folder_and_no_runs(self, tmp_path: Path) -> None:
        with pytest.raises(ReportError, match="is not a folder"):
            read_runs(tmp_path / "nowhere")
        with pytest.raises(ReportError, match="no finished run below"):
            write_report(tmp_path, tmp_path / "report")
        assert not (tmp_path / "report").exists()


class TestPage:
    FIGURES = (
        "scores.png",
        "learning_curves.png",
        "training.png",
        "weights.png",
        "aggregates.png",
        "improvement.png",
    )

    def test_page_and_figures(self, runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
        main(Report(runs))
        out = runs / "report"
        page = (out / "report.md").read_text()
        assert sorted(path.name for path in out.iterdir()) == sorted([*self.FIGURES, "report.md"])
        for name in self.FIGURES:
            assert f"]({name})" in page
            assert (out / name).read_bytes().startswith(PNG)
        for told in (
            "| hopper-a | sft-q | 3 | 20 | 51.0 | 11.5 |",
            "Hopper-v4",
            "mujoco 3.11.0",
            "some processor",
            "python -m benchmarks.d4rl --algo iw-sft-q --dataset cheetah-b",
            "0 1 2",
        ):
            assert told in page
        printed = capsys.readouterr().out
        assert "51.0" in printed and str(out / "report.md") in printed

    def test_same_runs_give_the_same_page(self, runs: Path, tmp_path: Path) -> None:
        first = write_report(runs, tmp_path / "one").read_bytes()
        assert write_report(runs, tmp_path / "two").read_bytes() == first

    def test_one_seed_has_no_aggregates_and_drops_older_figures(self, tmp_path: Path) -> None:
        make_run(tmp_path, "hopper-a", "bc", 0, 5.0)
        out = tmp_path / "elsewhere"
        out.mkdir()
        (out / "aggregates.png").write_bytes(b"of an earlier report")
        page = write_report(tmp_path, out).read_text()
        assert sorted(path.name for path in out.iterdir()) == ["report.md", "scores.png"]
        assert "aggregates.png" not in page and "learning_curves.png" not in page
        assert "bc: fewer than 3 seeds on hopper-a" in page

    def test_an_error_leaves_the_last_report_alone(self, runs: Path) -> None:
        page = write_report(runs, runs / "report").read_bytes()
        (runs / "d4rl/hopper-a/sft-q/seed-1/result.json").write_text("{")
        with pytest.raises(SystemExit, match=r"^error: .*seed-1/result\.json"):
            main(Report(runs))
        assert (runs / "report/report.md").read_bytes() == page
