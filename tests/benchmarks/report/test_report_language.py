"""Language runs in the report: as the job leaves them, with control runs or alone."""

from __future__ import annotations

import itertools
import json
import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import scipy.stats

from benchmarks.llm.options import ALGORITHMS, NAMES, recorded
from benchmarks.llm.recipes.chat import RECIPE
from benchmarks.report.__main__ import main
from benchmarks.report.language import (
    difference_grid,
    evaluation_grid,
    read_recipes,
    recipe_grid,
    summary,
)
from benchmarks.report.options import Options
from benchmarks.report.page import write_report
from benchmarks.report.scores import algorithm_label, algorithm_rank
from benchmarks.results import ResultsError, read_evaluations

if TYPE_CHECKING:
    from tests.benchmarks.report.conftest import MakeRun

_count = itertools.count()
SCORES = {"base": [0.5], "sft": [0.61, 0.72, 0.74], "iw-sft": [0.8, 0.9]}


# A folder's name may hold anything; the names of figures hold no space.
LONGER = "plus long"


def language_run(root: Path, algo: str, seed: int, score: float, recipe: str = "sums") -> Path:
    folder = root / "llm" / recipe / algo / f"seed-{seed}"
    folder.mkdir(parents=True)
    about = {"benchmark": "llm", "dataset": recipe, "algo": algo, "seed": seed}
    config = {
        **about,
        "settings": {"model": None},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "hardware": {"name": "some processor", "cpus": 2},
        "command": f"python -m benchmarks.llm --recipe {recipe} --data /home/me/rows.jsonl",
    }
    result: dict[str, Any] = {
        **about,
        "score_name": "exact match",
        "score": score,
        "interval": [score - 0.1, score + 0.1],
        "n": 40,
        "share_careful": score / 3,
        "steps": 0,
        # No two runs take the same time.
        "cpu_seconds": 7.0 + 1e-6 * next(_count),
    }
    rows: list[dict[str, float]] = []
    if algo != "base":
        result |= {"steps": 2, "ESS": 0.6 + 0.1 * seed, "ESS_min": 0.5, "weight_max": 3.0}
        result["reference_cpu_seconds"] = 2.0
        rows = [{"step": s, "loss": 1.0 / s, "ESS": 0.7, "weight_max": 2.0} for s in (1, 2)]
    for name, content in (("config.json", config), ("result.json", result)):
        (folder / name).write_text(json.dumps(content))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_the_headline_ranks_two_and_sets_the_untrained_apart(tmp_path: Path) -> None:
    for algo, score in (("base", 0.4), ("sft", 0.5), ("dft", 0.45), ("iw-sft", 0.6)):
        language_run(tmp_path, algo, 0, score)
    (recipe,) = read_recipes(tmp_path)
    words = re.sub(r" \([^)]*\)", "", summary(recipe)).partition("by exact match: ")[2]
    assert words == "iw-SFT 0.600, then SFT 0.500; untrained: base 0.400."


def test_seeds_of_other_versions_are_named(tmp_path: Path) -> None:
    for seed, release in enumerate(("5.23.0", "5.22.0")):
        path = language_run(tmp_path, "sft", seed, 0.5 + seed / 10) / "config.json"
        path.write_text(path.read_text().replace("5.23.0", release))
    (recipe,) = read_recipes(tmp_path)
    note = 'Seeds differ in versions.transformers ("5.23.0", "5.22.0").'
    assert recipe_grid(recipe).notes == [note]


def test_changes_from_the_base_are_paired_by_prompt(tmp_path: Path) -> None:
    numbers = {"base": [-3.0, -1.0, -2.0], "sft": [-2.5, -0.4, -1.6]}
    for algo, log_probs in numbers.items():
        file = language_run(tmp_path, algo, 0, 0.5) / "result.json"
        means = {"log_prob": statistics.fmean(log_probs), "n": 3, "log_probs": log_probs}
        file.write_text(json.dumps(json.loads(file.read_text()) | means))
    language_run(tmp_path, "iw-sft", 0, 0.6)
    write_report(tmp_path, tmp_path / "report")
    page = (tmp_path / "report" / "report.md").read_text()
    # 0.5 -+ 4.303 * 0.1 / sqrt(3)
    assert page.count("log-likelihood of a token") == 1
    changed = "-2.000 -> -1.500, change +0.500 (95 % interval +0.252 to +0.748, prompts: 3)"
    assert changed in page.replace("\\", "").replace("&gt;", ">")


@pytest.fixture
def language(tmp_path: Path) -> Path:
    for algo, scores in SCORES.items():
        for seed, score in enumerate(scores):
            language_run(tmp_path, algo, seed, score)
    return tmp_path


def cells_of(markdown: str, algo: str) -> list[list[str]]:
    """Rows of all tables that begin with the algorithm."""
    rows = [line.strip("|").split(" | ") for line in markdown.splitlines() if line[:1] == "|"]
    return [[cell.strip() for cell in row] for row in rows if row[0].strip() == algo]


def test_scores_and_weights_over_seeds(language: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(Options(language))
    text = (language / "report/report.md").read_text()
    assert text.startswith("# Language runs\n") and "## Language: sums" in text
    for algo, scores in SCORES.items():
        scored, shares = cells_of(text, algorithm_label(algo))
        mean = statistics.mean(scores)
        assert scored[1:3] == [str(len(scores)), f"{mean:.3f}"]
        assert shares[1] == f"{mean / 3:.2f}"
    base, sft, weighted = (cells_of(text, algorithm_label(algo))[0] for algo in SCORES)
    # One seed: the interval of its test. Two carry none.
    assert base[3:] == ["0.400 to 0.600", "0", "-", "-", "-", "7"]
    center, scale = statistics.mean(SCORES["sft"]), statistics.stdev(SCORES["sft"]) / 3**0.5
    low, high = scipy.stats.t.interval(0.95, 2, center, scale)
    assert sft[3] == f"{low:.3f} to {high:.3f}"
    assert sft[4:] == ["2", "0.70", "0.50", "3.00", "9"]
    assert weighted[3] == "-" and weighted[5] == "0.65"

    page = (language / "report/index.html").read_text()
    assert "0.690" in page and "transformers 5.23.0" in page
    assert "--data rows.jsonl" in page and "/home/me" not in page + text
    panels = {path.name for path in (language / "report").glob("language_sums-*.svg")}
    assert panels == {f"language_sums-{name}.svg" for name in ("score", "ESS", "weight_max")}
    records = json.loads((language / "report/runs.json").read_text())
    assert [(record["algo"], record["seed"]) for record in records] == [
        ("base", 0), *(("sft", s) for s in range(3)), *(("iw-sft", seed) for seed in range(2))
    ]  # fmt: skip
    printed = capsys.readouterr().out
    assert "iw-SFT" in printed and "0.850" in printed and "D4RL" not in printed


@pytest.mark.parametrize("variant", ["", LONGER])
def test_methods_are_compared_with_sft(tmp_path: Path, variant: str) -> None:
    for algo, seed in itertools.product(("base", "sft", "iw-sft"), range(3)):
        if seed < len(SCORES[algo]):
            language_run(tmp_path / variant, algo, seed, SCORES[algo][seed])
    for seed, score in enumerate((0.8, 0.9, 0.95)):
        folder = language_run(tmp_path / variant, "dft", seed, score)
        for name, change in (
            ("config.json", {"settings": {"training": {"learning_rate": 3e-4}}}),
            ("result.json", {"cpu_seconds": 13.0 + seed / 10, "evaluation_cpu_seconds": 2.0}),
        ):
            content = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(content | change))
    (recipe,) = read_recipes(tmp_path)
    # Seeds are paired; iw-SFT has too few, and the base none.
    gaps = [0.8 - 0.61, 0.9 - 0.72, 0.95 - 0.74]
    center, scale = statistics.mean(gaps), statistics.stdev(gaps) / 3**0.5
    low, high = scipy.stats.t.interval(0.95, 2, center, scale)
    difference = f"+{center:.3f} ({low:.3f} to {high:.3f})"
    assert difference_grid(recipe).rows == [
        ["DFT", "0.0003", difference, "higher", f"{(13.1 - 2 + 2) / (7 + 2):.2f}"]
    ]
    write_report(tmp_path, tmp_path / "report")
    assert cells_of((tmp_path / "report/report.md").read_text(), "DFT")[1][2] == difference


def test_together_with_control_runs_and_by_folder(language: Path, make_run: MakeRun) -> None:
    make_run(language, "hopper-a", "bc", 0, 1.0)
    language_run(language / LONGER, "sft", 0, 0.5)
    write_report(language, language / "report")
    text = (language / "report/report.md").read_text()
    assert text.startswith("# Control and language runs\n")
    titles = [line[3:] for line in text.splitlines() if line.startswith("## ")]
    assert titles.index("Scores") < titles.index("Language: sums")
    assert f"Language: {LONGER}/sums" in titles and titles[-1] == "How these numbers were made"
    commands = text.split("## How these numbers were made")[1]
    assert "python -m benchmarks.d4rl" in commands and "python -m benchmarks.llm" in commands
    variants = {
        record.get("variant") for record in json.loads((language / "report/runs.json").read_text())
    }
    assert variants == {None, LONGER}
    assert (language / "report/language_plus_long_sums-score.svg").exists()
    assert "](language_plus_long_sums-score.svg)" in text
    # The folder of one recipe is a report too.
    write_report(language / LONGER, language / "alone")
    assert {path.name.partition("-")[0] for path in (language / "alone").glob("*.svg")} == {
        "language_sums"
    }
    assert [recipe.name for recipe in read_recipes(language / LONGER / "llm" / "sums")] == ["sums"]


def test_runs_that_were_tested_or_trained_otherwise_are_apart(language: Path) -> None:
    for seed, change in (
        (3, {"n": 7}),
        (4, {"score_name": "token probability"}),
        (5, {"steps": 9}),
    ):
        path = language_run(language, "sft", seed, 0.2) / "result.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | change))
    recipes = {recipe.name: recipe for recipe in read_recipes(language)}
    assert list(recipes) == ["sums", "sums (n 7)", "sums (score token probability)"]
    means = {cell.algo: cell.mean for cell in recipes["sums"].scores}
    sft = statistics.mean(SCORES["sft"])
    assert means == pytest.approx({"base": 0.5, "sft": sft, "steps 9/sft": 0.2, "iw-sft": 0.85})
    assert "steps 9 (not 2)" in recipes["sums"].note


@pytest.mark.parametrize(
    ("training", "name"),
    [
        ({"q": "auto"}, "training.q auto/sft"),
        ({"reference": "none"}, "training.reference none/sft"),
        ({"normalize_data_weights": True}, "training.normalize_data_weights true/sft"),
    ],
)
def test_a_setting_that_only_some_runs_record_is_told(
    tmp_path: Path, training: dict[str, Any], name: str
) -> None:
    """The settings are those that the job records of its options."""
    for seed, change in enumerate(({}, {}, training)):
        recorded_run(tmp_path, seed, {"training": change})
    (recipe,) = read_recipes(tmp_path)
    assert [(cell.algo, len(cell.runs)) for cell in recipe.scores] == [("sft", 2), (name, 1)]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ({"eval_data": "b.jsonl"}, "eval_data b.jsonl"),
        ({"eval_data": "b.jsonl", "eval_data_sha256": "b" * 64}, "eval_data bbbbbbbb"),
        ({"eval_share": 0.2}, "eval_share 0.2"),
        ({"model": "m", "model_sha256": "c" * 64}, "model cccccccc"),
    ],
)
def test_another_test_or_model_is_not_compared(
    tmp_path: Path, source: dict[str, Any], name: str
) -> None:
    for seed in range(6):
        recorded_run(tmp_path, seed, source if seed > 2 else {})
        recorded_run(tmp_path, seed, source if seed > 2 else {}, algo="iw-sft")
    recipes = read_recipes(tmp_path)
    assert [recipe.name for recipe in recipes] == ["chat", f"chat ({name})"]
    for recipe in recipes:
        assert [(cell.algo, len(cell.runs)) for cell in recipe.scores] == [
            ("sft", 3),
            ("iw-sft", 3),
        ]


def recorded_run(root: Path, seed: int, settings: dict[str, Any], algo: str = "sft") -> None:
    """A run of the chat recipe, with settings as the job records them."""
    given = replace(RECIPE.defaults, **settings.get("training", {}))
    training = recorded(given, ALGORITHMS["iw-sft-hard"])
    path = language_run(root, algo, seed, 0.1 * seed, "chat") / "config.json"
    own = {"recipe": "chat", "algo": algo, "seed": seed, **settings, "training": training}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"settings": own}))


def evaluation(root: Path, model: str, task: str, **change: Any) -> None:
    folder = root / model / task
    folder.mkdir(parents=True)
    result = {
        "benchmark": "llm-evaluation",
        "model": f"models/{model}",
        "task": task,
        "title": task.upper(),
        "questions": 30,
        "n": 4,
        "avg": 41.5,
        "avg_interval": [30.0, 54.0],
        "maj": 50.0,
        "pass_at": {"1": 41.5, "4": 63.3},
    }
    (folder / "result.json").write_text(json.dumps(result | change))


def test_evaluations_have_the_papers_numbers_beside_them(tmp_path: Path) -> None:
    evaluation(tmp_path, "mine", "aime-2024")
    evaluation(tmp_path, "mine", "gsm8k")
    write_report(tmp_path, tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    row = ["mine", "AIME-2024", "30", "4", "41.5", "30.0 to 54.0", "50.0", "63.3"]
    assert cells_of(text, "mine")[0] == row
    # Only the tasks that were run, in a table of their own.
    assert "| model | *AIME-2024* |" in text
    assert cells_of(text, "iw-SFT") == [["iw-SFT", "*66.7*"]]
    assert cells_of(text, "s1.1 w/o BF [1]") == [["s1.1 w/o BF [1]", "*56.7*"]]
    evaluation(tmp_path, "broken", "gsm8k", avg="many")
    evaluation(tmp_path, "swapped", "gsm8k", avg_interval=[1])
    evaluation(tmp_path, "listed", "gsm8k", settings=[])
    write_report(tmp_path, tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    plain = text.replace("\\", "")
    assert "'avg' is 'many'" in plain and "'avg_interval' is [1]" in plain
    assert "'settings' is []" in plain
    assert len(cells_of(text, "mine")) == 2


def test_models_whose_folders_have_the_same_name_are_told_apart(tmp_path: Path) -> None:
    for algo in ("sft", "iw-sft"):
        evaluation(tmp_path / algo, "checkpoint", "gsm8k")
        path = tmp_path / algo / "checkpoint/gsm8k/result.json"
        path.write_text(path.read_text().replace("models/", f"runs/llm/gsm8k/{algo}/seed-0/"))
    write_report(tmp_path, tmp_path / "report")
    text = (tmp_path / "report/report.md").read_text()
    assert len(cells_of(text, "gsm8k/sft/seed-0")) == 1
    assert len(cells_of(text, "gsm8k/iw-sft/seed-0")) == 1
    # So is the only one, which has no other to be told apart from.
    [row] = evaluation_grid(read_evaluations(tmp_path / "sft")).rows
    assert row[0] == "gsm8k/sft/seed-0"


def test_evaluations_with_other_settings_have_other_names(tmp_path: Path) -> None:
    usual = {"model": "a" * 64, "prompts": "b" * 64, "temperature": 0.0, "max_tokens": 64, "n": 1}
    others: dict[str, dict[str, Any]] = {
        "hot": {"temperature": 0.7, "n": 4},
        "long": {"max_tokens": 512},
        "tuned": {"model": "c" * 64},
        "older": {},
    }
    evaluation(tmp_path / "first", "mine", "gsm8k", settings=usual)
    for out, change in others.items():
        settings = usual | change
        if out == "older":
            del settings["temperature"]
        evaluation(tmp_path / out, "mine", "gsm8k", settings=settings)
    # Another model has other prompts, and another task may have other settings.
    elsewhere = usual | {"model": "d" * 64, "prompts": "e" * 64, "max_tokens": 9}
    evaluation(tmp_path / "first", "base", "gsm8k", settings=usual | {"prompts": "e" * 64})
    evaluation(tmp_path / "first", "mine", "aime-2024", settings=elsewhere)
    names = [row[0] for row in evaluation_grid(read_evaluations(tmp_path)).rows]
    assert sorted(names) == [
        "base (temperature 0.0, max_tokens 64)",
        "mine",
        "mine (model aaaaaaaa, max_tokens 64)",
        "mine (model aaaaaaaa, temperature 0.0, max_tokens 512)",
        "mine (model aaaaaaaa, temperature 0.0, max_tokens 64)",
        "mine (model aaaaaaaa, temperature 0.7, max_tokens 64)",
        "mine (model cccccccc, temperature 0.0, max_tokens 64)",
    ]


def test_the_order_is_that_of_the_language_job() -> None:
    assert sorted(NAMES, key=algorithm_rank) == list(NAMES)


def test_unfinished_runs_are_listed_and_not_counted(
    language: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut_off = language_run(language, "sft-q", 4, 0.9)
    (cut_off / "result.json").unlink()
    main(Options(language))
    text = (language / "report/report.md").read_text()
    assert cells_of(text, "SFT(Q)") == [] and "- sums, sft-q, seed 4: update " in text
    assert str(cut_off) in capsys.readouterr().out.replace("\n", "")


def test_only_unfinished_runs_make_no_report(tmp_path: Path) -> None:
    (language_run(tmp_path, "sft", 0, 0.9) / "result.json").unlink()
    with pytest.raises(ResultsError, match=r"no finished run below .*\(1 unfinished\)"):
        write_report(tmp_path, tmp_path / "report")


@pytest.mark.parametrize(("within", "seeds"), [("sft", 3), ("sft/seed-0", 1)])
def test_a_part_of_a_recipe_can_be_read(language: Path, within: str, seeds: int) -> None:
    (recipe,) = read_recipes(language / "llm/sums" / within)
    assert recipe.name == "sums"
    assert [(row.algo, len(row.seeds)) for row in recipe.scores] == [("sft", seeds)]


@pytest.mark.parametrize("name", ["result.json", "config.json"])
@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_damaged_file_names_its_run(language: Path, name: str, content: str) -> None:
    run = language / "llm/sums/sft/seed-1"
    (run / name).write_text(content)
    (recipe,) = read_recipes(language)
    (damaged,) = recipe.unfinished
    assert re.search(rf"sft/seed-1/{name}.* (is|holds no) .*run again", damaged.damage)
    write_report(language, language / "report")
    assert "- sums, sft, seed 1: " in (language / "report/report.md").read_text()
