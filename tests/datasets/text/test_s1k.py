"""The format of the paper's language data, on synthetic rows in the public columns."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from iwsft.datasets.text import s1k
from iwsft.datasets.text.rows import read
from iwsft.datasets.text.tokens import correct_only, tokenize
from iwsft.trajectory import ASSISTANT_MASK, TOKENS, TRAJ_IDS
from tests.datasets.text.chat_tokenizers import CHATML, byte_level

DATA = Path(__file__).parent / "data"
NEW, OLD = DATA / "s1k-1.1-synthetic.jsonl", DATA / "s1k-synthetic.jsonl"


def test_rows_of_s1k_1_1():
    rows = read(NEW, make=s1k.to_row)
    assert len(rows) == 20
    question, answer = rows[0].messages or ()
    assert question["content"].startswith("A box holds 3 red marbles")
    assert answer["content"] == (
        "<|im_start|>think\nThere are 3 red ones.\n\nThere are 4 blue ones, so I add: 3 + 4 = 7.\n"
        "Wait, let me check: 7 - 4 = 3. Good.\n"
        "<|im_start|>answer\nAnswer: The box holds \\boxed{7} marbles."
    )
    # An answer that has the word keeps its text.
    answer = (rows[1].messages or ())[1]
    assert answer["content"].endswith("|>answer\nAdding both colours.\n\nAnswer: 12")
    assert sum(row.correct is True for row in rows) == 16


def test_both_kinds_of_columns_make_the_same_rows():
    old = read(OLD, make=s1k.to_row)
    new = read(NEW, make=partial(s1k.to_row, teacher="gemini"))
    assert [row.messages for row in old] == [row.messages for row in new[:5]]
    assert old[0].correct is None


def test_think_answer_and_end_of_turn_are_trained_and_the_prompt_is_not():
    tokenizer = byte_level(CHATML)
    pad = s1k.set_pad_token(tokenizer)
    assert pad != tokenizer.eos_token_id
    assert tokenizer.convert_ids_to_tokens(pad) == "<|fim_pad|>"
    rows = read(NEW, make=s1k.to_row)
    batch = tokenize(rows, tokenizer).trajectories
    for k, row in enumerate(rows):
        own = batch.get(TRAJ_IDS) == k
        tokens, mask = batch.get(TOKENS)[own], batch.get(ASSISTANT_MASK)[own]
        question, answer = row.messages or ()
        assert tokenizer.decode(tokens[mask]) == answer["content"] + "<|im_end|>"
        prompt = f"<|im_start|>user\n{question['content']}<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(tokens[: int(mask.long().argmax())]) == prompt
        # The markers are the tokenizer's own tokens, as generation needs them.
        starts = tokenizer.convert_tokens_to_ids("<|im_start|>")
        assert int((tokens[mask] == starts).sum()) == 2
    assert not bool(torch.isin(batch.get(TOKENS), torch.tensor([pad])).any())
    assert len(correct_only(batch).get(TRAJ_IDS).unique()) == 16


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"deepseek_attempt": " "}, "f:3: deepseek_attempt is empty"),
        ({"deepseek_attempt": None}, "f:3: deepseek_attempt must be text, it is missing"),
        ({"question": ""}, "f:3: question is empty"),
        ({"deepseek_thinking_trajectory": None}, "f:3: deepseek_thinking_trajectory must be text"),
        ({"deepseek_grade": "perhaps"}, "f:3: the grade is 'perhaps'"),
    ],
)
def test_bad_rows(change, error):
    good = {
        "question": "q",
        "deepseek_thinking_trajectory": "t",
        "deepseek_attempt": "a",
        "deepseek_grade": "Yes",
    }
    assert s1k.to_row(good, "f:3").correct is True
    with pytest.raises(ValueError, match=error):
        s1k.to_row({**good, **change}, "f:3")


def test_columns_and_tokenizers_of_another_kind():
    with pytest.raises(ValueError, match="f:1: neither deepseek_thinking_trajectory .* nor"):
        s1k.to_row({"question": "q", "solution": "s"}, "f:1")
    with pytest.raises(ValueError, match="thinking_trajectories must be text, it is missing"):
        s1k.to_row({"question": "q", "thinking_trajectories": [], "attempt": "a"}, "f:1")

    class Other:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0}

    with pytest.raises(ValueError, match="no <.fim_pad.>"):
        s1k.set_pad_token(Other())
