"""The tables of docs/methods.md are those of the records."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.report.language import RecipeRuns
from benchmarks.report.scores import Cell
from benchmarks.results import RecordedRun
from scripts.method_tables import DOCS, gsm8k_grid, with_tables


def test_the_page_has_the_tables_of_its_records() -> None:
    page = (DOCS / "methods.md").read_text()
    assert page.count(".json -->") >= 2
    assert with_tables(page, DOCS / "results") == page


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
    low, high = (float(end) for end in sft[2].partition("(")[2].rstrip(")").split(" to "))
    assert sft[2].startswith("+0.125") and (high - low) / 2 == half
    assert dft[5].startswith("+0.500")
    assert (sft[-1], dft[-1], base[-1]) == ("1.0", "2.0", "-")
