"""Aggregates over datasets, against closed forms and counting."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import scipy.stats

from benchmarks.report.aggregates import aggregate, aggregate_grid, difference_grid
from benchmarks.report.page import write_report
from benchmarks.report.scores import UNDER_TRAINED, cells
from benchmarks.results import CONTROL, read_runs

if TYPE_CHECKING:
    from tests.benchmarks.report.conftest import MakeRun

Scores = dict[tuple[str, str], list[float]]


def test_closed_forms(runs: Path, scores_of_runs: Scores) -> None:
    aggregates = aggregate(cells(read_runs(runs, CONTROL)))
    assert aggregates.datasets == ["cheetah-b", "hopper-a"]
    for algo in ("sft-q", "iw-sft-q"):
        scores = [scores_of_runs[dataset, algo] for dataset in aggregates.datasets]
        everything = np.array(scores).ravel()
        iqm, mean, gap = aggregates.estimates[algo]
        assert iqm.point == pytest.approx(scipy.stats.trim_mean(everything, 0.25))
        assert mean.point == pytest.approx(everything.mean())
        assert gap.point == pytest.approx(100 - np.minimum(everything, 100).mean())
        for _, low, high in (iqm, mean, gap):
            assert low is not None and high is not None and low < high
        # Welch's interval of two datasets, here as that of a difference.
        welch = scipy.stats.ttest_ind(scores[0], [-x for x in scores[1]], equal_var=False)
        low, high = welch.confidence_interval(0.95)
        assert [mean.low, mean.high] == pytest.approx([low / 2, high / 2])


def test_differences_and_their_verdicts(tmp_path: Path, make_run: MakeRun) -> None:
    tuned = {"reference_cpu_seconds": 3.0}
    scores = {
        ("a", "sft-q"): [40.0, 50.0, 63.0],
        ("a", "iw-sft-q"): [45.0, 55.5, 69.0],
        ("a", "bc"): [41.0, 51.0, 66.0],
        ("b", "sft-q"): [40.0, 50.0, 63.0],
        ("b", "iw-sft-q"): [39.0, 53.0, 60.0],
        ("b", "bc"): [1.0, 2.0, 1.5],
    }
    for (dataset, algo), values in scores.items():
        for seed, score in enumerate(values):
            about = {} if algo == "bc" else tuned
            make_run(tmp_path, dataset, algo, seed, score, **about)
    for seed in range(3):
        make_run(tmp_path, "a", "iql", seed, 90.0 + seed, published_steps=1000)
    group = cells(read_runs(tmp_path, CONTROL))
    grid = difference_grid(group, aggregate(group))
    rows = {(row[0], row[1]): row[2:] for row in grid.rows}
    assert [name for name, _ in rows] == [*"aaabbb", *["all 2 datasets"] * 3]
    x, y = scores["a", "iw-sft-q"], scores["a", "sft-q"]
    low, high = scipy.stats.ttest_rel(x, y).confidence_interval(0.95)
    # The same seeds and references.
    assert rows["a", "iw-SFT(Q)"][:2] == [f"+5.5 ({low:.1f} to {high:.1f}) [1]", "higher"]
    assert rows["a", "SFT(Q)"][:2] == ["-", "-"] and rows["a", "SFT(Q)"][3] == "lower"
    # BC has no reference.
    welch = scipy.stats.ttest_ind(scores["a", "bc"], y, equal_var=False)
    low, high = welch.confidence_interval(0.95)
    assert rows["a", "BC"][0] == f"+1.7 ({low:.1f} to {high:.1f})"
    assert rows["a", "BC"][1].startswith("open: ") and rows["b", "BC"][1] == "lower"
    # (5.5 - 0.33) / 2
    assert rows["all 2 datasets", "iw-SFT(Q)"][0].startswith("+2.6 (")


def test_under_trained_runs_do_not_enter(runs: Path, make_run: MakeRun) -> None:
    for seed in range(3):
        for dataset, published in (("hopper-a", 200), ("cheetah-b", 201)):
            make_run(runs, dataset, "iql", seed, 90.0 + seed, published_steps=published)
    aggregates = aggregate(cells(read_runs(runs, CONTROL)))
    assert aggregates.datasets == ["cheetah-b", "hopper-a"]
    assert aggregates.left_out == {"iql": f"{UNDER_TRAINED} on cheetah-b"}
    assert "iql" not in aggregates.estimates


def test_left_out_with_the_reason(runs: Path, make_run: MakeRun) -> None:
    make_run(runs, "hopper-a", "bc", 0, 1.0)
    for dataset in ("hopper-a", "cheetah-b"):
        for seed in range(2):
            make_run(runs, dataset, "sft", seed, 1.0)
    aggregates = aggregate(cells(read_runs(runs, CONTROL)))
    assert aggregates.left_out == {
        "bc": "no runs on cheetah-b; fewer than 3 seeds on hopper-a",
        "sft": "fewer than 3 seeds on cheetah-b, hopper-a",
    }
    assert set(aggregates.estimates) == {"sft-q", "iw-sft-q"}


def test_equal_seeds_give_no_interval(tmp_path: Path, make_run: MakeRun) -> None:
    for seed in range(3):
        make_run(tmp_path, "a", "bc", seed, 7.0)
    aggregates = aggregate(cells(read_runs(tmp_path, CONTROL)))
    assert aggregates.estimates["bc"] == [(7.0, None, None)] * 2 + [(93.0, None, None)]
    assert aggregate_grid(aggregates).rows[0][2] == "7.0 (no spread)"


class TestBlock:
    """Which datasets and algorithms are compared."""

    @staticmethod
    def fill(make_run: MakeRun, root: Path, have: dict[str, str], seeds: int = 3) -> None:
        for algo, tasks in have.items():
            for task in tasks:
                for seed in range(seeds):
                    variant, _, name = algo.rpartition("/")
                    make_run(root / variant, task, name, seed, 10.0 * seed)

    def test_one_dataset_that_few_have_does_not_throw_the_others_out(
        self, tmp_path: Path, make_run: MakeRun
    ) -> None:
        have = {"bc": "abk", "iql": "ab", "sft-q": "abk", "iw-sft-q": "abk", "cql": "a"}
        self.fill(make_run, tmp_path, have)
        aggregates = aggregate(cells(read_runs(tmp_path, CONTROL)))
        # 3 algorithms x 3 datasets beat 4 x 2 and 5 x 1.
        assert aggregates.datasets == ["a", "b", "k"]
        assert aggregates.left_out == {"iql": "no runs on k", "cql": "no runs on b, k"}
        self.fill(make_run, tmp_path, {"awac": "ab", "dt": "ab"})
        aggregates = aggregate(cells(read_runs(tmp_path, CONTROL)))
        assert aggregates.datasets == ["a", "b"] and aggregates.datasets_left_out == ["k"]
        assert list(aggregates.left_out) == ["cql"]

    def test_the_paper_s_algorithm_takes_part_where_it_can(
        self, tmp_path: Path, make_run: MakeRun
    ) -> None:
        self.fill(make_run, tmp_path, {"bc": "abc", "iql": "abc", "sft": "abc", "iw-sft-q": "a"})
        aggregates = aggregate(cells(read_runs(tmp_path, CONTROL)))
        assert aggregates.datasets == ["a"] and "iw-sft-q" in aggregates.estimates

    def test_variants_do_not_decide(self, tmp_path: Path, make_run: MakeRun) -> None:
        variants = {f"k{k}/iw-sft-q": "a" for k in range(9)}
        self.fill(make_run, tmp_path, {"bc": "ab", "iw-sft-q": "ab", "k99/iw-sft-q": "ab"})
        self.fill(make_run, tmp_path, variants)
        aggregates = aggregate(cells(read_runs(tmp_path, CONTROL)))
        assert aggregates.datasets == ["a", "b"]
        assert set(aggregates.estimates) == {"bc", "iw-sft-q", "k99/iw-sft-q"}
        assert set(aggregates.left_out) == set(variants)

    def test_seeds_beyond_the_fewest_do_not_enter(self, tmp_path: Path, make_run: MakeRun) -> None:
        self.fill(make_run, tmp_path, {"bc": "a"}, seeds=3)
        self.fill(make_run, tmp_path, {"bc": "b"}, seeds=5)
        aggregates = aggregate(cells(read_runs(tmp_path, CONTROL)))
        assert aggregate_grid(aggregates).rows[0][1] == "3"
        assert aggregates.estimates["bc"][1].point == pytest.approx(10.0)


@pytest.mark.parametrize("score, updates", [(None, 100), (50.0, 1)])
def test_three_seeds_without_a_rank_are_told_what_it_takes(
    tmp_path: Path, make_run: MakeRun, score: float | None, updates: int
) -> None:
    """A dataset of one's own has returns and no scores; a quick try has few updates."""
    for seed in range(3):
        make_run(tmp_path, "mine", "sft-q", seed, score, steps=updates, published_steps=100)
    write_report(tmp_path, tmp_path / "report")
    (best,) = re.findall(r"^\*\*Best.*$", (tmp_path / "report/report.md").read_text(), re.MULTILINE)
    assert "D4RL-normalised scores of 3 seeds or more" in best
    assert "half of the published updates or more" in best
