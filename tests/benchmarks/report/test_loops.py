"""Loops over seeds: means and paired differences against scipy."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from benchmarks.report.loops import RecordedLoop, read_loops, seed_grids
from benchmarks.results import ResultsError


def numbers(cell: str) -> list[float]:
    return [float(part) for part in re.findall(r"[+-]?\d+\.\d+", cell)]


def test_means_and_paired_differences_over_seeds() -> None:
    scores = np.random.default_rng(0).normal(0.5, 0.1, (2, 4, 2))
    # Round 2 is missing in the second loop of one seed, and a fact in the rounds 0.
    loops = [
        RecordedLoop(
            f"{name}/seed-{seed}",
            {},
            [
                {"round": n, "score": score, **({"distinct": 2 * score} if n else {})}
                for n, score in enumerate(values[: 1 if (name, seed) == ("b", 3) else 2])
            ],
        )
        for name, own in zip("ab", scores, strict=True)
        for seed, values in enumerate(own)
    ]
    grids = seed_grids([*loops, RecordedLoop("alone", {}, loops[0].rows)])
    assert [*grids] == ["Held-out score over seeds", "Distinct answers to a prompt over seeds"]
    grid = grids["Held-out score over seeds"]
    assert [row[0] for row in grid.rows] == ["a (4 seeds)", "b (4 seeds)", "b less a"]
    a, b = scores[..., 1]
    interval = stats.t.interval(0.95, 2, b[:3].mean(), stats.sem(b[:3]))
    # A mean over the seeds that went on does not compare with the one before.
    assert [[cell.endswith("[1]") for cell in row[1:]] for row in grid.rows] == [
        *([False, False], [False, True], [False, True]),
    ]
    assert grid.notes == ["Of 3 of the 4 seeds: the other loops have no such round or fact."]
    assert numbers(grid.rows[1][2]) == pytest.approx([b[:3].mean(), *interval], abs=6e-4)
    paired = stats.ttest_rel(b[:3], a[:3]).confidence_interval()
    expected = [(b[:3] - a[:3]).mean(), *paired]
    assert numbers(grid.rows[2][2]) == pytest.approx(expected, abs=6e-4)
    assert grids["Distinct answers to a prompt over seeds"].rows[0][1] == "-"
    assert seed_grids(loops[:2]) == {}


def test_loops_of_other_settings_or_tests_are_not_mixed() -> None:
    def loop(name: str, seed: int, **settings: object) -> RecordedLoop:
        rows = [{"round": 0, "score": 0.1 * seed}]
        return RecordedLoop(name, {"seed": seed, "settings": {"seed": seed, **settings}}, rows)

    loops = [
        *(loop(f"a/seed-{n}", n, steps=500, start=n, env_id="Hopper-v4") for n in range(3)),
        loop("a/seed-3", 3, steps=50, env_id="Hopper-v4"),
        # Run with the seed of another folder.
        loop("a/seed-4", 2, steps=500, env_id="Hopper-v4"),
        *(loop(f"b/seed-{n}", n, steps=500, env_id="Ant-v4") for n in range(3)),
        *(loop(f"c/seed-{n}", n, steps=50, env_id="Hopper-v4") for n in range(3)),
    ]
    grid = seed_grids(loops)["Held-out score over seeds"]
    assert [row[0] for row in grid.rows] == [
        *("a (3 seeds) [1][2]", "b (3 seeds)", "c (3 seeds)"),
        "c less a",
    ]
    assert grid.notes == [
        "a/seed-3 is left out: its settings differ (steps).",
        "a/seed-4 is left out: seed 2 is there already.",
    ]
    assert numbers(grid.rows[0][1])[0] == pytest.approx(0.1)


def test_loops_that_other_versions_tested_have_a_note() -> None:
    rows = [{"round": 0, "score": 0.1}]
    loops = [
        RecordedLoop(f"{name}/seed-{seed}", {"seed": seed, "versions": {"mujoco": version}}, rows)
        for name, version in (("a", "2.3.7"), ("b", "3.11.0"))
        for seed in range(3)
    ]
    grid = seed_grids(loops)["Held-out score over seeds"]
    assert grid.notes == ["Not all runs were tested in one version: mujoco 2.3.7 and 3.11.0."]
    assert [row[0] for row in grid.rows[:2]] == ["a (3 seeds) [1]", "b (3 seeds) [1]"]
    assert seed_grids(loops[:3])["Held-out score over seeds"].notes == []


@pytest.mark.parametrize(
    ("change", "alike"),
    [
        ({"algo": "sft"}, True),
        ({"eval_prompts": "other"}, False),
        ({"max_tokens": 64}, False),
        ({"min_score": 0.5}, False),
        # A test of one answer takes the likeliest.
        ({"sampling_temperature": 0.5, "top_p": 0.9}, True),
        ({"sampling_temperature": 0.5, "eval_samples": 4}, False),
    ],
)
def test_scores_of_another_test_are_not_subtracted(change: dict[str, object], alike: bool) -> None:
    usual = {"max_tokens": 512, "min_score": 1.0, "sampling_temperature": 1.0, "top_p": 1.0}
    usual |= {"eval_prompts": "digest", "eval_samples": change.get("eval_samples", 1)}
    rows = [{"round": 0, "score": 0.1}]
    loops = [
        RecordedLoop(f"{name}/seed-{seed}", {"seed": seed, "settings": settings}, rows)
        for name, settings in (("a", usual), ("b", usual | change))
        for seed in range(3)
    ]
    grid = seed_grids(loops)["Held-out score over seeds"]
    assert ("b less a" in [row[0] for row in grid.rows]) == alike


def test_a_damaged_config_of_a_loop_is_named(tmp_path: Path) -> None:
    (tmp_path / "mine" / "round-0").mkdir(parents=True)
    (tmp_path / "mine" / "config.json").write_text("{")
    with pytest.raises(ResultsError, match=r"mine/config\.json is not JSON"):
        read_loops(tmp_path)
