"""The language loop: files, first weights, replayed references, kills, bad input."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_loop import SAMPLES, lines, score, write
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.llm.__main__ import main
from benchmarks.llm.loop.options import parse
from benchmarks.report.loops import loop_grid, read_loops
from benchmarks.report.page import write_report
from benchmarks.results import LANGUAGE, read_all
from iwsft.loop import Round


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


def test_the_number_format_of_the_first_model_is_no_effect_of_training(
    run: Callable[..., list[dict[str, Any]]], place: Path, tmp_path: Path
) -> None:
    half, held_out = tmp_path / "half", str(place / "held-out.jsonl")
    start = AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.bfloat16)
    start.save_pretrained(half)
    AutoTokenizer.from_pretrained(place / "model").save_pretrained(half)
    # So small a learning rate moves no weight.
    sampling = ("--eval-prompts", held_out, "--eval-samples", "8", "--learning-rate", "1e-12")
    run("--model", str(half), *sampling)
    before, after = (
        lines(tmp_path / "loop" / f"round-{number}" / "evaluation" / "generations.jsonl")
        for number in (0, 1)
    )
    assert before == after


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


@pytest.mark.parametrize(
    ("start_from", "adapters"), [("last", ()), ("base", ()), ("base", ("--lora-rank", "4"))]
)
def test_replayed_rows_have_the_reference_of_their_own_round(
    run: Callable[..., list[dict[str, Any]]],
    place: Path,
    tmp_path: Path,
    start_from: str,
    adapters: tuple[str, ...],
) -> None:
    """By hand: log-probs of the model that wrote a row, and the weights of the first update."""
    options = ("--rounds", "2", "--keep-rounds", "1", "--start-from", start_from)
    rows = run(*options, *adapters, "--batch-size", "100", "--no-self-normalize")
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


@cache
def loaded(model: str) -> tuple[Any, Any]:
    """The tokenizer and the model of a folder."""
    return AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model)


def log_probs(model: str, row: dict[str, Any]) -> torch.Tensor:
    """log p of the tokens of an answer and its end, 0 for those of the prompt."""
    words, decoder = loaded(model)
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


def test_a_loop_goes_on_where_it_was_moved_to(
    run: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    run("--rounds", "2")
    whole, place = contents(tmp_path / "loop"), "another place/100 % ü"
    # As a kill during the test of the second training leaves it.
    for name in ("fine_tune.json", "evaluate.json"):
        (tmp_path / "loop/round-2" / name).unlink()
    (tmp_path / "loop/round-2/training/llm/round/iw-sft/seed-0/result.json").unlink()
    os.renames(tmp_path / "loop", tmp_path / place)
    run("--rounds", "2", "--resume", out=place)
    assert contents(tmp_path / place) == whole


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
    with pytest.raises(SystemExit, match=r"--eval-prompts has prompts of --prompts \(rows: 8;"):
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
