"""Budget forcing by exact token sequences, with a generator that follows a script."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from iwsft.language.budget import (
    S1,
    TAGS,
    Delimiters,
    Thought,
    overhead,
    think_then_answer,
)
from iwsft.language.generation import Completion, Generator, Request, TransformersGenerator

PROMPT = (1, 2)
IM_START, IM_END, NEWLINE = 90, 91, 92
START, ANSWER, CUT, WAIT = (80, 81), (82, 83), (NEWLINE, 82, 84), (70,)
SIZES: dict[str, Any] = {
    "vocab_size": 93,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
DELIMITERS = Delimiters(START, frozenset({IM_START}), ANSWER, CUT, WAIT, NEWLINE)


class Scripted(Generator):
    """Says what the script has for a prompt: the tokens a model would give if never stopped.

    ``min_tokens`` moves to the script's next token that does not stop, as suppressing does.
    """

    context = None

    def __init__(self, script: Mapping[tuple[int, ...], Sequence[int]]) -> None:
        self.script = script
        self.asked: list[tuple[Request, frozenset[int]]] = []

    def _complete(
        self, requests: Sequence[Request], stop: frozenset[int], temperature: float, top_p: float
    ) -> list[Completion]:
        self.asked += [(request, stop) for request in requests]
        return [self._one(request, stop) for request in requests]

    def _one(self, request: Request, stop: frozenset[int]) -> Completion:
        said: list[int] = []
        for token in self.script[tuple(request.prompt)]:
            if token in stop and len(said) < request.min_tokens:
                continue
            if len(said) == request.max_tokens:
                break
            if token in stop:
                return Completion(tuple(said), token)
            said.append(token)
        assert len(said) == request.max_tokens, "the script ended before the model did"
        return Completion(tuple(said), None)


def think(
    script: Mapping[tuple[int, ...], Sequence[int]],
    *,
    budget: int,
    waits: int = 0,
    answer: int = 5,
    delimiters: Delimiters = DELIMITERS,
) -> tuple[Thought, Scripted]:
    model = Scripted(script)
    (thought,) = think_then_answer(
        model,
        [Request(PROMPT, answer, seed=100)],
        delimiters=delimiters,
        think_budget=budget,
        waits=waits,
        stop=frozenset({IM_END}),
    )
    return thought, model


T0 = (*PROMPT, *START)
ENDS_EARLY = {
    T0: [10, 11, NEWLINE, IM_START],
    (*T0, 10, 11, NEWLINE, 70): [12, IM_START],
    (*T0, 10, 11, NEWLINE, 70, 12, 70): [13, 14, IM_END],
    (*T0, 10, 11, NEWLINE, *ANSWER): [50, IM_END],
    (*T0, 10, 11, NEWLINE, 70, 12, *ANSWER): [51, IM_END],
    (*T0, 10, 11, NEWLINE, 70, 12, 70, 13, 14, *ANSWER): [52, 53, IM_END],
}


@pytest.mark.parametrize(
    ("waits", "thinking", "answer"),
    [
        (0, (10, 11, NEWLINE), (50,)),
        (1, (10, 11, NEWLINE, 70, 12), (51,)),
        (2, (10, 11, NEWLINE, 70, 12, 70, 13, 14), (52, 53)),
    ],
)
def test_ends_early(waits: int, thinking: tuple[int, ...], answer: tuple[int, ...]) -> None:
    thought, model = think(ENDS_EARLY, budget=20, waits=waits)
    assert thought.thinking == thinking
    assert thought.answer == Completion(answer, IM_END)
    assert (thought.waits, thought.cut) == (waits, False)
    assert thought.tokens == (*START, *thinking, *ANSWER, *answer)
    # The budget shrinks by what was thought, the Waits among it; the answer has its own.
    budgets = [20, 20 - 4, 20 - 6][: waits + 1]
    assert [request.max_tokens for request, _ in model.asked] == [*budgets, 5]
    assert [request.min_tokens for request, _ in model.asked] == [0, *[1] * waits, 0]
    assert [request.seed for request, _ in model.asked] == [100 + r for r in range(waits + 2)]
    assert [stop for _, stop in model.asked] == [
        *[frozenset({IM_START, IM_END})] * (waits + 1),
        frozenset({IM_END}),
    ]


def test_runs_out_of_budget() -> None:
    script = {T0: [10, 11, 12, 13, 14], (*T0, 10, 11, 12, *CUT): [50, IM_END]}
    thought, _ = think(script, budget=3, waits=2)
    assert thought.thinking == (10, 11, 12) and thought.cut and thought.waits == 0
    assert thought.answer == Completion((50,), IM_END)
    assert thought.tokens == (*START, 10, 11, 12, *CUT, 50)


def test_a_cut_line_gets_no_second_line_break() -> None:
    script = {T0: [10, NEWLINE, 12], (*T0, 10, NEWLINE, 82, 84): [50, IM_END]}
    thought, _ = think(script, budget=2)
    assert thought.cut and thought.tokens == (*START, 10, NEWLINE, 82, 84, 50)


def test_runs_out_after_a_wait() -> None:
    script = {
        T0: [10, IM_START],
        (*T0, 10, 70): [11, 12, 13],
        (*T0, 10, 70, 11, 12, *CUT): [50, IM_END],
    }
    thought, _ = think(script, budget=4, waits=2)
    assert thought.thinking == (10, 70, 11, 12)
    assert (thought.waits, thought.cut) == (1, True)


def test_ends_at_once_after_a_wait() -> None:
    """What the model would end with is suppressed there: it says at least a token."""
    script = {
        T0: [10, IM_START],
        (*T0, 10, 70): [IM_START, IM_END, 11, IM_START],
        (*T0, 10, 70, 11, *ANSWER): [50, IM_END],
    }
    thought, _ = think(script, budget=10, waits=1)
    assert thought.thinking == (10, 70, 11) and not thought.cut


@pytest.mark.parametrize(
    ("budget", "waited"),
    # 2 thought, a Wait of 3 tokens, and at least one after it: 6.
    [(3, False), (5, False), (6, True)],
)
def test_a_wait_that_does_not_fit_is_left_out(budget: int, waited: bool) -> None:
    long_wait = Delimiters(START, frozenset({IM_START}), ANSWER, CUT, (70, 71, 72), NEWLINE)
    script = {
        T0: [10, 11, IM_START],
        (*T0, 10, 11, *ANSWER): [50, IM_END],
        (*T0, 10, 11, 70, 71, 72): [12, 13],
        (*T0, 10, 11, 70, 71, 72, 12, *CUT): [51, IM_END],
    }
    thought, _ = think(script, budget=budget, waits=1, delimiters=long_wait)
    expected = (10, 11, 70, 71, 72, 12) if waited else (10, 11)
    assert thought.thinking == expected and len(expected) <= budget
    assert (thought.waits, thought.cut) == (int(waited), waited)


def test_answer_budget() -> None:
    script = {T0: [10, IM_START], (*T0, 10, *ANSWER): [50, 51, 52, 53, IM_END]}
    thought, _ = think(script, budget=10, answer=3)
    assert thought.answer == Completion((50, 51, 52), None)
    # IM_START does not end an answer.
    script = {T0: [10, IM_START], (*T0, 10, *ANSWER): [50, IM_START, 52, IM_END]}
    thought, _ = think(script, budget=10, answer=5)
    assert thought.answer == Completion((50, IM_START, 52), IM_END)


def test_a_thinking_of_nothing() -> None:
    script = {T0: [IM_START], (*T0, *ANSWER): [50, IM_END]}
    thought, _ = think(script, budget=1, waits=1)
    assert (thought.thinking, thought.waits, thought.cut) == ((), 0, False)
    assert thought.tokens == (*START, *ANSWER, 50)


def test_requests_that_end_in_different_rounds() -> None:
    other = (3, *START)
    script = {
        **ENDS_EARLY,
        other: [20, 21, 22, 23, 24, 25, 26, 27, 28, 29],
        (3, *START, 20, 21, 22, 23, 24, 25, 26, 27, *CUT): [60, IM_END],
        (*T0, 10, 11, NEWLINE, 70, 12, 70, 13, 14, *CUT): [61, 62, 63, 64, 65],
    }
    both = think_then_answer(
        Scripted(script),
        [Request((3,), 5), Request(PROMPT, 5)],
        delimiters=DELIMITERS,
        think_budget=8,
        waits=2,
        stop=frozenset({IM_END}),
    )
    assert [thought.cut for thought in both] == [True, True]
    assert [thought.answer.tokens for thought in both] == [(60,), (61, 62, 63, 64, 65)]
    assert both[0].thinking == (20, 21, 22, 23, 24, 25, 26, 27)
    # The second Wait leaves two tokens of its 8: 13 and 14 fill them before the end is said.
    assert both[1].thinking == (10, 11, NEWLINE, 70, 12, 70, 13, 14)


def test_no_request() -> None:
    assert (
        think_then_answer(Scripted({}), [], delimiters=DELIMITERS, think_budget=1, stop=frozenset())
        == []
    )


def test_no_budget() -> None:
    request = [Request(PROMPT, 5)]
    torch.manual_seed(0)
    generator = TransformersGenerator(LlamaForCausalLM(LlamaConfig(**SIZES)))
    with pytest.raises(ValueError, match="asks for 0"):
        think_then_answer(
            generator, request, delimiters=DELIMITERS, think_budget=0, stop=frozenset({IM_END})
        )


def tokenizer(*special: str) -> PreTrainedTokenizerFast:
    words = ["[UNK]", "think", "answer", "Wait", "Final", "Answer:", "\n"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(" ", "removed"),
        ]
    )
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[UNK]")
    made.add_special_tokens({"additional_special_tokens": list(special)})
    return made


def test_formats_in_tokens() -> None:
    s1 = tokenizer("<|im_start|>", "<|im_end|>")
    im_start = s1.convert_tokens_to_ids("<|im_start|>")
    found = S1.tokens(s1)
    assert found.start == (im_start, 1, 6) and found.ends == {im_start}
    assert found.answer == (im_start, 2, 6)
    assert found.cut == (6, im_start, 2, 6, 4, 5)
    assert (found.wait, found.newline) == ((3,), 6)
    assert overhead(found) == 3 + 6
    tags = TAGS.tokens(tokenizer("<think>", "</think>"))
    assert len(tags.ends) == 1 and tags.ends.isdisjoint(found.wait)
    with pytest.raises(
        ValueError, match="'<|im_start|>', the end of thinking, is not a token of this model"
    ):
        S1.tokens(tokenizer())


def test_with_a_model() -> None:
    """The same thoughts as steps of plain generation; invariants of the budget."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, initializer_range=0.5, pad_token_id=0)
    generator = TransformersGenerator(LlamaForCausalLM(config), batch_size=4)
    stop = frozenset(range(IM_END, 93)) | frozenset(range(20, 28))
    requests = [Request((k, k + 1), 6, seed=1000 * k) for k in range(1, 17)]
    thoughts = think_then_answer(
        generator,
        requests,
        delimiters=DELIMITERS,
        think_budget=12,
        waits=2,
        stop=stop,
        temperature=1.0,
    )
    assert {thought.cut for thought in thoughts} == {True, False}
    assert {thought.waits for thought in thoughts} >= {1, 2}
    for thought in thoughts:
        assert len(thought.thinking) <= 12 and len(thought.answer.tokens) <= 6
        assert (len(thought.thinking) == 12) or not thought.cut
        assert thought.thinking.count(WAIT[0]) >= thought.waits
        assert IM_START not in thought.thinking and not stop & set(thought.thinking)
