"""The language loop: files, first weights, replayed references, kills, verifiers, bad input."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM

from benchmarks.llm.__main__ import loop, main
from benchmarks.llm.loop.options import parse
from benchmarks.llm.recipes.arithmetic import BaseSettings
from benchmarks.llm.recipes.arithmetic.base import config, tokenizer
from benchmarks.llm.recipes.arithmetic.task import problems
from benchmarks.report.loops import loop_grid, read_loops
from benchmarks.report.page import write_report
from benchmarks.results import LANGUAGE, read_all
from iwsft.loop import Round, table

# Half of all texts are right, which a model that has learned nothing can be.
VERIFIERS = """
def parity(text, row):
    return (sum(map(ord, text)) + len(row["prompt"])) % 2

def broken(text, row):
    raise KeyError("no such column")

def never(text, row):
    return 0

def debt(text, row):
    if len(text) % 5 == 0:
        raise ValueError("no verdict")
    return parity(text, row) - 2
"""
SAMPLES = 6


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model of random weights, prompts, and a module of verifiers."""
    folder = tmp_path_factory.mktemp("loop")
    torch.manual_seed(0)
    sizes = BaseSettings(hidden_size=32, intermediate_size=48, layers=2)
    Qwen2ForCausalLM(config(sizes)).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    for name, count, split in (("prompts", 8, "train"), ("held-out", 5, "held-out")):
        asked = problems(count, 1, split)  # type: ignore[arg-type]
        rows = [{"prompt": each.prompt, "answer": str(each.answer)} for each in asked]
        write(folder / f"{name}.jsonl", rows)
    (folder / "scripted_verifiers.py").write_text(VERIFIERS)
    return folder


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def run(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[dict[str, Any]]]:
    """``run(flag, ...)``: the command in a folder of its own; its table."""
    monkeypatch.syspath_prepend(place)

    def call(*flags: str, out: str = "loop", verifier: str = "parity") -> list[dict[str, Any]]:
        words = words_of(place, verifier)
        pairs = zip(words[::2], words[1::2], strict=True)
        own = [word for pair in pairs if pair[0] not in flags for word in pair]
        loop([*own, "--out", str(tmp_path / out), *flags])
        return table(tmp_path / out)

    return call


def words_of(place: Path, verifier: str = "parity") -> list[str]:
    name = f"scripted_verifiers:{verifier}" if verifier in VERIFIERS else verifier
    return [
        *("--model", str(place / "model"), "--prompts", str(place / "prompts.jsonl")),
        *("--verifier", name, "--samples-per-prompt", str(SAMPLES), "--max-tokens", "24"),
        *("--sampling-batch", "16", "--learning-rate", "0.003", "--batch-size", "4"),
        *("--epochs", "1", "--rounds", "1"),
    ]


def score(text: str, prompt: str) -> int:
    return (sum(map(ord, text)) + len(prompt)) % 2


def test_a_round_is_what_its_files_say(
    run: Callable[..., list[dict[str, Any]]], place: Path, tmp_path: Path
) -> None:
    """Counts against a plain loop over the samples, and the first weights are exactly 1."""
    held_out = str(place / "held-out.jsonl")
    options = ("--rounds", "2", "--max-per-prompt", "2", "--eval-prompts", held_out)
    rows = run(*options, "--eval-samples", "2", "--no-stop-early")
    prompts = [row["prompt"] for row in lines(place / "prompts.jsonl")]
    for number in (1, 2):
        folder = tmp_path / "loop" / f"round-{number}"
        samples = lines(folder / "generations.jsonl")
        assert len(samples) == SAMPLES * len(prompts)
        right, kept = Counter[int](), list[tuple[str, str]]()
        for each in samples:
            question = int(each["id"])
            if each["stopped"] and score(each["text"], prompts[question]):
                right[question] += 1
                pair = prompts[question], each["text"]
                mine = [text for prompt, text in kept if prompt == prompts[question]]
                if each["text"] and pair not in kept and len(mine) < 2:
                    kept.append(pair)
        trained = lines(folder / "rows.jsonl")
        found = [(r["messages"][0]["content"], r["messages"][1]["content"]) for r in trained]
        assert found == kept
        row = rows[number]
        assert row["pass_rate"] == pytest.approx(sum(right.values()) / len(samples))
        assert row["solved"] == len(right) / len(prompts)
        assert row["kept"] == len(kept) / len(samples)
        assert row["length"] == sum(each["tokens"] for each in samples) / len(samples)
        (metrics,) = folder.glob("training/llm/round/iw-sft/seed-0/metrics.jsonl")
        first = next(each for each in lines(metrics) if "loss" in each)
        assert (first["ESS"], first["weight_max"], first["weight_mean"]) == (1, 1, 1)
        # Held-out answers, with the same luck in each round.
        tests = lines(folder / "evaluation" / "scores.jsonl")
        assert row["score"] == sum(each["score"] or 0 for each in tests) / 10
        seeds = [each["seed"] for each in lines(folder / "evaluation" / "generations.jsonl")]
        start = tmp_path / "loop" / "round-0" / "evaluation" / "generations.jsonl"
        assert seeds == [each["seed"] for each in lines(start)]
    # The report has the loop, and does not take its rounds for runs.
    (recorded,) = read_loops(tmp_path)
    assert recorded.rows == rows and len(loop_grid(rows).rows) == 3
    assert read_all(tmp_path, LANGUAGE) == ([], [])
    page = write_report(tmp_path, tmp_path / "report").page.read_text()
    assert "pass rate: share of right answers" in page and "return: mean" not in page
    (record,) = json.loads((tmp_path / "report" / "runs.json").read_text())
    assert record["rounds"] == rows and record["algo"] == "iw-sft"
    # Its own options give the same loop.
    again = parse(["--config", str(tmp_path / "loop" / "config.json")], None)
    settings = recorded.config["settings"]
    assert settings | json.loads(json.dumps(again.settings)) == settings


def test_each_round_trains_new_adapters_on_the_model_of_the_last_one(
    run: Callable[..., list[dict[str, Any]]], place: Path, tmp_path: Path
) -> None:
    """By hand: W + 2 B A is what the next round starts from, also after a kill once it is there."""
    rows = run("--lora-rank", "4", "--rounds", "2")
    home, policy = tmp_path / "loop", place / "model"
    for number in (1, 2):
        training = home / f"round-{number}" / "training" / "llm" / "round" / "iw-sft" / "seed-0"
        first = next(each for each in lines(training / "metrics.jsonl") if "loss" in each)
        assert (first["ESS"], first["weight_max"], first["weight_mean"]) == (1, 1, 1)
        adapters = load_file(training / "checkpoint" / "adapter_model.safetensors")
        expected = load_file(policy / "model.safetensors")
        policy = home / rows[number]["policy"]
        for name, b in adapters.items():
            if ".lora_B." in name:
                layer = name.removeprefix("base_model.model.").replace("lora_B.", "")
                expected[layer] += 2 * b @ adapters[name.replace("lora_B", "lora_A")]
                assert b.any()
        torch.testing.assert_close(load_file(policy / "model.safetensors"), expected)
    whole = contents(home)
    (home / "round-2" / "fine_tune.json").unlink()
    run("--lora-rank", "4", "--rounds", "2", "--resume")
    assert contents(home) == whole


def test_a_round_of_sft_is_finetune_on_its_rows(
    run: Callable[..., list[dict[str, Any]]], place: Path, tmp_path: Path
) -> None:
    (_, row) = run("--algo", "sft")
    data = str(tmp_path / "loop" / "round-1" / "rows.jsonl")
    other = tmp_path / "other.jsonl"
    write(other, [{"prompt": "1+1=", "completion": "2"}])
    main(
        [
            *("--recipe", "chat", "--model", str(place / "model"), "--data", data, "--algo", "sft"),
            *("--eval-data", str(other), "--learning-rate", "0.003", "--batch-size", "4"),
            *("--max-length", "64", "--epochs", "1", "--out", str(tmp_path / "plain")),
            *("--jobs", "1"),
        ]
    )
    (plain,) = (tmp_path / "plain").glob("llm/chat/sft/seed-0/checkpoint/model.safetensors")
    ours = load_file(tmp_path / "loop" / row["policy"] / "model.safetensors")
    theirs = load_file(plain)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("start_from", ["last", "base"])
def test_replayed_rows_have_the_reference_of_their_own_round(
    run: Callable[..., list[dict[str, Any]]], place: Path, tmp_path: Path, start_from: str
) -> None:
    """By hand: log-probs of the model that wrote a row, and the weights of the first update."""
    options = ("--rounds", "2", "--keep-rounds", "1", "--start-from", start_from)
    rows = run(*options, "--batch-size", "100", "--no-self-normalize")
    second, home = Round(2, tmp_path / "loop", str(place / "model")), tmp_path / "loop"
    own = lines(home / "round-2" / "curated.jsonl")
    trained = lines(home / "round-2" / "rows.jsonl")
    first_model, second_model = str(place / "model"), second.policy
    start = second_model if start_from == "last" else first_model
    assert rows[2]["replayed"] == len(trained) - len(own) > 0
    weights = []
    for number, row in enumerate(trained):
        writer = second_model if number < len(own) else first_model
        given, logs = row.get("ref_log_probs"), log_probs(writer, row)
        # Training computes that of its own start.
        assert (given is None) == (start_from == "last" and number < len(own))
        if given is not None:
            torch.testing.assert_close(torch.tensor(given), logs, rtol=1e-4, atol=1e-5)
        ratio = log_probs(start, row) - logs
        weights.append(math.exp(ratio[logs != 0].mean()))
    (metrics,) = (home / "round-2").glob("training/llm/round/iw-sft/seed-0/metrics.jsonl")
    first = next(each for each in lines(metrics) if "loss" in each)
    assert first["weight_max"] == pytest.approx(max(weights), rel=1e-4)
    assert first["weight_mean"] == pytest.approx(sum(weights) / len(weights), rel=1e-4)


def log_probs(model: str, row: dict[str, Any]) -> torch.Tensor:
    """log p of the tokens of an answer and its end, 0 for those of the prompt."""
    words, decoder = (
        AutoTokenizer.from_pretrained(model),
        AutoModelForCausalLM.from_pretrained(model),
    )
    prompt, answer = (message["content"] for message in row["messages"])
    ids = words.encode(prompt) + [*words.encode(answer), words.eos_token_id]
    with torch.no_grad():
        logits = decoder(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    logs = logits.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)
    logs[: len(words.encode(prompt)) - 1] = 0
    return torch.cat([torch.zeros(1), logs])


@pytest.mark.parametrize("flags", [("nft", "--drop"), ("iw-sft-hard", "--q", "auto")])
def test_wrong_answers_are_rows_where_they_are_learned_from(
    run: Callable[..., list[dict[str, Any]]], tmp_path: Path, flags: tuple[str, ...]
) -> None:
    row = run("--algo", *flags)[1]
    rows = lines(tmp_path / "loop" / "round-1" / "rows.jsonl")
    judged = lines(tmp_path / "loop" / "round-1" / "scores.jsonl")
    right = sum(each["score"] or 0 for each in judged)
    assert 0 < sum(each["correct"] for each in rows) <= right
    assert any(not each["correct"] for each in rows) and row["steps"] > 0
    assert all(each["score"] == float(each["correct"]) for each in rows)


def test_kills_while_files_are_written_change_nothing(
    run: Callable[..., list[dict[str, Any]]],
    place: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """At more and more files, a kill just before or just after one has its name."""
    options = ("--eval-prompts", str(place / "held-out.jsonl"), "--save-every", "2")
    run(*options, out="whole")
    replace, calls, kills = os.replace, 0, 0

    def killing(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        now = calls == 2 + kills * (kills + 5) // 2
        if now and kills % 2:
            raise KeyboardInterrupt
        replace(source, target)
        if now:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killing)
    while True:
        try:
            run(*options, "--resume", out="killed")
            break
        except SystemExit as end:
            assert end.code == 130
            kills += 1
    assert kills >= 3
    monkeypatch.undo()
    whole, killed = (contents(tmp_path / name) for name in ("whole", "killed"))
    assert whole.keys() == killed.keys()
    assert [name for name in whole if whole[name] != killed[name]] == []


def contents(folder: Path) -> dict[str, Any]:
    """What a loop computes: all samples, scores, rows and facts without seconds, and weights."""
    files: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".jsonl" and path.name != "metrics.jsonl":
            files[name] = lines(path)
        elif path.name == "model.safetensors":
            files[name] = path.read_bytes()
        elif path.parent.name.startswith("round-") and path.suffix == ".json":
            files[name] = json.loads(path.read_text())["facts"]
    return files


def test_a_loop_without_a_right_answer_keeps_the_model(
    run: Callable[..., list[dict[str, Any]]],
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = run(verifier="never")
    assert "no prompt has a right answer" in rows[1]["stop"]
    assert rows[1]["left_out"] == {"all-wrong prompts": 8, "answers to all-wrong prompts": 48}
    said = capsys.readouterr()
    samples = lines(tmp_path / "loop" / "round-1" / "generations.jsonl")
    cut = sum(not each["stopped"] for each in samples)
    assert f"0 of 48 answers kept ({cut} reached --max-tokens" in said.err
    assert "so the model stays as it is" in said.err and str(place / "model") in said.out


def test_a_verifier_that_is_mended_or_changed_between_two_calls(
    run: Callable[..., list[dict[str, Any]]],
    place: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    module, first = place / "scripted_verifiers.py", tmp_path / "loop" / "round-1"

    def run_with(body: str, *flags: str) -> list[dict[str, Any]]:
        module.write_text(VERIFIERS.replace('raise KeyError("no such column")', body))
        return run("--resume", "--min-score", "0.5", "--epochs", "1", *flags, verifier="broken")

    try:
        with pytest.raises(SystemExit, match="verifier failed on .* KeyError: 'no such column'"):
            run("--min-score", "0.5", verifier="broken")
        samples = (first / "generations.jsonl").read_bytes()
        row = run_with("return 0")[1]
        assert row["verifier_failed"] == 0
        # A kill leaves a part of the scores: all are of the code of now.
        scores = first / "scores.jsonl"
        scores.write_text("".join(scores.read_text().splitlines(keepends=True)[:5]))
        (first / "score.json").unlink()
        (first / "curate.json").unlink()
        assert run_with("return 0.5")[1]["verifier_code"] != row["verifier_code"]
        assert {each["score"] for each in lines(scores)} == {0.5, None}
        assert "other code" not in capfd.readouterr().err
        run_with("return 0.6", "--rounds", "2")
        assert "round 2: other code scored the round before" in capfd.readouterr().err
    finally:
        module.write_text(VERIFIERS)
    assert (first / "generations.jsonl").read_bytes() == samples


def test_an_answer_without_a_verdict_is_never_right(
    run: Callable[..., list[dict[str, Any]]], place: Path, tmp_path: Path
) -> None:
    """Neither one that has no end nor one on which the verifier fails, whatever the scores are."""
    held_out = str(place / "held-out.jsonl")
    flags = ("--min-score", "-1", "--eval-prompts", held_out, "--eval-samples", "4")
    row = run(*flags, verifier="debt")[1]
    prompts = [each["prompt"] for each in lines(place / "prompts.jsonl")]
    samples = lines(tmp_path / "loop" / "round-1" / "generations.jsonl")
    right = {
        (each["id"], each["sample"])
        for each in samples
        if each["stopped"]
        and len(each["text"]) % 5
        and score(each["text"], prompts[int(each["id"])])
    }
    assert any(not each["stopped"] for each in samples) and row["verifier_failed"] > 0
    assert row["pass_rate"] == pytest.approx(len(right) / len(samples))
    texts = {each["text"] for each in samples if (each["id"], each["sample"]) in right}
    trained = lines(tmp_path / "loop" / "round-1" / "rows.jsonl")
    assert {each["messages"][1]["content"] for each in trained} <= texts
    tests = lines(tmp_path / "loop" / "round-1" / "evaluation" / "generations.jsonl")
    asked = [each["prompt"] for each in lines(place / "held-out.jsonl")]
    passed = [
        each["stopped"] and len(each["text"]) % 5 and score(each["text"], asked[int(each["id"])])
        for each in tests
    ]
    assert row["score"] == pytest.approx(sum(map(bool, passed)) / len(tests))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--max-tokens", "60"], "the prompt has .* 60 new ones do not fit .* context of 64"),
        (["--verifier", "integral"], "unknown verifier 'integral'; did you mean 'integer'"),
        (["--verifier", "no_module:f"], "there is no module no_module"),
        (["--verifier", "scripted_verifiers:gone"], "scripted_verifiers:gone does not load"),
        (["--verifier", "json:__name__"], "json:__name__ does not load .it is of type str"),
        (["--algo", "iwsft"], "unknown algorithm 'iwsft'; did you mean 'iw-sft'"),
        (["--algo", "sft-q", "--verifier", "integer"], "pass --quality pass-rate"),
        (["--normalize-data-weights"], "--normalize-data-weights True changes nothing in iw-sft"),
        (["--micro-batch-size", "3"], "--micro-batch-size 3 does not divide the 4 draws"),
        (["--eval-samples", "4"], "--eval-samples 4 changes nothing without --eval-prompts"),
        (["--verifier", "math", "--min-score", "0"], "gives 0 or 1, so it must be above 0"),
        (["--sampling-temperature", "0"], "--sampling-temperature 0.0: a finite number above 0"),
        (["--step-clip", "0.5", "2"], "--step-clip .* changes nothing in the algorithms"),
    ],
)
def test_bad_input_is_told_before_anything_is_generated(
    run: Callable[..., list[dict[str, Any]]], tmp_path: Path, flags: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        run(*flags)
    assert not (tmp_path / "loop").exists()


def test_held_out_prompts_and_settings_of_another_loop(
    run: Callable[..., list[dict[str, Any]]], place: Path
) -> None:
    with pytest.raises(SystemExit, match=r"8 of --eval-prompts are in --prompts too"):
        run("--eval-prompts", str(place / "prompts.jsonl"))
    run("--algo", "sft", verifier="never")
    with pytest.raises(SystemExit, match=r"other settings: algo='sft' \(now 'iw-sft'\)"):
        run("--resume", verifier="never")
    with pytest.raises(SystemExit, match=r"other settings: samples_per_prompt=6 \(now 7\)"):
        run("--algo", "sft", "--resume", "--samples-per-prompt", "7", verifier="never")
    with pytest.raises(SystemExit, match="a loop is there already; pass --resume"):
        run("--algo", "sft", verifier="never")
    template = place / "model" / "chat_template.jinja"
    kept = template.read_text()
    template.write_text(f"{kept} ")
    with pytest.raises(SystemExit, match="other settings: model='"):
        run("--algo", "sft", "--resume", verifier="never")
    template.write_text(kept)
    (place / "model" / "README.md").write_text("A card, which no run reads.")
    run("--algo", "sft", "--resume", verifier="never")
