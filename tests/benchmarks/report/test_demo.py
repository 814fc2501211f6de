"""The demo: its commands are valid, and what it says follows from the scores."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.bandit.experiment import main as run_bandit
from benchmarks.bandit.options import Options as BanditOptions
from benchmarks.d4rl.options import Options as ControlOptions
from benchmarks.d4rl.options import check_options, choose_suite, find_algorithm
from benchmarks.d4rl.settings import find_fine_tuning
from benchmarks.demo import PARTS
from benchmarks.llm.options import parse as parse_llm
from benchmarks.options import parse
from benchmarks.report.document import Document, to_html
from iwsft.datasets import DEFAULT
from tests.benchmarks.report.conftest import MakeRun
from tests.benchmarks.report.test_report_language import language_run

BANDIT, ARITHMETIC, CONTROL = PARTS
COMPARED = ("sft-q", "iw-sft-q")


def test_its_commands_are_valid(tmp_path: Path) -> None:
    words = {part.command[0]: [w.format(out=tmp_path) for w in part.command[1:]] for part in PARTS}
    assert parse(BanditOptions, "bandit", None, words["bandit"]).out.parent == tmp_path
    assert parse_llm(words["llm"]).seeds == (0, 1, 2)
    options = parse(ControlOptions, "d4rl", None, words["d4rl"])
    check_options(options, choose_suite(options))
    # Behaviour cloning and the reference are then one training.
    assert options.steps == options.reference_steps
    tuned = [find_fine_tuning(options.settings_of, find_algorithm(a))[0] for a in COMPARED]
    # What differs is the weights alone.
    assert len({replace(row, k=1.0) for row in tuned}) == 1


@pytest.mark.parametrize(
    ("gains", "verdict"),
    [
        # 2 -+ 4.303 * 1 / sqrt(3): Student's quantile of two degrees of freedom is 4.303.
        ((1, 2, 3), "iw-SFT(Q) (32.0) ties with SFT(Q) (30.0): the difference is 2.0"),
        ((9, 10, 11), "iw-SFT(Q) (40.0) is above SFT(Q) (30.0): the difference is 10.0"),
        ((-9, -10, -11), "iw-SFT(Q) (20.0) is below SFT(Q) (30.0): the difference is -10.0"),
    ],
)
def test_it_says_whether_control_ties(
    make_run: MakeRun, tmp_path: Path, gains: tuple[float, ...], verdict: str
) -> None:
    for seed, gain in enumerate(gains):
        for algo, score in (("sft-q", 20.0 + 10 * seed), ("iw-sft-q", 20.0 + 10 * seed + gain)):
            make_run(tmp_path, DEFAULT, algo, seed, score, reference_cpu_seconds=3.0)
        for algo in COMPARED:  # Others in the folder: of more seeds, and of more data.
            other = {"settings": {"lr": 1e-3, "seed": 5 + seed}}
            make_run(tmp_path, DEFAULT, algo, 5 + seed, 90.0 + seed, config=other)
            make_run(tmp_path, "walker-b", algo, seed, 70.0 + seed)
    document = Document()
    document.section(CONTROL.title)
    line = CONTROL.show(document, tmp_path)
    assert line.startswith(verdict)
    low, high = sum(gains) / 3 - 2.484, sum(gains) / 3 + 2.484
    assert line.endswith(f" ({low:.1f} to {high:.1f}), with its 95 % interval over 3 seeds.")


def test_arithmetic_is_shown_without_other_runs_of_the_folder(tmp_path: Path) -> None:
    for seed, score in enumerate((0.5, 0.6, 0.7)):
        language_run(tmp_path, "sft", seed, score, "arithmetic")
        language_run(tmp_path, "iw-sft", seed, score + 0.2, "arithmetic")
        language_run(tmp_path, "sft", seed, 0.1, "chat")
        language_run(tmp_path, "iw-sft", 5 + seed, 0.1, "arithmetic")
    document = Document()
    document.section(ARITHMETIC.title)
    line = ARITHMETIC.show(document, tmp_path)
    assert line.startswith("iw-SFT (0.800) is above SFT (0.600): the difference is 0.200")


def test_the_page_shows_the_bandit(tmp_path: Path) -> None:
    run_bandit(BanditOptions(seeds=2, pulls=200, steps=50, out=tmp_path / "bandit"))
    document = Document()
    document.section("Summary")
    document.section(BANDIT.title)
    line = BANDIT.show(document, tmp_path)
    # As the successes do: about two in three.
    share = float(re.findall(r"better arm in (\d+)%", line)[0])
    assert 55 < share < 75 and "iw-SFT in 9" in line
    page = to_html(document.markdown("Demo"), document.images)
    assert BANDIT.title in page and "data:image/svg+xml;base64" in page
