"""The job in this process: its files, its output, resuming, and its errors."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import small_job
import torch

from benchmarks.llm.__main__ import main
from benchmarks.llm.models import load
from benchmarks.llm.options import ALGORITHMS
from benchmarks.llm.recipes import RECIPES, Sources
from benchmarks.llm.recipes.arithmetic.recipe import ArithmeticRecipe
from benchmarks.report.page import write_report
from benchmarks.report.scores import algorithm_label
from benchmarks.results import CONTROL, read_all
from iwsft.datasets.text.rows import Row
from iwsft.language import ImportanceWeightedTrainer

SHORT = ("--max-steps", "6", "--sync-every", "2", "--ema-decay", "0.5")


@pytest.fixture
def job(small: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """``job(out, algo, ..., flags=...)``: the command on the small recipe, here; its folder."""
    monkeypatch.setitem(RECIPES, "small", "small_job")

    def run(
        out: Path,
        *algo: str,
        flags: Sequence[str] = ("--max-steps", "6"),
        model: str = small[0],
        data: str = small[1],
    ) -> Path:
        words = ["--recipe", "small", "--algo", *algo, "--seeds", "0", "--jobs", "1"]
        main([*words, "--model", model, "--data", data, "--out", str(out), *flags])
        return out / "llm" / "small"

    return run


def rows(folder: Path) -> list[dict[str, float]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [row for row in map(json.loads, lines) if "loss" in row]


# The others differ from these in their weights alone.
TRAINED = {
    name: algorithm
    for name, algorithm in ALGORITHMS.items()
    if algorithm.related in (None, "dft", "psft", "nft", "asymre")
}


def test_every_algorithm_writes_its_files(
    job: Callable[..., Path], tmp_path: Path, capsys: Any, small: Any, figures: None
) -> None:
    folder = job(tmp_path, "base", *TRAINED, flags=SHORT)
    assert len([*(folder / "report").glob("*.svg")]) == 3
    (start, _), tested = load(small[0]), set()
    prepared = small_job.RECIPE.prepare(tmp_path, Sources(*small), seed=0)
    for algo, algorithm in TRAINED.items():
        run = folder / algo / "seed-0"
        result, config = (json.loads((run / f"{n}.json").read_text()) for n in ("result", "config"))
        assert (result["benchmark"], result["dataset"], result["algo"]) == ("llm", "small", algo)
        assert result["steps"] == 6 and result["proposal"] == algorithm.proposal
        assert result["cpu_seconds"] >= result["evaluation_cpu_seconds"] > 0
        assert result["interval"][0] <= result["score"] <= result["interval"][1]
        assert (result["n"], config["settings"]["training"]["max_steps"]) == (40, 6)
        assert {"iwsft", "torch"} <= config["versions"].keys()
        logged = rows(run)
        assert [row["step"] for row in logged] == [1, 2, 3, 4, 5, 6]
        assert [row["cpu_seconds"] for row in logged] == sorted(r["cpu_seconds"] for r in logged)
        # theta is the reference still: the loss is that of SFT on the same draws.
        same = "sft-q" if algorithm.quality else "sft"
        if algorithm.related in (None, "psft"):
            assert logged[0]["weight_max"] == 1.0 and logged[0]["ESS"] == pytest.approx(1.0)
            of_sft = rows(folder / same / "seed-0")[0]["loss"]
            assert (logged[0]["loss"] == pytest.approx(of_sft, rel=1e-6)) != algorithm.by_score
        elif not algorithm.signed:
            assert logged[0]["weight_max"] < 1
        moved = max(abs(row["weight_max"] - 1) for row in logged) > 1e-4
        assert moved == (algorithm.proposal != "reference")
        # What is saved is what was tested, and not what was started from.
        model, tokenizer = load(str(run / "checkpoint"))
        assert not torch.equal(model.lm_head.weight, start.lm_head.weight)
        if algorithm.proposal not in tested:
            again = small_job.RECIPE.evaluate(model, tokenizer, prepared, seed=0)
            assert again["share_careful"] == pytest.approx(result["share_careful"], abs=1e-6)
            tested.add(algorithm.proposal)
    base = json.loads((folder / "base" / "seed-0" / "result.json").read_text())
    assert base["steps"] == 0 and "ESS" not in base

    printed = capsys.readouterr()
    assert f"{1 + len(TRAINED)} done" in printed.out and "exact match" in printed.out
    labels = [algorithm_label(name) for name in ("base", *TRAINED)]
    lines = [f"{line.strip()} " for line in printed.out.splitlines()]
    shown = [
        max((each for each in labels if line.startswith(f"{each} ")), key=len, default="")
        for line in lines
    ]
    assert [*filter(None, shown)] == 2 * labels
    # A report of the folder above contains them, too; they are not control runs.
    assert read_all(tmp_path, CONTROL) == ([], [])
    above = write_report(tmp_path, tmp_path / "report").page.parent
    for report in (folder / "report", above):
        records = {each["algo"]: each for each in json.loads((report / "runs.json").read_text())}
        assert records.keys() == {"base", *TRAINED} and records["base"]["score"] == base["score"]
        for algo, record in records.items():
            row = f"| {algorithm_label(algo)} | 1 | {record['score']:.3f} |"
            assert row in (report / "report.md").read_text()


def write_rows(path: Path, source: str, drop: int, **more: Any) -> str:
    """Copy rows but the first ones, with changed columns; the new file."""
    rows = [json.loads(line) | more for line in Path(source).read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[drop:]))
    return str(path)


def test_finished_runs_stay_and_other_settings_are_refused(
    job: Callable[..., Path],
    small: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = job(tmp_path, "sft") / "sft" / "seed-0"
    before = (run / "result.json").read_bytes()

    def stopped(*algo: str, steps: int = 6, flags: Sequence[str] = (), **files: str) -> str:
        with pytest.raises(SystemExit) as end:
            job(tmp_path, *algo, flags=["--max-steps", str(steps), *flags], **files)
        return str(end.value)

    assert "pass --resume to continue" in stopped("sft", "iw-sft")
    assert not (tmp_path / "llm" / "small" / "iw-sft").exists()
    refused = stopped("sft", steps=7, flags=["--resume"])
    assert "holds a run with other settings: settings.training.max_steps=6 (now 7)" in refused
    other = write_rows(tmp_path / "other.jsonl", small[1], drop=1)
    assert "settings.data_sha256" in stopped("sft", flags=["--resume"], data=other)
    model = Path(small[0])
    weights = (model / "model.safetensors").read_bytes()
    changed = {"model.safetensors": weights[:-1] + bytes([weights[-1] ^ 1])}
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        changed[name] = (model / name).read_bytes() + b" "
    for name, content in changed.items():
        kept = (model / name).read_bytes()
        (model / name).write_bytes(content)
        assert "settings.model_sha256" in stopped("sft", flags=["--resume"]), name
        (model / name).write_bytes(kept)
    unscored = write_rows(tmp_path / "unscored.jsonl", small[1], drop=0, score=None)
    assert "sft-q cuts by score, but" in stopped("sft-q", data=unscored)
    assert "rwr weighs by score, but" in stopped("rwr", data=unscored)
    assert not (tmp_path / "llm" / "small" / "sft-q").exists()
    assert "there is no model folder a/b/c" in stopped("sft", model="a/b/c")

    job(tmp_path, "sft", "iw-sft", flags=["--max-steps", "6", "--resume"])
    assert (run / "result.json").read_bytes() == before
    assert "1 done, 1 finished before" in capsys.readouterr().out

    # The base is the same for a further algorithm.
    job(tmp_path, "base", flags=())
    job(tmp_path, "base", "iw-sft-hard")
    assert "1 done, 1 finished before" in capsys.readouterr().out
    refused = stopped("base", "iw-sft-ema", data=other)
    assert "base/seed-0 holds a run with other settings: settings.data" in refused


def test_rows_beside_a_file_of_weights_are_digested_as_rows(
    job: Callable[..., Path], small: tuple[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    shutil.copy(small[1], folder / "train.jsonl")
    (folder / "model.safetensors").write_bytes(b"weights")
    flags = ["--max-steps", "1", "--warmup", "0"]
    job(tmp_path, "sft", data=f"{folder}", flags=flags)
    write_rows(folder / "train.jsonl", small[1], drop=1)
    with pytest.raises(SystemExit, match=r"settings\.data_sha256"):
        job(tmp_path, "sft", data=f"{folder}", flags=[*flags, "--resume"])


def test_another_precision_of_the_shell_is_refused(
    job: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--max-steps", "2", "--warmup", "0"]
    for mixed, precision in (("bf16", "float32"), ("fp16", "float32"), ("fp16", "bfloat16")):
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", mixed)
        with pytest.raises(SystemExit):
            own = [*flags, "--precision", precision]
            job(tmp_path / f"{mixed}-{precision}", "sft", flags=own)
        told = capsys.readouterr().err
        assert f"mixed_precision is {mixed}, and --precision {precision}" in told
        # bfloat16 is a way out of bf16 alone.
        assert ("or pass --precision bfloat16" in told) == (mixed == "bf16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    named = job(tmp_path / "two", "sft", flags=[*flags, "--precision", "bfloat16"])
    assert (named / "sft" / "seed-0" / "result.json").exists()


def test_the_last_updates_are_logged_and_counted_too(
    job: Callable[..., Path], tmp_path: Path
) -> None:
    own = ["--max-steps", "6", "--warmup", "0", "--sync-every", "2", "--q", "auto"]
    results = []
    for every, steps in ((4, [4, 6]), (1, [*range(1, 7)])):
        folder = job(tmp_path / f"{every}", "iw-sft-hard", flags=[*own, "--log-every", f"{every}"])
        run = folder / "iw-sft-hard" / "seed-0"
        assert [row["step"] for row in rows(run)] == steps
        results.append(json.loads((run / "result.json").read_text()))
        assert results[-1]["cpu_seconds"] > results[-1]["evaluation_cpu_seconds"]
    assert results[0]["q"] == results[1]["q"]
    # The rows of single updates.
    ess, largest = ([row[name] for row in rows(run)] for name in ("ESS", "weight_max"))
    assert min(largest) < max(largest) and min(ess) < max(ess)
    truth = {"ESS": sum(ess) / 6, "ESS_min": min(ess), "weight_max": max(largest)}
    for result in results:
        assert {name: result[name] for name in truth} == pytest.approx(truth, rel=1e-9)


def test_rows_of_training_are_not_figures_of_the_test(
    job: Callable[..., Path], tmp_path: Path
) -> None:
    run = job(tmp_path, "sft") / "sft" / "seed-0"
    whole = json.loads((run / "result.json").read_text())
    (run / "result.json").unlink()
    # The file has lost its first row.
    metrics = run / "metrics.jsonl"
    metrics.write_text(metrics.read_text().partition("\n")[2])
    job(tmp_path, "sft", flags=["--max-steps", "6", "--resume"])
    again = json.loads((run / "result.json").read_text())
    lost = {"reference_cpu_seconds", "reference_wall_seconds"}
    assert again.keys() == whole.keys() - lost


def test_a_card_has_the_base_of_the_same_rows_alone(
    job: Callable[..., Path], small: tuple[str, str], tmp_path: Path
) -> None:
    flags = ["--max-steps", "1", "--warmup", "0"]
    other = write_rows(tmp_path / "other.jsonl", small[1], drop=1)
    folder = job(tmp_path, "base", flags=())
    base = json.loads((folder / "base" / "seed-0" / "result.json").read_text())
    for data, algo, before in (
        (small[1], "sft", f"| {base['score']:.3f} ("),
        (other, "iw-sft", "| not measured |"),
    ):
        job(tmp_path, algo, data=data, flags=flags)
        card = (folder / algo / "seed-0" / "checkpoint" / "README.md").read_text()
        assert f"| score {before}" in card


def test_rows_of_other_prompts_choose_the_temperature(
    job: Callable[..., Path],
    small: tuple[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--max-steps", "6", "--sync-every", "2", "--q", "auto"]
    lines = [json.loads(line) for line in Path(small[1]).read_text().splitlines()]
    judged = write_rows(tmp_path / "judged.jsonl", small[1], drop=0)
    Path(judged).write_text(
        "".join(json.dumps(row | {"correct": i % 3 > 0}) + "\n" for i, row in enumerate(lines))
    )
    folder = job(tmp_path / "one", "sft", "iw-sft-hard", data=judged, flags=flags)
    results = {
        algo: json.loads((folder / algo / "seed-0" / "result.json").read_text())
        for algo in ("sft", "iw-sft-hard")
    }
    result, digests = results["iw-sft-hard"], [small_job.digest(row["prompt"]) for row in lines]
    right = [i for i in range(len(lines)) if i % 3]
    assert result["trajectories"] == sum(digests[i] % 5 > 0 for i in right) < len(right)
    # SFT has no temperature, and trains on all right rows.
    assert results["sft"]["trajectories"] == len(right) and "q" not in results["sft"]
    assert result["q"]["rule"] == "auto" and "note" not in result["q"]
    # Without wrong answers nothing can choose: the run is SFT on all rows, and says so.
    plain = write_rows(tmp_path / "right.jsonl", small[1], drop=0, correct=True)
    folder = job(tmp_path / "two", "iw-sft-hard", data=plain, flags=flags)
    reason = "have the same score, so --q auto leaves all weights at 1, as in SFT"
    assert reason in capsys.readouterr().err
    result = json.loads((folder / "iw-sft-hard" / "seed-0" / "result.json").read_text())
    assert reason in result["q"]["note"] and result["trajectories"] == len(lines)
    weighed = rows(folder / "iw-sft-hard" / "seed-0")
    sft = job(tmp_path / "two", "sft", data=plain) / "sft" / "seed-0"
    assert [row["loss"] for row in weighed] == [row["loss"] for row in rows(sft)]


@pytest.mark.parametrize(("flag", "equal", "other"), [("sync-every", 3, 2), ("max-weight", 0.1, 9)])
def test_a_run_whose_weights_are_all_equal_says_why(
    job: Callable[..., Path], tmp_path: Path, capsys: Any, flag: str, equal: float, other: float
) -> None:
    algo = "iw-sft-hard" if flag == "sync-every" else "iw-sft"
    for value in (equal, other):
        flags = ["--max-steps", "3", f"--{flag}", f"{value}"]
        run = job(tmp_path / f"{value}", algo, flags=flags) / algo / "seed-0"
        told = f"{algo} seed 0: --{flag} {value}" in capsys.readouterr().err
        assert told == ([row["weight_max"] for row in rows(run)] == [1.0] * 3) == (value == equal)


def test_a_run_that_was_stopped_in_its_test_is_only_tested(
    job: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def stopped(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(ArithmeticRecipe, "evaluate", stopped)
        job(tmp_path, "iw-sft")
    assert end.value.code == 128 + signal.SIGTERM
    assert capsys.readouterr().err.splitlines()[-1] == "stopped"
    run = tmp_path / "llm" / "small" / "iw-sft" / "seed-0"
    before = {
        path: path.read_bytes()
        for path in run.rglob("*")
        if path.suffix != ".lock" and path.is_file()
    }
    with monkeypatch.context() as patch:
        # Nothing is trained.
        patch.setattr(ImportanceWeightedTrainer, "train", None)
        job(tmp_path, "iw-sft", flags=["--max-steps", "6", "--resume"])
    result = json.loads((run / "result.json").read_text())
    whole = job(tmp_path / "whole", "iw-sft") / "iw-sft" / "seed-0"
    for name, value in json.loads((whole / "result.json").read_text()).items():
        assert result[name] == value or "seconds" in name, name
    assert not (run / "trained.json").exists()
    weights = run / "checkpoint" / "model.safetensors"
    assert before[weights] == weights.read_bytes()
    assert weights.read_bytes() == (whole / "checkpoint" / "model.safetensors").read_bytes()


def test_rows_that_do_not_fit_the_model_are_refused_before_training(
    job: Callable[..., Path],
    small: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def refused(context: int, **own: Any) -> str:
        model = Path(shutil.copytree(small[0], tmp_path / f"reads-{context}"))
        own = {**json.loads((model / "config.json").read_text()), **own}
        (model / "config.json").write_text(json.dumps({**own, "max_position_embeddings": context}))
        with pytest.raises(SystemExit) as end:
            job(tmp_path / f"out-{context}", "sft", model=str(model))
        return str(end.value.code)

    assert "a row of training has 33 tokens, and" in refused(20)
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1], "long_factor": [2]}
    rope["original_max_position_embeddings"] = 30
    assert "to 33 tokens, and qwen2 reads those of up to 30" in refused(64, rope_parameters=rope)
    # Rows of the test are cut, but not before what is tested.
    held_out = [Row("a", prompt="1+" * 60 + "1=", completion="2")]
    monkeypatch.setattr(ArithmeticRecipe, "tested_rows", lambda self, prepared: held_out)
    assert "a: max_length=40 cuts off all that is trained" in (told := refused(40))
    assert told.endswith("drop the row, or raise max_length up to the model's context")


def test_processes_that_can_not_be_started_leave_no_run(
    small: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "small", "small_job")
    # As torchrun sets it.
    monkeypatch.setenv("LOCAL_RANK", "0")
    words = ["--recipe", "small", "--algo", "sft", "--model", small[0], "--data", small[1]]
    with pytest.raises(SystemExit, match="LOCAL_RANK is set"):
        main([*words, "--deepspeed", "--out", str(tmp_path)])
    assert not any(tmp_path.rglob("config.json"))


def test_code_that_comes_with_a_model_runs_only_when_asked(
    job: Callable[..., Path],
    small: tuple[str, str],
    tmp_path: Path,
    bring_code: Callable[[Path], Path],
) -> None:
    model = Path(shutil.copytree(small[0], tmp_path / "own"))
    mark = bring_code(model)
    with pytest.raises(SystemExit, match="pass --trust-remote-code"):
        job(tmp_path, "sft", model=str(model))
    # What was refused before anything was done leaves no run to resume.
    assert not mark.exists() and not any((tmp_path / "llm").rglob("config.json"))
    flags = ["--max-steps", "6", "--trust-remote-code"]
    folder = job(tmp_path, "sft", model=str(model), flags=flags)
    assert mark.exists()
    # The same numbers as by transformers' own class, tested from what was saved.
    job(tmp_path / "plain", "sft")
    other = tmp_path / "plain" / "llm" / "small"
    for name in ("score", "share_careful"):
        found, plain = (
            json.loads((at / "sft" / "seed-0" / "result.json").read_text())[name]
            for at in (folder, other)
        )
        assert found == plain


def test_a_run_that_fails_does_not_stop_the_others(
    job: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = job(tmp_path, "sft", flags=["--max-steps", "4"])
    (folder / "sft" / "seed-0" / "result.json").unlink()
    shutil.rmtree(folder / "sft" / "seed-0" / "checkpoint")
    (folder / "sft" / "seed-0" / "trained.json").write_text("{}")
    with pytest.raises(SystemExit) as end:
        job(tmp_path, "sft", "iw-sft", flags=["--max-steps", "4", "--resume"])
    assert end.value.code == 1
    printed = capsys.readouterr()
    assert any(line.startswith("error: small sft seed 0:") for line in printed.err.splitlines())
    assert "1 done, 1 failed" in printed.out
    assert (folder / "iw-sft" / "seed-0" / "result.json").exists()
