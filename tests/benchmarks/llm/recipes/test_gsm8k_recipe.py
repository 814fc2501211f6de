"""Labelled solutions: rows, the split, and how far a model prefers right ones to wrong ones."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.llm.models import mean_log_probs
from benchmarks.llm.recipes import Sources, load_recipe
from benchmarks.llm.recipes.chat import Group, by_prompt
from benchmarks.llm.recipes.gsm8k import BUNDLED, RECIPE, Gsm8kRecipe
from iwsft.datasets.text.rows import Row
from iwsft.language import correct_only, tokenize
from iwsft.trajectory import lengths


def _question(number: int, labels: str) -> Group:
    return [
        Row(
            f"{number}.{k}",
            prompt=f"Question {number}?\n",
            completion=f"{label} {k}",
            correct=label == "r",
        )
        for k, label in enumerate(labels)
    ]


def _read(source: Path) -> list[Group]:
    return by_prompt(RECIPE.read(str(source)))


def test_the_bundled_lines_are_those_of_the_source():
    record = json.loads(BUNDLED.with_suffix(".json").read_text())
    assert hashlib.sha256(BUNDLED.read_bytes()).hexdigest() == record["sha256"]
    assert BUNDLED.stat().st_size == record["bytes"] < 1_000_000
    assert (BUNDLED.parent / "gsm8k-LICENSE").read_text().startswith("MIT License")
    questions = _read(BUNDLED)
    assert len(questions) == record["questions"] == 400
    assert [len(question) for question in questions] == [4] * 400


def test_labels_agree_with_the_last_line_and_the_known_answer():
    lines = [json.loads(line) for line in BUNDLED.read_text().splitlines()]
    for line, question in zip(lines, _read(BUNDLED), strict=True):
        truth = _last_number(line["ground_truth"])
        for row in question:
            assert row.completion is not None
            if row.correct:
                assert _last_number(row.completion) == truth
            else:
                assert _last_number(row.completion) != truth


def _last_number(text: str) -> float | None:
    found = re.findall(r"^A: *\$?(-?[\d,]*\.?\d+)", text, flags=re.M)
    return float(found[-1].replace(",", "")) if found else None


def test_rows_hold_the_solutions_without_the_calculators_marks():
    first, second = _read(BUNDLED)[:2]
    assert first[0].prompt.startswith("Question: Janet’s ducks lay 16 eggs per day.")
    assert first[0].prompt.endswith("at the farmers' market?\nAnswer:\n")
    assert first[0].completion == (
        "Janet eats 3 ducks eggs for breakfast every morning and she sells the rest so she has "
        "16 - 3 = 13 ducks eggs left\n"
        "She has 13 ducks eggs and she sells 2 each day so she makes 13 * 2 = $26\nA: 26"
    )
    assert [row.correct for row in first] == [False, False, False, True]
    assert [row.correct for row in second] == [True, True, False, True]
    assert first[3].where.endswith("gsm8k-solutions.jsonl:1, 175b_verification")
    assert sorted(bool(row.correct) for row in first) == [False, False, False, True]


def test_only_questions_that_tell_apart_are_held_out() -> None:
    questions = [_question(k, ["rw", "rrww", "rr", "ww"][k % 4]) for k in range(400)]
    training, held_out = RECIPE.split([row for group in questions for row in group], 0.25)
    assert len(held_out) == 50
    assert all({row.correct for row in question} == {True, False} for question in held_out)
    assert {row.prompt for row in training} | {q[0].prompt for q in held_out} == {
        question[0].prompt for question in questions
    }
    with pytest.raises(ValueError, match=r"leaves 0 of 0 prompts to test on, and 16 rows"):
        RECIPE.split([row for k in range(8) for row in _question(k, "rr")], 0.25)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"question": "?"}, r"x.jsonl:1: needs a question, and for a model"),
        (
            {"question": " ", "a": {"is_correct": True, "solution": "1"}},
            r"x.jsonl:1: needs a question",
        ),
        ({"question": "?", "a": {"is_correct": True, "solution": " "}}, r":1, a: the completion"),
        ({"question": "?", "a": {"is_correct": "x", "solution": "1"}}, r":1, a: correct must be"),
        ({"question": "?", "a": {"is_correct": None, "solution": "1"}}, r":1, a: a labelled"),
        ({"prompt": "?", "completion": "1"}, r":1: a labelled solution has 'prompt'"),
        ({"text": "?"}, r":1: column 'prompt' is missing"),
    ],
)
def test_records_that_are_not_labelled_solutions(
    record: dict[str, object], message: str, tmp_path: Path
):
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=message):
        RECIPE.read(str(file))


def test_mean_log_probs_are_those_of_the_plain_model(tiny_qwen2: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    rows = RECIPE.read(str(BUNDLED))[:12]
    model.train()
    found = mean_log_probs(model, tokenizer, rows, token_budget=2000)
    assert model.training
    assert found.shape == (12,)
    for row, value in zip(rows, found, strict=True):
        assert row.completion is not None
        prompt = tokenizer(row.prompt)["input_ids"]
        ids = prompt + tokenizer(row.completion)["input_ids"] + [tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        each = [logits[t - 1, ids[t]].item() for t in range(len(prompt), len(ids))]
        assert value == pytest.approx(np.mean(each), abs=1e-5)
    # Batches change nothing, nor does the order of the rows.
    alone = mean_log_probs(model, tokenizer, rows[::-1], token_budget=1)
    np.testing.assert_allclose(alone[::-1], found, atol=1e-5)


def test_a_log_probability_that_is_not_finite_names_its_row(tiny_qwen2: Path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    config = AutoConfig.from_pretrained(tiny_qwen2, tie_word_embeddings=False)
    model = AutoModelForCausalLM.from_config(config)
    question = _question(1, "rwrw")
    rows = [*question[:3], replace(question[3], completion="Z!")]
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("Z")] = float("nan")
    with pytest.raises(ValueError, match=r"1\.3: its log-probability is not finite"):
        mean_log_probs(model, tokenizer, rows, token_budget=1)


def test_the_recipe_prepares_trains_and_tests(tiny_qwen2: Path, tmp_path: Path):
    recipe = load_recipe("gsm8k")
    prepared = recipe.prepare(tmp_path, Sources(model=str(tiny_qwen2)), seed=0)
    assert prepared.model == str(tiny_qwen2)
    assert prepared.notes["tested"] == prepared.notes["held_out"] == 53
    assert prepared.notes["prompts"] + prepared.notes["held_out"] == 400
    assert prepared == recipe.prepare(tmp_path, Sources(model=str(tiny_qwen2)), seed=1)
    asked = {row.prompt for row in prepared.rows}
    assert not asked & {question[0].prompt for question in prepared.held_out}
    # In another order, among others, the same questions are held out.
    digest = [
        hashlib.sha256(" ".join(q[0].prompt.split()).encode()).digest() for q in prepared.held_out
    ]
    assert digest == sorted(digest) and max(digest) < b"\x40"

    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    before = recipe.evaluate(model, tokenizer, prepared, seed=0)
    assert before == recipe.evaluate(model, tokenizer, prepared, seed=0)
    assert 0 <= before["interval"][0] < before["score"] < before["interval"][1] <= 1
    assert before["n"] == 53
    good = correct_only(tokenize(prepared.rows, tokenizer).trajectories)
    assert len(lengths(good)) == round(prepared.notes["right"] * prepared.notes["rows"])


def test_training_on_the_held_out_right_solutions_raises_the_score(
    tiny_qwen2: Path, tmp_path: Path
):
    recipe = Gsm8kRecipe(tested=4)
    prepared = recipe.prepare(tmp_path, Sources(model=str(tiny_qwen2)), seed=0)
    model = AutoModelForCausalLM.from_pretrained(tiny_qwen2)
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen2)
    before = recipe.evaluate(model, tokenizer, prepared, seed=0)
    texts = [
        row.prompt + (row.completion or "")
        for question in prepared.held_out
        for row in question
        if row.correct
    ]
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for step in range(60):
        ids = tokenizer(texts[step % len(texts)], return_tensors="pt")["input_ids"]
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
    after = recipe.evaluate(model, tokenizer, prepared, seed=0)
    assert after["right_log_prob"] > before["right_log_prob"] + 1
    assert after["margin"] > before["margin"]
    assert after["score"] >= before["score"]
