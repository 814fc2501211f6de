"""The tables of the pages are those of their records."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks.report.language import RecipeRuns, read_recipes
from benchmarks.report.scores import Cell
from benchmarks.results import CONTROL, RecordedRun, read_runs
from scripts.control_tables import (
    DIFFERENCES,
    DRAWN,
    FORMS,
    WEIGHTINGS,
    difference_grid,
    draw_grid,
    error_grid,
    factor_grid,
    form_grid,
    gain_grid,
    policy_grid,
    row_grid,
)
from scripts.method_tables import base_grid, gsm8k_grid
from scripts.tables import PAGES, RESULTS, with_tables


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_has_the_tables_of_its_records(path: Path) -> None:
    page = path.read_text()
    assert with_tables(page, RESULTS) == page


def test_every_record_is_named_on_a_page() -> None:
    text = "".join(page.read_text() for page in PAGES)
    assert not [record.name for record in RESULTS.glob("*.json") if record.name not in text]


def test_differences_of_control_are_those_of_paired_seeds() -> None:
    records = json.loads((RESULTS / "runs.json").read_text())

    def scores(algo: str) -> list[float]:
        own = [
            run
            for run in records
            if run["dataset"] == "hopper-replay"
            and "/".join(filter(None, (run.get("variant"), run["algo"]))) == algo
        ]
        return [run["normalized_score"] for run in sorted(own, key=lambda run: run["seed"])]

    grid = difference_grid(read_runs(RESULTS / "runs.json", CONTROL))
    (row,) = (row for row in grid.rows if row[0] == "hopper-replay")
    for text, (first, second) in zip(row[1:], DIFFERENCES.values(), strict=True):
        interval = stats.ttest_rel(scores(first), scores(second)).confidence_interval()
        assert _ends(text) == pytest.approx((interval.low, interval.high), abs=0.051)


def test_the_interval_over_draws_is_that_of_their_mean_differences() -> None:
    path = RESULTS / "hopper_medium_expert_draws.json"
    means: dict[tuple[str, str], list[float]] = {}
    for run in json.loads(path.read_text()):
        if not run.get("variant"):
            means.setdefault((run["dataset"], run["algo"]), []).append(run["normalized_score"])
    names = sorted({dataset for dataset, _ in means})
    *rows, last = draw_grid(read_runs(path, CONTROL)).rows
    assert [row[0] for row in rows] == names and len(names) > 1
    for text, (ours, other) in zip(last[2::2], DRAWN.items(), strict=True):
        gains = [
            sum(means[name, ours]) / len(means[name, ours])
            - sum(means[name, other]) / len(means[name, other])
            for name in names
        ]
        interval = stats.ttest_1samp(gains, 0).confidence_interval()
        assert _ends(text) == pytest.approx((interval.low, interval.high), abs=0.051)


def test_gains_are_against_the_same_schedule_and_averaged_by_kind() -> None:
    names = ("hopper_medium_expert_draws", "walker2d_replay_forms", "halfcheetah_replay_forms")
    files = [f"{name}.json" for name in names]
    gains: dict[str, list[float]] = {}
    for file in files:
        means: dict[tuple[str, str], list[float]] = {}
        for run in json.loads((RESULTS / file).read_text()):
            name = "/".join(filter(None, (run.get("variant"), run["algo"])))
            means.setdefault((run["dataset"], name), []).append(run["normalized_score"])
        for dataset in sorted({dataset for dataset, _ in means}):
            equal = "k0/iw-sft-q" if "walker2d" in file else "sft-q"
            pair = (np.mean(means[dataset, name]) for name in ("iw-sft-q", equal))
            gains.setdefault(file, []).append(float(np.subtract(*pair)))
    kinds = [np.mean(values) for values in gains.values()]
    records = [(file, read_runs(RESULTS / file, CONTROL)) for file in files]
    *rows, last = gain_grid(records).rows
    assert len(rows) == sum(map(len, gains.values())) and last[0] == "mean over kinds"
    assert float(last[2].split()[0]) == pytest.approx(np.mean(kinds), abs=0.051)
    # SFT made more updates than iw-SFT here.
    (walker,) = [row for row in rows if row[0] == "walker2d-replay"]
    texts = {row[0]: row[2] for row in form_grid(records[1][1]).rows}
    assert walker[5] == texts[FORMS["iw-sft"]]
    others = [run for run in records[1][1] if run.algo != "k0/iw-sft"]
    assert gain_grid([("", others)]).rows[0][5] == "-"


def test_forms_are_compared_with_equal_weights_of_their_curated_set() -> None:
    path = RESULTS / "walker2d_replay_forms.json"
    scores: dict[str, dict[int, float]] = {}
    for run in json.loads(path.read_text()):
        name = "/".join(filter(None, (run.get("variant"), run["algo"])))
        scores.setdefault(name, {})[run["seed"]] = run["normalized_score"]
    texts = {row[0]: row[2] for row in form_grid(read_runs(path, CONTROL)).rows}
    pairs = {"iw-sft-step": "k0/iw-sft", "iw-sft": "k0/iw-sft", "ess0.4/iw-sft-q": "k0/iw-sft-q"}
    for ours, equal in pairs.items():
        gains = [score - scores[equal][seed] for seed, score in scores[ours].items()]
        interval = stats.ttest_1samp(gains, 0).confidence_interval()
        assert _ends(texts[FORMS[ours]]) == pytest.approx((interval.low, interval.high), abs=0.051)
    assert texts[FORMS["k0/iw-sft"]] == texts[FORMS["k0/iw-sft-q"]] == "-"


def test_the_interval_over_base_models_is_that_of_their_mean_differences() -> None:
    path = RESULTS / "arithmetic_bases.json"
    scores: dict[tuple[str, str], list[float]] = {}
    for run in json.loads(path.read_text()):
        scores.setdefault((run["variant"], run["algo"]), []).append(run["score"])
    names = sorted({name for name, _ in scores})
    *rows, last = base_grid(read_recipes(path)).rows
    assert [row[0] for row in rows] == names and len(names) > 1
    for text, algo in zip(last[2:4], ("iw-sft", "iw-sft-hard"), strict=True):
        gains = [np.mean(scores[name, algo]) - np.mean(scores[name, "sft"]) for name in names]
        interval = stats.ttest_1samp(gains, 0).confidence_interval()
        assert _ends(text) == pytest.approx((interval.low, interval.high), abs=0.00051)


def test_what_weights_gain_with_a_mixture_is_compared_by_seed() -> None:
    path = RESULTS / "hopper_replay_mini.json"
    scores: dict[str, dict[int, float]] = {}
    for run in json.loads(path.read_text()):
        algo = "/".join(filter(None, (run.get("variant"), run["algo"])))
        scores.setdefault(algo, {})[run["seed"]] = run["normalized_score"]

    def of(algo: str) -> np.ndarray:
        return np.array([scores[algo][seed] for seed in sorted(scores[algo])])

    def gains(algo: str) -> list[np.ndarray]:
        return [
            of(f"{policy}{algo}") - of(f"{policy}{WEIGHTINGS[0]}") for policy in ("", "mixture-")
        ]

    *_, sharp, auto = policy_grid(read_runs(path, CONTROL)).rows
    for row, algo in zip((sharp, auto), WEIGHTINGS[1:], strict=True):
        one, mixture = gains(algo)
        for text, values in zip(row[1:], (one, mixture, mixture - one), strict=True):
            interval = stats.ttest_1samp(values, 0).confidence_interval()
            assert _ends(text) == pytest.approx((interval.low, interval.high), abs=0.051)


def test_the_walker2d_row_is_compared_by_seed() -> None:
    path = RESULTS / "walker2d_row.json"
    scores: dict[str, dict[int, float]] = {}
    for run in json.loads(path.read_text()):
        scores.setdefault(run["variant"], {})[run["seed"]] = run["normalized_score"]
    *_, clipped, _, unclipped = row_grid(read_runs(path, CONTROL)).rows
    for row, variants in ((clipped, ("authors", "k0")), (unclipped, ("whole", "whole-k0"))):
        ours, equal = (scores[variant] for variant in variants)
        gaps = [ours[seed] - equal[seed] for seed in sorted(ours.keys() & equal.keys())]
        interval = stats.ttest_1samp(gaps, 0).confidence_interval()
        assert _ends(row[4]) == pytest.approx((interval.low, interval.high), abs=0.051)


def test_actions_are_compared_with_those_of_equal_weights_by_seed() -> None:
    records = json.loads((RESULTS / "imitation_error.json").read_text())
    known = {
        (record["dataset"], record["algo"]): dict(
            zip(record["seeds"], record["error"], strict=True)
        )
        for record in records
    }
    for row, record in zip(error_grid(records).rows, records, strict=True):
        ours, equal = (known[record["dataset"], algo] for algo in (record["algo"], "k0/iw-sft-q"))
        gaps = [ours[seed] - equal[seed] for seed in ours if seed in equal]
        if record["algo"] == "k0/iw-sft-q":
            assert row[4] == "-"
            continue
        interval = stats.ttest_1samp(gaps, 0).confidence_interval()
        assert _ends(row[4]) == pytest.approx((interval.low, interval.high), abs=0.00051)


def test_a_factor_is_compared_with_the_weights_by_seed() -> None:
    records = json.loads((RESULTS / "imitation_error.json").read_text())
    scores = {
        record["dataset"]: dict(zip(record["seeds"], record["score"], strict=True))
        for record in records
        if record["algo"] == "iw-sft-q"
    }
    rows = iter(factor_grid(records).rows)
    for record in records:
        for factor, scaled in record["scaled"].items():
            row, weighted = next(rows), scores[record["dataset"]]
            assert row[2] == factor
            pairs = zip(record["seeds"], scaled, strict=True)
            gaps = [score - weighted[seed] for seed, score in pairs if seed in weighted]
            interval = stats.ttest_1samp(gaps, 0).confidence_interval()
            assert _ends(row[6]) == pytest.approx((interval.low, interval.high), abs=0.051)
    assert not [*rows]


def _ends(text: str) -> tuple[float, float]:
    """The ends of the interval that a cell shows."""
    low, high = text.partition("(")[2].rstrip(")").split(" to ")
    return float(low), float(high)


def _cell(algo: str, wins: list[float]) -> Cell:
    result = {
        "score": sum(wins) / len(wins),
        "interval": [0.0, 1.0],
        "steps": 0 if algo == "base" else 3,
        "margin": 0.5,
        "right_log_prob": -1.0,
        "of_prompts": {"score": wins, "margin": [2 * win for win in wins]},
        "cpu_seconds": {"base": 2.0, "sft": 6.0}.get(algo, 10.0),
        "evaluation_cpu_seconds": 2.0,
    }
    return Cell(
        "gsm8k", algo, (RecordedRun(Path(), "", "gsm8k", algo, 0, result, {}, []),), "score"
    )


def test_models_are_compared_on_the_same_questions() -> None:
    cells = [
        _cell("base", [0, 1, 0, 1]),
        _cell("sft", [0, 1, 0.5, 1]),
        _cell("dft", [1, 1, 0.5, 1]),
    ]
    base, sft, dft = gsm8k_grid(RecipeRuns("gsm8k", cells, [])).rows
    assert base[2] == base[4] == sft[5] == "-"
    # A mean difference of 1/8 with a deviation of 1/4: t of 3 degrees of freedom is 3.1824.
    half = pytest.approx(3.1824 * 0.25 / 2, abs=1e-3)
    low, high = _ends(sft[2])
    assert sft[2].startswith("+0.125") and (high - low) / 2 == half
    assert dft[5].startswith("+0.500")
    assert (sft[-1], dft[-1], base[-1]) == ("1.0", "2.0", "-")
