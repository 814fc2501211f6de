"""Tables of scores and cost, against means and deviations by hand."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import scipy.stats
from rich.console import Console

from benchmarks.report.aggregates import aggregate
from benchmarks.report.figures import draw_scores
from benchmarks.report.page import write_report
from benchmarks.report.scores import cells, dataset_label
from benchmarks.report.tables import matrix_grid, score_grid, score_table
from benchmarks.results import CONTROL, read_runs

if TYPE_CHECKING:
    from tests.benchmarks.report.conftest import CellOf, MakeRun


SHORT = " Under-trained: left out of aggregates."
Scores = dict[tuple[str, str], list[float]]


def test_seeds_that_were_run_differently_are_named(tmp_path: Path, make_run: MakeRun) -> None:
    make_run(tmp_path, "hopper-a", "bc", 0, 1.0)
    make_run(tmp_path, "hopper-a", "bc", 1, 1.0, versions={"mujoco": "2.3.7"})
    # Entries that a run did not record do not count as different, but are named.
    make_run(tmp_path, "hopper-a", "bc", 2, 1.0, config={"settings": {"seed": 2}})
    # A run without a record of any is named once.
    folder = make_run(tmp_path, "hopper-a", "bc", 3, 1.0)
    (folder / "config.json").unlink()
    notes = score_grid(cells(read_runs(tmp_path, CONTROL))).notes
    assert [line.partition(" (")[0] for line in notes] == [
        "Seeds differ in their settings",
        "Seeds differ in versions.mujoco",
        "Seeds differ in lr",
        "Not all runs were tested in one version: mujoco 2.3.7 and 3.11.0.",
        "All seeds have the same value: no interval follows from it.",
    ]
    assert "Seeds differ in lr (0.0001, not recorded)." in notes
    assert "Seeds differ in their settings (config.json is missing: seed 3)." in notes


def test_fine_tuning_of_another_schedule_is_told_beside_the_score(
    tmp_path: Path, make_run: MakeRun
) -> None:
    for dataset, rate in (("hopper-a", 1e-4), ("hopper-b", 4e-5)):
        for algo, lr in (("sft-q", 4e-5), ("iw-sft-q", rate)):
            tuning = {"lr": lr, "warmup": 10, "steps": 100, "k": 1.0}
            config = {"settings": {"seed": 0, "algo": algo, "fine_tuning": tuning}}
            make_run(tmp_path, dataset, algo, 0, 50.0, config=config)
        make_run(tmp_path, dataset, "bc", 0, 40.0)
    group = cells(read_runs(tmp_path, CONTROL))
    for grid in (score_grid(group), matrix_grid(group)):
        rates = [re.findall(r"(?:rate|warm-up|updates) \S+,", note) for note in grid.notes]
        assert [*filter(None, rates)] == [["rate 4e-05,"], ["rate 0.0001,"]]


def test_algorithms_that_were_tested_in_other_versions_are_named(
    tmp_path: Path, make_run: MakeRun
) -> None:
    for seed in range(3):
        make_run(tmp_path, "hopper-a", "sft", seed, 50.0 + seed)
        make_run(tmp_path, "hopper-a", "bc", seed, 40.0 + seed, versions={"mujoco": "2.3.7"})
        make_run(tmp_path, "hopper-b", "bc", seed, 40.0 + seed)
    group = cells(read_runs(tmp_path, CONTROL))
    told = "Not all runs were tested in one version: mujoco 2.3.7 and 3.11.0."
    assert [(cell.dataset, cell.note) for cell in group] == [
        ("hopper-a", told),
        ("hopper-a", told),
        ("hopper-b", ""),
    ]
    assert told in score_grid(group).notes and told in matrix_grid(group).notes


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"steps": 7}, "steps 7/bc"),
        ({"episodes": 5}, "eval_episodes 5/bc"),
        ({"estimator": "trajectories"}, "estimator trajectories/bc"),
        ({"config": {"settings": {"lr": 0.5}}}, "lr 0.5/bc"),
        ({"config": {"settings": {"lr": None}}}, "lr null/bc"),
        ({"config": {"settings": {"lr": 1e-4, "net": {"wide": "a/b"}}}}, "bc"),
        # Recorded only where they are given.
        ({"config": {"settings": {"lr": 1e-4, "q": "auto"}}}, "q auto/bc"),
        ({"config": {"settings": {"lr": 1e-4, "policy": "mixture"}}}, "policy mixture/bc"),
        ({"config": {"settings": {"lr": 1e-4, "target_ess": 0.5}}}, "target_ess 0.5/bc"),
    ],
)
def test_runs_of_other_settings_are_not_averaged(
    tmp_path: Path, make_run: MakeRun, change: dict[str, Any], name: str
) -> None:
    for seed in (0, 1, 3):
        make_run(tmp_path, "hopper-a", "bc", seed, 10.0)
    make_run(tmp_path, "hopper-a", "bc", 2, 90.0, **change)
    plain, *others = cells(read_runs(tmp_path, CONTROL))
    if name == "bc":
        assert plain.seeds == [0, 1, 2, 3] and not others
        return
    assert (plain.algo, plain.mean, plain.note) == ("bc", 10.0, "")
    assert [(other.algo[: len(name)], other.mean) for other in others] == [(name, 90.0)]
    for table in (score_grid, matrix_grid):
        assert others[0].note in table([plain, *others]).notes and "(not " in others[0].note


def test_runs_that_differ_are_apart_where_most_recorded_nothing(
    tmp_path: Path, make_run: MakeRun
) -> None:
    kwargs: list[dict[str, int] | None] = [None, None, None, {"a": 1}, {"a": 1}, {"a": 2}]
    for seed, each in enumerate(kwargs):
        config = {} if each is None else {"env_kwargs": each}
        make_run(tmp_path, "hopper-a", "bc", seed, 10.0 * seed, config=config)
    found = {cell.dataset: cell.seeds for cell in cells(read_runs(tmp_path, CONTROL))}
    assert found == {"hopper-a": [0, 1, 2, 3, 4], 'hopper-a (env_kwargs {"a": 2})': [5]}


@pytest.mark.parametrize(
    ("change", "name", "mean"),
    [
        ({"normalized_score": None}, "hopper-a (score return_mean)", 1002.0),
        ({"env_id": "Hopper-v5"}, "hopper-a (env_id Hopper-v5)", 90.0),
        ({"config": {"settings": {"data": "f" * 64}}}, "hopper-a (data ffffffff)", 90.0),
        ({"config": {"env_kwargs": {"a": 1}}}, 'hopper-a (env_kwargs {"a": 1})', 90.0),
    ],
)
def test_runs_of_other_data_or_units_are_another_dataset(
    tmp_path: Path, make_run: MakeRun, change: dict[str, Any], name: str, mean: float
) -> None:
    data = {"settings": {"data": "0" * 64}, "env_kwargs": {}}
    for seed in range(3):
        make_run(tmp_path, "hopper-a", "bc", seed, 10.0 + seed, config=data)
        make_run(tmp_path, "hopper-a", "sft", seed, 20.0, config=data)
    folder = make_run(tmp_path, "hopper-a", "iql", 2, 90.0, **change)
    if "normalized_score" in change:
        # Also where the entry is missing.
        result = json.loads((folder / "result.json").read_text())
        del result["normalized_score"]
        (folder / "result.json").write_text(json.dumps(result))
    found = {(cell.dataset, cell.algo): cell.mean for cell in cells(read_runs(tmp_path, CONTROL))}
    expected = {("hopper-a", "bc"): 11.0, ("hopper-a", "sft"): 20.0, (name, "iql"): mean}
    assert found == expected


@pytest.mark.parametrize("score", [None, 1.0])
def test_titles_name_the_unit_of_the_scores(
    tmp_path: Path, make_run: MakeRun, score: float | None
) -> None:
    make_run(tmp_path, "mine", "bc", 0, None)
    make_run(tmp_path, "hopper-a", "bc", 0, score)
    title = score_table(read_runs(tmp_path, CONTROL)).renderables[0]
    page = write_report(tmp_path, tmp_path / "report").page.with_name("report.md").read_text()
    for text in (str(title), page):
        assert ("cores, D4RL-normalised unless marked" in text) == (score is not None)
        assert ("cores, mean returns" in text) == (score is None)


def test_table_numbers(runs: Path, scores_of_runs: Scores) -> None:
    group = cells(read_runs(runs, CONTROL))
    grid, labels = score_grid(group), {"sft-q": "SFT(Q)", "iw-sft-q": "iw-SFT(Q)"}
    rows = {(row[0], row[1]): row[2:] for row in grid.rows}
    assert list(rows) == [
        (dataset, label) for dataset in ("cheetah-b", "hopper-a") for label in labels.values()
    ]
    # Neither shares of success nor published numbers where there are none.
    heading = grid.markdown().partition("\n")[0]
    assert heading.endswith("| 95 % interval | CPU seconds, with reference |")
    for (dataset, algo), scores in scores_of_runs.items():
        mean, deviation = statistics.mean(scores), statistics.stdev(scores)
        low, high = scipy.stats.t.interval(0.95, 2, mean, scipy.stats.sem(scores))
        numbers = [f"{mean:.1f}", f"{deviation:.1f}", f"{low:.1f} to {high:.1f}"]
        assert rows[dataset, labels[algo]] == ["3", "20", *numbers, "-", "-", "5"]


@pytest.mark.parametrize(
    ("others", "marked"),
    [
        ([10.0, 12.0, 11.0], "21.0"),
        ([10.0, 12.0, 30.0], "21.0 [1]"),
        ([20.0, 22.0, 21.0], "21.0 [1]"),  # the first of two equal means
        ([10.0, 12.0], "21.0 [1]"),  # too few for a test
        ([10.0], "21.0 [1]"),
    ],
)
def test_the_highest_of_a_dataset_is_marked_and_so_is_a_tie(
    tmp_path: Path, make_run: MakeRun, others: list[float], marked: str
) -> None:
    for algo, values in (("sft", [20.0, 21.0, 22.0]), ("iw-sft", others)):
        for seed, score in enumerate(values):
            make_run(tmp_path, "hopper-a", algo, seed, score)
            # Higher, but under-trained.
            make_run(tmp_path / "short", "hopper-a", algo, seed, 90.0, published_steps=1000)
    grid = matrix_grid(cells(read_runs(tmp_path, CONTROL)))
    p = scipy.stats.ttest_ind([20.0, 21.0, 22.0], others, equal_var=False).pvalue
    assert len(others) < 3 or (p < 0.05) == (marked == "21.0")
    assert [grid.rows[i][j] for i, j in grid.bold] == [marked]
    (note,) = [note for note in grid.notes if note.startswith("The highest")] or [""]
    assert ("tie" in note) == (len(others) == 3 and p >= 0.05)
    assert ("fewer than 3 seeds have no interval" in note) == (len(others) < 3)


def test_the_return_is_the_score_where_there_is_no_reference_score(
    tmp_path: Path, make_run: MakeRun
) -> None:
    for seed in range(3):
        make_run(tmp_path, "own-data", "bc", seed, None)
    grid = score_grid(cells(read_runs(tmp_path, CONTROL)))
    assert grid.rows[0][4] == "1001.0 [1]"
    assert "return" in grid.notes[0]
    aggregates = aggregate(cells(read_runs(tmp_path, CONTROL)))
    assert aggregates.estimates == {}


def test_a_terminal_of_80_columns_says_where_the_published_numbers_are(
    tmp_path: Path, make_run: MakeRun
) -> None:
    for seed in range(3):
        make_run(tmp_path, "hopper-medium-replay-v2", "iw-sft-q", seed, 80.0 + seed)
        make_run(tmp_path, "kitchen-partial-v0", "bc", seed, 81.0, success_rate=0.5)
        make_run(tmp_path, "hopper-a", "td3-bc", seed, 81.0, published_steps=10**6)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(score_table(read_runs(tmp_path, CONTROL)))
    text = capture.get()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert all(words in text for words in ("81.0", "0.50", "published numbers in the report"))
    assert "85.0 ± 4.1" not in text and "83.0" not in text


def test_a_long_name_leaves_the_numbers_whole(tmp_path: Path, make_run: MakeRun) -> None:
    """The name is folded: in a terminal, and in a figure, whose axes would have no room."""
    variant = tmp_path / "a-sweep-over-learning-rates" / ("temperature-" * 8)
    for seed in range(3):
        make_run(variant, "hopper-a", "sft-q", seed, 50.0 + 13 * seed)
    console = Console(width=80)
    with console.capture() as capture:
        console.print(score_table(read_runs(tmp_path, CONTROL)))
    text = capture.get()
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert re.search(r" 3 +20 +63.0 13.0 30.7 to 95.3", text)
    (figure,) = draw_scores(cells(read_runs(tmp_path, CONTROL))).values()
    figure.draw_without_rendering()
    assert figure.axes[0].get_window_extent().width > figure.dpi


@pytest.mark.parametrize(("seeds", "printed"), [(1, False), (2, False), (3, True)])
def test_statistics_need_three_seeds(
    tmp_path: Path, seeds: int, printed: bool, make_run: MakeRun, cell_of: CellOf
) -> None:
    for seed in range(seeds):
        make_run(tmp_path, "hopper-a", "sft", seed, 10.0 * seed)
    cell = cell_of(tmp_path, "hopper-a", "sft")
    assert (cell.std is not None) == (cell.interval is not None) == printed
    grid = score_grid([cell])
    row = grid.rows[0]
    assert row[4].startswith(f"{5.0 * (seeds - 1):.1f}")
    assert (row[5:7] == ["- [1]", "-"]) == (not printed)
    # And it says why.
    assert any("Fewer than 3 seeds" in note for note in grid.notes) == (not printed)


def test_success_rate_where_results_have_it(tmp_path: Path, make_run: MakeRun) -> None:
    rates = [0.25, 0.5, 1.0]
    for seed, rate in enumerate(rates):
        make_run(tmp_path, "door", "iql", seed, 1.0, success_rate=rate)
        make_run(tmp_path, "door", "bc", seed, 1.0, **({"success_rate": 0.5} if seed else {}))
        make_run(tmp_path, "door", "dt", seed, rate, success_rate=0.0)
        make_run(tmp_path, "hopper-a", "bc", seed, 1.0)
    grid = score_grid(cells(read_runs(tmp_path, CONTROL)))
    assert grid.columns[7:-1] == ["success", "interval of success"]
    bc, iql, dt, none = (row[7:-1] for row in grid.rows)
    # Student's interval is -0.36 to 1.53; a share lies in [0, 1].
    assert iql == ["0.58", "0.00 to 1.00"]
    assert bc == ["0.50 [2]", "-"] and "2 of the 3 seeds" in grid.notes[1]
    assert dt == ["0.00", "- [1]"] and "same value" in grid.notes[0]
    assert none == ["-", "-"]


@pytest.mark.parametrize(
    ("steps", "published", "words"),
    [
        (
            20_000,
            1_000_000,
            f"20,000 of the 1,000,000 updates of the published settings.{SHORT}",
        ),
        (
            1_500,
            250_000,
            f"1,500 of the 250,000 updates of the published settings.{SHORT}",
        ),
        (1_234, 2_000, "1,234 of the 2,000 updates of the published settings."),
        (1_000_000, 1_000_000, None),
        (20_000, None, None),
    ],
)
def test_fewer_updates_than_published_are_noted(
    tmp_path: Path, make_run: MakeRun, steps: int, published: int | None, words: str | None
) -> None:
    more = {} if published is None else {"published_steps": published}
    for seed in range(3):
        make_run(tmp_path, "hopper-a", "iql", seed, seed, steps=steps, **more)
    group = cells(read_runs(tmp_path, CONTROL))
    notes = [] if words is None else [words]
    mark = "" if words is None else " [1]"
    scores = score_grid(group)
    assert scores.notes == notes and scores.rows[0][4] == f"1.0{mark}"


@pytest.mark.parametrize(
    ("algo", "published"),
    # RWR is a method for language models, and the example of a control algorithm of one's own.
    [("bc-5", True), ("iql", True), ("mine", False), ("rwr", False)],
)
def test_no_number_of_updates_is_published_for_an_algorithm_of_one_s_own(
    tmp_path: Path, make_run: MakeRun, algo: str, published: bool
) -> None:
    more: dict[str, Any] = {"steps": 300, "published_steps": 10_000}
    if algo != "bc-5":
        more["config"] = {"settings": {"algo": algo, "baseline": {"steps": 300}}}
    for seed in range(3):
        make_run(tmp_path, "hopper-a", algo, seed, seed, **more)
    (cell,) = group = cells(read_runs(tmp_path, CONTROL))
    notes = [
        "300 of the 10,000 updates of the published settings. Under-trained: left out of "
        "aggregates."
    ]
    assert score_grid(group).notes == notes * published
    assert cell.under_trained == published


def test_cpu_seconds_are_those_of_a_run_with_its_reference(
    tmp_path: Path, make_run: MakeRun
) -> None:
    for seed in range(3):
        make_run(tmp_path, "hopper-a", "sft", seed, 1.0, reference_cpu_seconds=30.0 + seed)
        make_run(tmp_path, "hopper-a", "iql", seed, 1.0)
    grid = score_grid(cells(read_runs(tmp_path, CONTROL)))
    assert grid.columns[-1] == "CPU seconds, with reference"
    assert [row[-1] for row in grid.rows] == ["5", "36"]


def test_the_order_is_the_paper_s(tmp_path: Path, make_run: MakeRun) -> None:
    order = ["bc", "bc-10", "awac", "td3-bc", "cql", "iql", "dt", "sft", "sft-q", "iw-sft"]
    order += ["iw-sft-q", "k3/iw-sft-q", "k10/iw-sft-q", "iw-sft-step", "mine"]
    for algo in sorted(order):
        variant, _, name = algo.rpartition("/")
        make_run(tmp_path / variant, "hopper-a", name, 0, 1.0)
    group = cells(read_runs(tmp_path, CONTROL))
    assert [cell.algo for cell in group] == order
    assert [row[1] for row in score_grid(group).rows] == [
        *("BC", "BC-10%", "AWAC", "TD3+BC", "CQL", "IQL", "DT", "SFT", "SFT(Q)", "iw-SFT"),
        *("iw-SFT(Q)", "k3/iw-SFT(Q)", "k10/iw-SFT(Q)", "iw-SFT-step", "mine"),
    ]


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("hopper-medium-replay-v2", "hopper-medium-replay-v2"),
        ("mine--to--yours", "mine -> yours"),
        ("a-v0--to--b-v0+c-v1", "a-v0 -> b-v0+c-v1"),
    ],
)
def test_names_of_tasks(name: str, label: str) -> None:
    assert dataset_label(name) == label


@pytest.mark.parametrize(
    ("ends", "words"),
    [
        ((0.5, 0.9, 1.0), None),
        ((0.02, 0.004, 0.5), "in 2 of 3 runs the ESS ends at 0.004 to 0.02"),
        ((0.02, 0.5, 0.5), "in 1 of 3 runs the ESS ends at 0.02"),
    ],
)
def test_weights_that_a_few_trajectories_have_are_noted(
    tmp_path: Path, make_run: MakeRun, ends: tuple[float, ...], words: str | None
) -> None:
    for seed, end in enumerate(ends):
        rows = [{"step": 1, "ESS": 0.01}, {"step": 100, "ESS": end}, {"step": 100, "score": 1.0}]
        make_run(tmp_path, "hopper-a", "iw-sft-q", seed, seed, rows=rows)
    notes = score_grid(cells(read_runs(tmp_path, CONTROL))).notes
    expected = [] if words is None else [f"A few trajectories decide: {words}."]
    assert notes == expected
