"""Prompts of the language loop, and the verifiers that compare with their answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from benchmarks.llm.loop.job import describe_twins, describe_unread
from benchmarks.llm.loop.prompts import Prompt, read_prompts
from benchmarks.llm.loop.verifiers import Verifier
from iwsft.language import read, tokenize
from iwsft.language.generations import Prompter
from iwsft.trajectory import ASSISTANT_MASK, TOKENS
from tests.datasets.text.chat_tokenizers import byte_level

ODD = """
import math, time

def odd(text, row):
    if text == "hang":
        time.sleep(60)
    return {"none": None, "nan": math.nan, "text": "1", "true": True}.get(text, 0.5)
"""


@pytest.mark.parametrize(
    ("name", "answer", "text", "expected"),
    [
        ("integer", "18", "So 9 + 9. Answer: 18.", (1, "18")),
        ("integer", "#### 1,018", "The answer is 18", (0, "18")),
        ("integer", "18", "I do not know", (0, None)),
        ("choice", "B", "Answer: (B)", (1, "B")),
        ("exact", "to be", " to  be ", (1, " to  be ")),
        ("exact", "to be", "not to be", (0, "not to be")),
        *(
            ("exact", own, f"Answer: {own}", (1, own))
            for own in ("it\u2019s", "10 m\u00b2", "Bern \u2013 Basel", "U.S. Army", "Rock (music)")
        ),
        ("exact", "Washington, D.C.", "The answer is Washington, D.C.", (1, "Washington, D.C.")),
        ("exact", "U.S. Army", "Answer: U.S. Navy", (0, "U.S. Navy")),
        ("exact", "Yes", "Answer: Yes, because it is", (1, "Yes")),
        ("exact", "Paris", r"\boxed{\text{Paris}}", (1, r"\text{Paris}")),
        ("exact", "Paris", "<think>Rome? No.</think>Paris", (1, "Paris")),
        ("exact", "The answer is 4", "The answer is 4", (1, "The answer is 4")),
        ("math", r"\frac{1}{2}", r"\boxed{\dfrac{1}{2}}", (1, r"\dfrac{1}{2}")),
    ],
)
def test_named_verifiers(
    tmp_path: Path, name: str, answer: str, text: str, expected: tuple[int, str | None]
) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"problem": "?", "answer": answer}))
    (prompt,) = read_prompts(str(tmp_path / "rows.jsonl"), name)
    with Verifier(name) as verifier:
        assert verifier.verify(prompt, text)[:2] == expected


@pytest.mark.parametrize("marks", [{}, {"train": True}, {"loss_weight": 1, "weight": 2}])
def test_only_the_answer_is_trained_where_the_prompt_has_turns_of_the_assistant(
    marks: dict[str, Any],
) -> None:
    turns: list[dict[str, Any]] = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "3", **marks},
        {"role": "user", "content": "2+2?"},
    ]
    prompt = Prompt("0", "here", tuple(turns), {})
    tokenizer = byte_level()
    data = tokenize(read([prompt.to_row("4", chat=True)]), tokenizer).trajectories
    trained = data.get(TOKENS)[data.get(ASSISTANT_MASK)]
    assert tokenizer.decode(trained) == "4<|im_end|>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "1+1="}, "jsonl.*there is no answer"),
        ({"prompt": "1+1=", "answer": "two"}, "the answer is 'two'; --verifier wants a whole"),
        (
            {"prompt": "1+1=", "answer": ["2"]},
            r"must be text or a finite number, it is \['2",
        ),
        ({"prompt": "1+1=", "answer": True}, "must be text or a finite number, it is True"),
        ({"text": "1+1=", "answer": "2"}, "a prompt is text or messages, in a column"),
        ({"messages": [{"role": "assistant", "content": "2"}]}, "ends with an assistant's"),
        ({"prompt": " ", "answer": "2"}, "the prompt is empty"),
    ],
)
def test_rows_that_are_no_prompts(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=message):
        read_prompts(str(tmp_path / "rows.jsonl"), "integer")


def test_prompts_that_are_there_twice_are_told(tmp_path: Path) -> None:
    rows = [("1+1=", "2"), ("1+2=", "3"), ("1+1=", "2"), ("1+2=", "4"), ("1+3=", "4")]
    entries = [json.dumps({"prompt": prompt, "answer": answer}) for prompt, answer in rows]
    # White space and other keys of a message do not make another question.
    turns = [{"role": "user", "content": "1+1=\n", "id": 7}]
    entries[2] = json.dumps({"messages": turns, "answer": "2"})
    (tmp_path / "rows.jsonl").write_text("\n".join(entries))
    prompts = read_prompts(str(tmp_path / "rows.jsonl"), "integer")
    told = describe_twins("rows.jsonl", prompts)
    assert told is not None and told.startswith("rows.jsonl has prompts with the text of an")
    assert "(rows: 2, with another answer: 1)" in told and told.endswith("jsonl:3")
    assert describe_twins("", [*prompts[:2], prompts[4]]) is None


def test_prompts_that_differ_in_a_call_of_a_tool_are_two(tmp_path: Path) -> None:
    calls = [
        {"role": "assistant", "content": "", "tool_calls": [{"name": name}]}
        for name in ("add", "multiply", "add")
    ]
    question = {"role": "user", "content": "And?"}
    entries = [json.dumps({"messages": [call, question], "answer": "2"}) for call in calls]
    (tmp_path / "rows.jsonl").write_text("\n".join(entries))
    prompts = read_prompts(str(tmp_path / "rows.jsonl"), "integer")
    assert describe_twins("", prompts[:2]) is None
    assert "(rows: 1, with" in (describe_twins("", prompts) or "")


def test_what_a_verifier_of_the_users_own_may_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "odd_verifiers.py").write_text(ODD)
    monkeypatch.syspath_prepend(tmp_path)
    prompt = Prompt("0", "", "1+1=", {"prompt": "1+1="})
    with Verifier("odd_verifiers:odd", seconds=1) as verifier:
        for text, expected, problem in (
            ("half", 0.5, None),
            ("true", 1.0, None),
            ("none", None, "TypeError"),
            ("nan", None, "not a finite number"),
            ("text", None, "not a finite number"),
            ("hang", None, "no verdict in 1 s"),
            ("half", 0.5, None),
        ):
            verdict = verifier.verify(prompt, text)
            assert verdict.score == expected
            assert (verdict.problem is None) if problem is None else problem in str(verdict.problem)


def test_parts_of_a_question_that_the_prompt_lacks_are_told(tmp_path: Path) -> None:
    rows = [
        {"question": "Who?", "context": "Ada wrote it.", "answer": "Ada", "tests": "x"},
        {"prompt": "Be brief. Who?", "system": "Be  brief.", "answer": "Ada"},
        {"messages": [{"role": "user", "content": "Who?"}], "tools": [{"name": "search"}]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    prompts = read_prompts(str(tmp_path / "rows.jsonl"), "my.verifiers:score")
    told = describe_unread("rows.jsonl", prompts)
    assert told is not None and "is not asked 'context' (rows: 1), 'tools' (rows: 1);" in told
    assert describe_unread("rows.jsonl", prompts[1:2]) is None


def test_a_prompt_has_no_end_that_the_tokenizer_puts_after_texts() -> None:
    tokenizer = byte_level(None, eos="<|endoftext|>")
    plain = tokenizer.encode("1+1=\n\n")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="$A <|endoftext|>", special_tokens=[("<|endoftext|>", tokenizer.eos_token_id)]
    )
    assert tokenizer.encode("1+1=\n\n") == [*plain, tokenizer.eos_token_id]
    prompter = Prompter(tokenizer, frozenset(), None, None, "")
    assert prompter.prompt("1+1=") == plain
    assert Prompt("0", "", "1+1=\n\n", {}).tokens(prompter) == plain
    own = Prompt("0", "", "1+1=\n\n<|endoftext|>", {})
    assert own.tokens(prompter) == [*plain, tokenizer.eos_token_id]


def test_an_answer_that_math_verify_can_not_compare_has_no_score() -> None:
    prompt = Prompt("0", "", "1+1=", {"prompt": "1+1="}, "2")
    with Verifier("math", seconds=2) as verifier:
        # The second verdict is remembered.
        for _ in range(2):
            verdict = verifier.verify(prompt, r"\boxed{10^{10^{10}}}")
            assert verdict.score is None and "no verdict in 2 s" in str(verdict.problem)
        assert verifier.verify(prompt, r"\boxed{3}")[:] == (0.0, "3", None)
