"""The command line of the job: errors at once, the recipes' options, the settings of each run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import small_job

from benchmarks.llm.__main__ import main
from benchmarks.llm.evaluation.options import Options as EvaluationOptions
from benchmarks.llm.evaluation.tasks import TASKS
from benchmarks.llm.job import _check_scores, _tell_of_template
from benchmarks.llm.options import ALGORITHMS, choose_q, parse, recorded
from benchmarks.llm.recipes import RECIPES, load_recipe
from benchmarks.llm.recipes.s1k import AUTHORS, PAPER
from benchmarks.llm.run import training_arguments
from benchmarks.llm.settings import Settings
from benchmarks.options import parse as parse_command
from iwsft.datasets.text.rows import Row
from iwsft.presets import ImportanceWeights


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--algo iwsft", "unknown algorithm 'iwsft'; did you mean 'iw-sft'?"),
        ("--recipe aritmetic", "unknown recipe 'aritmetic'; did you mean 'arithmetic'?"),
        ("--algo", "nothing to run"),
        ("--seeds", "nothing to run"),
        ("--algo sft sft", "--algo sft: asked for twice"),
        ("--seeds 1 1", "--seeds 1: asked for twice"),
        ("--seeds -1", "--seeds -1: a seed lies in"),
        ("--jobs 0", "--jobs 0: at least 1"),
        ("--device tpu", "unknown device 'tpu'; did you mean 'cpu'?"),
        ("--deepspeed zero3 zero2", "--deepspeed zero3 zero2: one config"),
        ("--deepspeed --jobs 2", "--jobs 2 changes nothing with --deepspeed"),
        ("--deepspeed zero9", "--deepspeed zero9: there is no such file; it is one of cpu_zero3"),
        ("--algo sft --sync-every 5", "--sync-every 5 changes nothing"),
        ("--algo sft iw-sft --ema-decay 0.5", "--ema-decay 0.5 changes nothing"),
        ("--algo sft iw-sft-step --temperature 2", "--temperature 2.0 changes nothing"),
        (
            "--algo iw-sft --temperature 2 --preset authors_llm",
            "--temperature 2.0 changes nothing in the algorithms asked for with preset 'authors",
        ),
        ("--algo sft --preset recipe", "--preset recipe changes nothing"),
        ("--algo dft --psft-epsilon 0.3", "--psft-epsilon 0.3 changes nothing"),
        ("--algo power --power-k 0", "--power-k 0.0: a finite number above 0"),
        ("--algo sft dft --reference none", "--reference none changes nothing"),
        ("--algo iw-sft --reference none", "reference='none' and reduce='sum' weigh by"),
        ("--algo iw-sft-step --reference none", "ClipRatio(min=0.2, max=1.8) is for q / pi_ref"),
        ("--algo topr --cuts 50", "--cuts (50.0,) changes nothing"),
        ("--algo topr --baseline-margin 0.2", "--baseline-margin 0.2 changes nothing"),
        ("--algo eaft --eaft-top-k 1", "--eaft-top-k 1: at least 2"),
        ("--algo base --max-steps 5", "--max-steps 5 changes nothing"),
        ("--max-steps 80 --epochs 1", "--max-steps and --epochs: pass one"),
        ("--max-steps 0", "--max-steps 0: at least 1"),
        ("--learning-rate 0", "--learning-rate 0.0: a finite number above 0"),
        ("--ema-decay 1", "--ema-decay 1.0: in [0, 1)"),
        ("--adam-beta2 1", "--adam-beta2 1.0: in [0, 1)"),
        ("--algo iw-sft --temperature -1", "--temperature -1.0: a finite number"),
        ("--algo iw-sft --temperature inf", "--temperature inf: a finite number"),
        ("--epochs nan", "--epochs nan: a finite number"),
        ("--algo iw-sft-step --step-clip 2 1", "--step-clip 2.0 1.0: from 0 on"),
        ("--scheduler constant --warmup 5", "--warmup 5.0 changes nothing with --scheduler"),
        ("--algo base --save-every 5", "--save-every 5 changes nothing in base"),
        ("--report-to wandbb", "unknown tracker 'wandbb'; did you mean 'wandb'"),
        ("--scheduler cosin", "unknown scheduler 'cosin'; did you mean 'cosine'?"),
        ("--scheduler warmup_stable_decay", "unknown scheduler 'warmup_stable_decay'; "),
        ("--max-steps 9 --warmup 9", "a warm-up of 9: 9 updates never reach --learning-rate"),
        ("--max-steps 1 --warmup 0.5", "a warm-up of 0.5: 1 update never reaches --learning-rate"),
        ("--warmup 2.5", "--warmup 2.5: a whole number of updates, or below 1"),
        ("--quality-cuts 0 100", "cut 100.0: a percentile"),
        ("--micro-batch-size 5", "--micro-batch-size 5 does not divide the 32 draws"),
    ],
)
def test_errors_that_can_be_known_come_at_once(words: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as end:
        main([*words.split(), "--out", str(tmp_path / "runs")])
    assert f"error: {message}" in str(end.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("words", "package"), [("--report-to wandb", "wandb"), ("--lora-rank 4", "peft")]
)
def test_a_missing_package_is_named(
    words: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iwsft.extras.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=f"{package} is not installed: pip install 'iwsft"):
        parse(words.split())


def test_missing_options_are_the_recipes() -> None:
    arithmetic = load_recipe("arithmetic")
    options = parse([])
    assert (options.seeds, options.settings) == ((0, 1, 2), arithmetic.defaults)
    assert parse(["--seeds", "7"]).seeds == (7,)
    options = parse(["--recipe=s1k", "--algo", "iw-sft"])
    assert (options.seeds, options.settings) == ((0,), AUTHORS)
    # A preset brings its own settings, and the other flags come after.
    options = parse(
        ["--recipe", "s1k", "--algo", "iw-sft", "--preset", "paper_llm", "--warmup", "7"]
    )
    assert options.settings == replace(PAPER, warmup=7)
    settings = parse(
        ["--recipe", "s1k", "--algo", "iw-sft", "--max-steps", "10", "--cuts", "50"]
    ).settings
    assert (settings.max_steps, settings.epochs, settings.cuts) == (10, None, (50.0,))
    settings = parse(["--epochs", "2"]).settings
    assert (settings.max_steps, settings.epochs) == (None, 2.0)


def test_a_recipes_own_warm_up_that_is_too_long_is_told() -> None:
    with pytest.warns(UserWarning, match="a warm-up of 10: 6 updates never reach --learning-rate"):
        settings = parse(["--max-steps", "6"]).settings
    assert (settings.max_steps, settings.warmup) == (6, 10)


def test_help_shows_the_recipes_own_settings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(["--recipe", "s1k", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert all(name in shown for name in RECIPES) and "(set by the recipe: 22000)" in shown


def test_a_batch_is_shared_out() -> None:
    settings = Settings(learning_rate=1e-3, batch_size=16, max_steps=3, micro_batch_size=2)
    for processes, accumulation in ((1, 8), (4, 2), (8, 1)):
        arguments = training_arguments(small_job.run(settings, processes), ALGORITHMS["sft"])
        assert arguments["per_device_train_batch_size"] == 2
        assert arguments["gradient_accumulation_steps"] == accumulation
    # A micro-batch is never more than there is.
    arguments = training_arguments(small_job.run(settings, 16), ALGORITHMS["sft"])
    assert arguments["per_device_train_batch_size"] == 1
    assert arguments["gradient_accumulation_steps"] == 1
    with pytest.raises(ValueError, match="--batch-size 16: not a multiple of 3 processes"):
        training_arguments(small_job.run(settings, 3), ALGORITHMS["sft"])


def test_weights_that_are_compared_are_known_before_a_divided_update() -> None:
    compared = Settings(learning_rate=1e-3, batch_size=4, max_steps=3, self_normalize=True)
    alone = Settings(learning_rate=1e-3, batch_size=4, max_steps=3)
    current = ALGORITHMS["iw-sft"]
    assert choose_q(current, compared, 1) == ("current", None)
    assert choose_q(current, compared, 2) == ("cached", 1)
    assert choose_q(current, alone, 2) == ("current", None)
    assert choose_q(ALGORITHMS["iw-sft-step"], compared, 2) == ("current", None)
    assert choose_q(ALGORITHMS["iw-sft-hard"], compared, 2) == ("cached", compared.sync_every)
    assert choose_q(ALGORITHMS["sft"], compared, 2) == ("reference", None)
    assert choose_q(ALGORITHMS["iw-sft-ema"], compared, 2) == ("lagged", None)


def test_each_related_method_has_the_chain_of_its_settings() -> None:
    settings = Settings(
        learning_rate=1e-3, batch_size=4, power_k=3.0, psft_epsilon=0.3, eaft_alpha=2.0
    )
    chains = ImportanceWeights
    expected = {
        "dft": chains.dft(),
        "power": chains.power(3.0),
        "chord-phi": chains.chord_phi(),
        "psft": chains.psft(0.3),
        "eaft": chains.eaft(2.0, 20),
        "asft": chains.asft(0.1),
        "minor-sft": chains.minor_sft(0.1),
        "topr": chains.topr(),
        "nft": chains.nft(1.0),
        "asymre": chains.asymre(),
    }
    related = {name: each for name, each in ALGORITHMS.items() if each.related is not None}
    assert {n: each.importance_weights(settings) for n, each in related.items()} == expected
    # What changes nothing is not recorded.
    assert "power_k" not in recorded(settings, ALGORITHMS["psft"])
    assert recorded(settings, ALGORITHMS["power"])["power_k"] == 3.0
    assert not {"reference", "psft_epsilon"} & recorded(settings, ALGORITHMS["iw-sft"]).keys()


def test_the_protocol_of_the_dft_paper_is_a_command() -> None:
    file = Path(__file__).parents[3] / "examples" / "numina_dft.yaml"
    options = parse(["--config", str(file)])
    assert options.algo == ("base", "sft", "dft", "iw-sft") and options.deepspeed == ("zero2",)
    used = options.settings
    assert (used.learning_rate, used.batch_size, used.epochs, used.warmup) == (5e-5, 256, 1, 0.1)
    # The comment has the command of the test.
    comment = " ".join(line[1:] for line in file.read_text().splitlines() if line[:1] == "#")
    command = comment.replace("\\", "").partition("iwsft evaluate ")[2].partition(" It was")[0]
    tested = parse_command(EvaluationOptions, "llm evaluate", None, command.split())
    assert set(tested.tasks) <= set(TASKS) and (tested.n, tested.max_tokens) == (16, 4096)


def test_counts_of_rows_replace_cuts_and_it_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    settings = Settings(learning_rate=1e-3, batch_size=4, max_steps=1)
    rows = [Row(f"row {n}", prompt="1+1=", completion="2", score=n, count=n) for n in (1, 2)]
    _check_scores("sft-q", settings, rows)
    assert capsys.readouterr().err.startswith("sft-q: the rows have a 'count', so no cut")
    _check_scores("sft", settings, rows)
    _check_scores("sft-q", settings, [replace(row, count=None) for row in rows])
    assert not capsys.readouterr().err


def test_scores_that_nothing_reads_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """Rows that failed would be trained on like the others, without a word."""
    settings = Settings(learning_rate=1e-3, batch_size=4, max_steps=1)
    rows = [Row(f"row {n}", prompt="1+1=", completion="2", score=n) for n in (0, 1)]
    _check_scores("iw-sft", settings, rows)
    assert capsys.readouterr().err.startswith(
        "iw-sft: the scores are not used: all 2 rows are in D+"
    )
    judged = [replace(row, correct=bool(row.score)) for row in rows]
    weighted = [replace(row, weight=row.score) for row in rows]
    unscored = [replace(row, score=None) for row in rows]
    for other in (judged, weighted, unscored, rows[:1]):
        _check_scores("iw-sft", settings, other)
    _check_scores("iw-sft", replace(settings, cuts=(50,)), rows)
    for algo in ("iw-sft-q", "rwr"):
        _check_scores(algo, settings, rows)
    assert not capsys.readouterr().err


def test_prompts_outside_of_a_chat_template_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    """The test of a chat model asks through its template, which such rows do not train."""
    turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    plain, chat = Row("row 1", prompt="1+1=", completion="2"), Row("row 2", messages=tuple(turns))
    _tell_of_template([plain, plain, chat], "{{ messages }}")
    assert capsys.readouterr().err.startswith("rows of prompt and completion: 2, joined without")
    _tell_of_template([chat], "{{ messages }}")
    _tell_of_template([plain], None)
    assert not capsys.readouterr().err
