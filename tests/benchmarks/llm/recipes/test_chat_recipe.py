"""Anybody's rows: what is held out, the figures, the saved model with its card, and bad input."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict
from torch.nn.functional import log_softmax
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.llm.__main__ import main
from benchmarks.llm.generators import load_prompter
from benchmarks.llm.recipes.chat import (
    RECIPE,
    ChatRecipe,
    Group,
    by_prompt,
    check_apart,
    read_rows,
    right_against_wrong,
)
from benchmarks.statistics import interval_over_questions, t_interval
from iwsft.datasets.text.rows import Row, to_row
from iwsft.language import tokenize

FAST = {"--learning-rate": "0.003", "--max-steps": "6", "--jobs": "1"}


def chat(a: int, b: int, **more: Any) -> dict[str, Any]:
    """A conversation on a sum."""
    messages = [
        {"role": "system", "content": "Add."},
        {"role": "user", "content": f"{a}+{b}?"},
        {"role": "assistant", "content": f"It is {a + b}."},
    ]
    return {"messages": messages, **more}


def write(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


THANKS = [
    {"role": "assistant", "content": "Seven."},
    {"role": "user", "content": "Thanks."},
    {"role": "assistant", "content": "Welcome."},
]
NEGATIVE = [chat(k, 3) | {"weight": -0.5 if k else 1} for k in range(20)]
SCORED = [chat(k, 3, score=k / 40) for k in range(40)]


@pytest.fixture
def finetune(
    tiny_qwen2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """``finetune(rows, flag, ...)``: the command on rows or a source; what it prints."""

    def run(rows: Any, *flags: str) -> str:
        data = rows if isinstance(rows, str) else write(tmp_path / "rows.jsonl", rows)
        words = {"--recipe": "chat", "--model": str(tiny_qwen2), "--data": data, **FAST}
        words["--out"] = str(tmp_path / "runs")
        own = [word for pair in words.items() if pair[0] not in flags for word in pair]
        main([*own, *flags])
        return capsys.readouterr().out

    return run


def _mean_log_prob(model: Any, tokenizer: Any, row: dict[str, Any]) -> float:
    """Mean log p of the tokens of the answer and its end, without a library."""
    text = tokenizer.apply_chat_template(row["messages"], tokenize=False)
    start = text.index("assistant\n") + len("assistant\n")
    stop = text.index("<|im_end|>", start) + len("<|im_end|>")
    prompt, answer = (tokenizer(part)["input_ids"] for part in (text[:start], text[start:stop]))
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0].double()
    log_prob = log_softmax(logits, -1)
    places = range(len(prompt) - 1, len(prompt) + len(answer) - 1)
    return float(np.mean([float(log_prob[t, y]) for t, y in zip(places, answer, strict=True)]))


@pytest.mark.parametrize("adapters", [(), ("--lora-rank", "4")], ids=["all weights", "lora"])
def test_it_ends_in_a_model_a_table_a_figure_and_a_card(
    finetune: Callable[..., str], tiny_qwen2: Path, tmp_path: Path, adapters: Any, figures: None
) -> None:
    held_out = [chat(k, 50) for k in range(4)]
    evaluated = write(tmp_path / "held.jsonl", held_out)
    printed = finetune(SCORED, "--algo", "iw-sft-q", "--eval-data", evaluated, *adapters)
    folder = tmp_path / "runs" / "llm" / "chat"
    assert (folder / "report" / "index.html").exists()
    place = folder / "iw-sft-q" / "seed-0" / "checkpoint"
    assert (place / "adapter_model.safetensors").exists() == bool(adapters)
    # What the next command asks for.
    assert f"evaluate --model {place} --tasks NAME=FILE" in printed
    asked, base = (load_prompter(str(each)) for each in (place, tiny_qwen2))
    assert (asked.stop, asked.context) == (base.stop, base.context)
    if adapters:
        problem = f"holds adapters of {tiny_qwen2}; merge them .* pass DIR"
        with pytest.raises(SystemExit, match=problem):
            finetune(SCORED, "--model", str(place), "--out", str(tmp_path / "more"))

    # As the card says, from any folder.
    card = (place / "README.md").read_text()
    code = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)[0]
    space: dict[str, Any] = {}
    exec(code.replace('"."', repr(str(place))), space)
    start = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    before, after = (
        np.array([_mean_log_prob(model.eval(), space["tokenizer"], row) for row in held_out])
        for model in (start, space["model"])
    )
    assert after.mean() > before.mean() + 0.1
    results = [
        json.loads((folder / algo).read_text())
        for algo in ("base/seed-0/result.json", "iw-sft-q/seed-0/result.json")
    ]
    for result, log_probs in zip(results, (before, after), strict=True):
        assert sorted(result["log_probs"]) == pytest.approx(sorted(log_probs), abs=1e-5)
        assert result["log_prob"] == pytest.approx(log_probs.mean(), abs=1e-5)
        assert result["score"] == pytest.approx(np.exp(log_probs.mean()), rel=1e-5)
        assert result["interval"][0] <= result["score"] <= result["interval"][1]
        assert result["n"] == 4
    change = f"{(after - before).mean():+.3f}"
    assert f"change {change} (95 % interval" in printed and f"change {change}" in card
    assert all(words in card for words in (str(tiny_qwen2), "D_Q+", "6 updates of 8 rows"))
    again = finetune(SCORED, "--algo", "iw-sft-q", "--eval-data", evaluated, *adapters, "--resume")
    assert "0 done, 2 finished before" in again


def test_the_number_format_of_the_files_is_no_effect_of_training(
    finetune: Callable[..., str], tiny_qwen2: Path, tmp_path: Path
) -> None:
    half = tmp_path / "half"
    start = AutoModelForCausalLM.from_pretrained(tiny_qwen2, dtype=torch.bfloat16)
    start.save_pretrained(half)
    AutoTokenizer.from_pretrained(tiny_qwen2).save_pretrained(half)
    # So small a learning rate moves no weight.
    finetune(SCORED, "--algo", "sft", "--model", str(half), "--learning-rate", "1e-12")
    folder = tmp_path / "runs" / "llm" / "chat"
    base, trained = (
        json.loads((folder / algo / "seed-0" / "result.json").read_text())["log_probs"]
        for algo in ("base", "sft")
    )
    assert base == trained


def test_rows_that_change_while_runs_are_at_work(
    finetune: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluate = ChatRecipe.evaluate

    def changing(*args: Any, **options: Any) -> Any:
        write(tmp_path / "rows.jsonl", SCORED[:30])
        return evaluate(*args, **options)

    monkeypatch.setattr(ChatRecipe, "evaluate", changing)
    finished = tmp_path / "runs" / "llm" / "chat"
    with pytest.raises(SystemExit):
        finetune(SCORED, "--algo", "sft")
    assert len([*finished.rglob("result.json")]) == 1
    # With the rows of the beginning the other one follows.
    assert "1 done, 1 finished before" in finetune(SCORED, "--algo", "sft", "--resume")


def test_a_prompt_is_held_out_as_a_whole_whatever_the_order() -> None:
    rows = [
        Row(f"{k}.{way}", prompt=f" ask  {k}", completion=way, correct=way != "no" or None)
        for k in range(30)
        for way in ("yes", "no", "maybe")
    ]
    training, held_out = RECIPE.split(rows, 0.2)
    assert [len(group) for group in held_out] == [3] * 6
    chosen = {group[0].prompt for group in held_out}
    assert {row.prompt for row in training} == {row.prompt for row in rows} - chosen
    again = RECIPE.split(rows[::-1], 0.2)[1]
    assert [group[0].prompt for group in again] == [group[0].prompt for group in held_out]
    # Rows without a prompt are apart; conversations that begin alike are not.
    plain = [Row(str(k), prompt="", completion=f"text {k}") for k in range(4)]
    talks = [to_row(chat(1, 1), "a"), to_row(chat(1, 1, score=2), "b"), to_row(chat(1, 2), "c")]
    assert [len(group) for group in by_prompt([*plain, *talks])] == [1, 1, 1, 1, 2, 1]
    # Neither white space nor other keys of a message make another question.
    other = [{**m, "id": 3, "content": m["content"] + "\n"} for m in chat(1, 1)["messages"]]
    rows = [*talks, to_row({"messages": other}, "d")]
    assert [len(group) for group in by_prompt(rows)] == [3, 1]


def test_a_prompt_with_another_answer_is_not_held_out() -> None:
    training = [Row("a:1", prompt="1+1?", completion="2"), to_row(chat(3, 4), "a:2")]
    training += [Row("a:3", prompt="", completion="Once")]
    for other, twin in (
        (Row("b:1", prompt=" 1+1? ", completion="two"), "a:1"),
        (to_row({"messages": [{"role": "user", "content": "1+1?\n"}, *THANKS]}, "b:1"), "a:1"),
        (to_row({"messages": [*chat(3, 4)["messages"][:2], *THANKS]}, "b:1"), "a:2"),
        (Row("b:1", prompt="", completion="Once"), "a:3"),
    ):
        told = rf"^--eval-data has prompts of --data \(rows: 1; b:1 has that of {twin}\)"
        with pytest.raises(ValueError, match=told):
            check_apart(training, [Row("b:0", prompt="", completion="Twice"), other])
    # Texts without a prompt have none in common, and neither have questions on one instruction.
    check_apart(training, [Row("b:1", prompt="", completion="Twice"), to_row(chat(3, 5), "b:2")])


def test_a_source_may_name_its_split(tmp_path: Path) -> None:
    parts = {name: [{"prompt": name, "completion": "x"}] for name in ("train", "test_sft")}
    folder = str(tmp_path / "both")
    DatasetDict({name: Dataset.from_list(part) for name, part in parts.items()}).save_to_disk(
        folder
    )
    assert [row.prompt for row in read_rows(f"{folder}:test_sft")] == ["test_sft"]
    assert [row.prompt for row in read_rows(folder)] == ["train"]


def test_a_split_may_be_a_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    read = Mock()
    monkeypatch.setattr("iwsft.datasets.text.rows.read", read)
    read_rows("a/b:train[:10]:main")
    with pytest.raises(ValueError, match="a/b:c:d:e: a dataset is NAME, NAME:SPLIT or NAME:"):
        read_rows("a/b:c:d:e")
    read.assert_called_once_with("a/b", split="train[:10]", config="main")


LABELLED = [
    {"prompt": f"{k}?", "completion": way, "correct": way == "yes"}
    for k in range(20)
    for way in ("yes", "no")
]


def test_wrong_answers_are_compared_and_do_not_count(
    finetune: Callable[..., str], tmp_path: Path
) -> None:
    finetune(LABELLED, "--algo", "iw-sft", "--eval-share", "0.2")
    folder = tmp_path / "runs" / "llm" / "chat"
    before, after = (
        json.loads((folder / algo / "seed-0" / "result.json").read_text())
        for algo in ("base", "iw-sft")
    )
    assert after["trajectories"] == 16 and after["n"] == 4
    assert after["log_prob"] == pytest.approx(after["right_wrong_right_log_prob"])
    assert after["right_wrong_margin"] > before["right_wrong_margin"]


def test_one_prompt_has_no_interval(finetune: Callable[..., str], tmp_path: Path) -> None:
    printed = finetune([chat(k, 50) for k in range(10)], "--algo", "iw-sft", "--max-steps", "1")
    assert "no interval, prompts: 1" in printed.replace("\n", " ")
    (card,) = (tmp_path / "runs").rglob("seed-0/checkpoint/README.md")
    assert "(no interval)" in card.read_text()


def test_columns_that_are_not_read_and_cuts_are_told_once(
    finetune: Callable[..., str], recwarn: pytest.WarningsRecorder
) -> None:
    rows = [{**chat(k, 3), "id": k} for k in range(20)]
    finetune(rows, "--algo", "base", "sft", "--max-length", "26")
    told = [str(each.message) for each in recwarn]
    for words in ("not read: 'id'", ": max_length=26 cut 2 of", "max_length=26 cut 18 of"):
        assert sum(words in each for each in told) == 1


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        ([chat(k, 3) for k in range(20)], "--algo sft-q", "sft-q cuts by score, but .*no score"),
        ([chat(k, 3, score=1) for k in range(20)], "--algo iw-sft-q", "all .* scores are 1"),
        (SCORED, "--eval-share 0.01", "0.01 leaves 0 of 40 prompts to test on"),
        (SCORED, "--eval-share 0.99", "leaves 40 of 40 prompts to test on, and 0 rows"),
        (SCORED, "--eval-share 1", "--eval-share 1.0: above 0 and below 1"),
        (SCORED, "--eval-data ROWS", r"--eval-data has prompts of --data \(rows: 40;"),
        (SCORED, "--eval-data ROWS --eval-share 0.5", "pass one of them"),
        (SCORED, "--model nowhere/at-all", "there is no folder nowhere/at-all"),
        (SCORED, "--model nowhere/at/all", "there is no model folder nowhere/at/all"),
        ([dict(row, correct=False) for row in SCORED], "", r"all rows are wrong .* rows: 40\)"),
        ([{"text": "a"}], "", "rows.jsonl:1: column 'prompt' is missing"),
        (SCORED, "--lora-rank 0", "--lora-rank 0: at least 1"),
        (NEGATIVE, "--algo iw-sft", "rows.jsonl:2: the weight is negative, .* --no-self-normalize"),
        (NEGATIVE, "--algo dft sft", "rows.jsonl:2: the weight is negative, and the loss of sft"),
        (
            [dict(row, correct=row == SCORED[0]) for row in SCORED],
            "--eval-share 0.9",
            "and 0 rows to train on, 39 wrong ones aside",
        ),
    ],
)
def test_bad_input_is_refused_in_one_line_and_leaves_nothing(
    rows: Any,
    flags: str,
    message: str,
    finetune: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    words = flags.replace("ROWS", str(tmp_path / "rows.jsonl")).split()
    with pytest.raises(SystemExit, match=rf"^error: .*{message}.*") as end:
        finetune(rows, *words)
    assert "\n" not in str(end.value)
    assert not [*tmp_path.rglob("config.json")]


def test_rows_of_a_split_of_a_folder_are_digested_too(
    finetune: Callable[..., str], tmp_path: Path
) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    write(folder / "test.jsonl", SCORED)
    finetune(f"{folder}:test", "--algo", "sft")
    write(folder / "test.jsonl", SCORED[1:])
    with pytest.raises(SystemExit, match=r"settings\.data_sha256"):
        finetune(f"{folder}:test", "--algo", "sft", "--resume")


def test_rows_are_tokenised_once_before_the_runs_whatever_is_checked(
    tiny_qwen2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(tmp_path / "rows.jsonl", SCORED[:20])
    calls: list[int] = []

    def counted(rows: Any, *args: Any, **options: Any) -> Any:
        calls.append(len(rows))
        return tokenize(rows, *args, **options)

    monkeypatch.setattr("benchmarks.llm.curation.tokenize", counted)
    words = ["--recipe", "round", "--model", str(tiny_qwen2), "--data", data, "--jobs", "1"]
    words += ["--algo", "sft", "iw-sft", "--epochs", "1", "--warmup", "1"]
    main([*words, "--out", str(tmp_path)])
    # Once for both algorithms, and once more in each run.
    assert calls == [20] * 3


def test_a_warm_up_ends_within_the_updates_that_epochs_give(
    tiny_qwen2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write(tmp_path / "rows.jsonl", SCORED[:20])
    # Batches of 8 of 20 rows are 3 updates an epoch.
    words = ["--recipe", "round", "--model", str(tiny_qwen2), "--data", data, "--algo", "sft"]

    def run(name: str, *flags: str) -> Path:
        main([*words, "--jobs", "1", "--out", str(tmp_path / name), *flags])
        return tmp_path / name / "llm" / "round" / "sft" / "seed-0"

    few = ("6 updates never reach", "1 update never reaches")
    for told, flags in zip(
        few, ("--epochs 2 --warmup 6", "--epochs 0.2 --warmup 0.5"), strict=True
    ):
        with pytest.raises(SystemExit, match=f"a warm-up of .*: {told} --learning-rate"):
            run("refused", *flags.split())
    assert not [*(tmp_path / "refused").rglob("config.json")]
    longest = run("longest", "--epochs", "2", "--warmup", "5")
    assert json.loads((longest / "result.json").read_text())["steps"] == 6
    assert "never reach" not in capsys.readouterr().err
    # The recipe's own is told: here the one update has the learning rate 0.
    own = run("own", "--epochs", "0.2")
    assert "sft seed 0: a warm-up of 0.05: 1 update never reaches" in capsys.readouterr().err
    start, *ends = (
        AutoModelForCausalLM.from_pretrained(place).state_dict()
        for place in (tiny_qwen2, own / "checkpoint", longest / "checkpoint")
    )
    same = [all(torch.equal(start[name], end[name]) for name in start) for end in ends]
    assert same == [True, False]


def test_what_has_no_default_is_asked_for() -> None:
    for words, message in (
        ("--recipe chat --data x.jsonl", "--model is missing; the recipe chat has none"),
        ("--recipe chat --model x", "--data is missing; the recipe chat has none"),
        ("--eval-share 0.5", "--eval-share 0.5 changes nothing in recipe arithmetic"),
    ):
        with pytest.raises(SystemExit, match=message):
            main(words.split())


def _question(number: int, labels: str) -> Group:
    return [
        Row(str(k), prompt=f"{number}?", completion=f"{label} {k}", correct=label == "r")
        for k, label in enumerate(labels)
    ]


def _paired(questions: list[Group], values: Any) -> list[tuple[Group, Any]]:
    ends = np.cumsum([len(question) for question in questions])[:-1]
    return list(zip(questions, np.split(values, ends), strict=True))


def test_right_against_wrong_by_hand():
    questions = [_question(0, "rw"), _question(1, "rrw"), _question(2, "wrw")]
    values = np.array([-1.0, -2.0, -1.0, -3.0, -2.0, -1.0, -1.0, -4.0])
    found = right_against_wrong(_paired(questions, values))
    # Pairs won: 1 of 1, 1 of 2, (1/2 + 1) of 2.
    assert found["score"] == pytest.approx((1 + 0.5 + 0.75) / 3)
    # Margins 1, 0 and 1.5.
    assert found["margin"] == pytest.approx(2.5 / 3)
    assert found["right_likelier"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert found["right_log_prob"] == pytest.approx((-1 - 2 - 1) / 3)
    assert found["wrong_log_prob"] == pytest.approx((-2 - 2 - 2.5) / 3)
    assert found["n"] == 3
    assert found["interval"] == interval_over_questions([1, 0.5, 0.75], answers=3)
    assert found["margin_interval"] == t_interval([1, 0, 1.5])
    assert found["of_prompts"] == {"score": [1, 0.5, 0.75], "margin": [1, 0, 1.5]}


def test_auc_is_that_of_pairs_by_brute_force():
    source = np.random.default_rng(0)
    questions = [_question(k, "rwrw"[: 2 + k % 3]) for k in range(40)]
    values = source.normal(size=sum(len(question) for question in questions)).round(1)
    found = right_against_wrong(_paired(questions, values))
    shares, left = [], list(values)
    for question in questions:
        mine = [(row.correct, left.pop(0)) for row in question]
        pairs = [(a, b) for is_right, a in mine if is_right for other, b in mine if not other]
        shares.append(sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs))
    assert found["score"] == pytest.approx(np.mean(shares))
