"""Masks of chat templates against what the assistant says, family by family."""

from __future__ import annotations

from typing import Any
from unicodedata import normalize

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.normalizers import NFC, Prepend, Replace, Sequence, Strip
from tokenizers.pre_tokenizers import ByteLevel

from iwsft.datasets.text.chat import ChatEncoder
from iwsft.datasets.text.encoding import Encoded, encode_completion
from tests.datasets.text.chat_tokenizers import (
    CHATML,
    CHATML_WITHOUT_PROMPT,
    DROPS,
    GEMMA,
    LLAMA3,
    MARKED,
    MISTRAL,
    PHI,
    THINKING,
    WITHOUT_END,
    assistant,
    byte_level,
    sentencepiece,
    system,
    user,
)

TALK = [
    system("be brief"),
    user("two and two?"),
    assistant("four."),
    user("sure?"),
    assistant("yes"),
]


def trained(tokenizer: Any, encoded: Encoded) -> str:
    ids = [i for i, on in zip(encoded.ids, encoded.weights, strict=True) if on]
    return tokenizer.decode(ids)


def read_back(template: str, messages: list[dict[str, str]], tokenizer: Any = None) -> str:
    tokenizer = byte_level(template) if tokenizer is None else tokenizer
    encoded = ChatEncoder(tokenizer, template=template).encode(messages)
    expected = tokenizer.apply_chat_template(messages, chat_template=template, return_dict=True)
    assert encoded.ids == expected["input_ids"]
    return trained(tokenizer, encoded)


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (CHATML, TALK, "four.<|im_end|>yes<|im_end|>"),
        (CHATML_WITHOUT_PROMPT, TALK, "four.<|im_end|>yes<|im_end|>"),
        (MARKED, TALK, "four.<|im_end|>\nyes<|im_end|>\n"),
        (LLAMA3, TALK, "four.<|eot_id|>yes<|eot_id|>"),
        (GEMMA, TALK[1:], "four.<end_of_turn>yes<end_of_turn>"),
        (MISTRAL, TALK[1:], " four.</s> yes</s>"),
        (MISTRAL, TALK, " four.</s> yes</s>"),
        (PHI, TALK[1:], "four.<|end|>yes<|end|>"),
        (THINKING, TALK, "four.<|im_end|><think>\n\n</think>\n\nyes<|im_end|>"),
        (CHATML, TALK[:4], "four.<|im_end|>"),
        (CHATML, [assistant("hello"), user("hi"), assistant("so")], "hello<|im_end|>so<|im_end|>"),
        (CHATML, [user("a"), assistant("b"), assistant("c")], "b<|im_end|>c<|im_end|>"),
    ],
)
def test_the_assistant_and_its_end_of_turn_are_trained(template, messages, expected):
    assert read_back(template, messages) == expected


def test_sentencepiece_and_headers_that_swallow_white_space():
    tokenizer = sentencepiece()
    text = read_back(MISTRAL, TALK, tokenizer)
    assert text.replace(" ", "") == "four.</s>yes</s>"
    encoded = ChatEncoder(tokenizer, template=PHI).encode(TALK[1:])
    assert trained(tokenizer, encoded).replace(" ", "") == "four.<|end|>yes<|end|>"


def test_llama_trims_the_content_and_it_is_still_found():
    messages = [user(" a "), assistant("\n two <|eot_id|> words \n")]
    assert read_back(LLAMA3, messages) == "two <|eot_id|> words<|eot_id|>"


def test_a_thought_in_the_last_turn_is_trained():
    messages = [user("q"), assistant("<think>hm</think>a")]
    assert read_back(THINKING, messages) == "<think>\nhm\n</think>\n\na<|im_end|>"


def test_template_variables_move_the_point_where_the_model_takes_over():
    tokenizer = byte_level(THINKING)
    chat = ChatEncoder(tokenizer, template_kwargs={"no_thinking": True})
    assert trained(tokenizer, chat.encode([user("q"), assistant("a")])) == "a<|im_end|>"


def test_a_prompt_that_opens_the_thought_leaves_all_of_the_content_trained():
    template = CHATML.replace("assistant\n'", "assistant\n<think>\n'")
    assert template != CHATML
    messages = [user("q"), assistant("<think>\nhm\n</think>\n\na")]
    assert read_back(template, messages) == "<think>\nhm\n</think>\n\na<|im_end|>"


def test_an_end_of_turn_that_starts_with_another_token_is_taken_whole():
    template = CHATML.replace("<|im_end|>", "<|im_end|>!")
    tokenizer = byte_level(template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>!"]})
    assert read_back(template, TALK, tokenizer) == "four.<|im_end|>!yes<|im_end|>!"


def test_a_token_that_would_straddle_the_prompt_is_split_as_in_generation():
    tokenizer = byte_level(CHATML)
    messages = [user("q"), assistant("\nfour"), user("q"), assistant("\n\n\nfive")]
    prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    assert len(tokenizer("\n\n")["input_ids"]) == 1, "the tokenizer must merge line ends"
    encoded = ChatEncoder(tokenizer).encode(messages)
    start = encoded.weights.index(True)
    assert encoded.ids[:start] == tokenizer(prompt)["input_ids"]
    assert trained(tokenizer, encoded) == "\nfour<|im_end|>\n\n\nfive<|im_end|>"


def test_reasoning_in_a_field_of_its_own():
    template = THINKING.replace("loop.last", "m.reasoning_content is defined").replace(
        "thought +", "m.reasoning_content +"
    )
    messages = [user("q"), assistant("a", reasoning_content="deep"), user("r"), assistant("b")]
    assert read_back(template, messages) == ("<think>\ndeep\n</think>\n\na<|im_end|>b<|im_end|>")
    with pytest.raises(ValueError, match="file:3: message 1: .*drops 'reasoning_content'"):
        ChatEncoder(byte_level(CHATML)).encode(messages, "file:3")


@pytest.mark.parametrize(
    ("template", "messages", "error"),
    [
        (DROPS, TALK, "file:7: message 2: the chat template drops this assistant turn"),
        (
            THINKING,
            [user("q"), assistant("<think>hm</think>a"), user("r"), assistant("b")],
            "file:7: message 1: the chat template rewrites this assistant turn",
        ),
        (CHATML.replace("m.content", "m.content[:9]"), TALK[:2] + [assistant("x" * 12)], "drops"),
        (CHATML.replace("m.content", "m.content | upper"), TALK, "rewrites"),
        (CHATML.replace("m.content", "m.content + m.content"), TALK, "rewrites"),
        (WITHOUT_END, TALK[:3], "follows the assistant's text, not a special token"),
        (WITHOUT_END, TALK[:4], "follows the assistant's text, not a special token"),
        # The next message's header ends all turns but the last, as in GLM's.
        (
            PHI.replace("<|end|>\n", ""),
            TALK[1:],
            r"message 1: '<\|user\|>' begins the next message",
        ),
        (GEMMA, TALK, "file:7: the chat template refuses this row: System role not supported"),
        (MARKED.replace("assistant' %}", "nobody' %}"), TALK, "enclose nothing"),
        (
            MARKED.replace(
                "m.content + '<|im_end|>\n' }}{% endgen", "m.content }}{% endgen"
            ).replace("{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>\n' }}"),
            TALK,
            "leave out a part of its end-of-turn token",
        ),
        (MARKED.replace("== 'assistant'", "!= 'nobody'"), TALK, "that is not the assistant's"),
        (
            CHATML,
            [user("q"), {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}],
            "tool calls need a chat template with generation markers",
        ),
    ],
)
def test_templates_that_can_not_be_trained_with_are_named(template, messages, error):
    with pytest.raises(ValueError, match=error) as caught:
        ChatEncoder(byte_level(template)).encode(messages, "file:7")
    assert str(caught.value).startswith("file:7")


def test_a_row_of_one_turn_does_not_spare_the_others_the_check_of_their_ends():
    chat = ChatEncoder(byte_level(PHI.replace("<|end|>\n", "")))
    chat.encode(TALK[1:3])
    for _ in range(2):
        with pytest.raises(ValueError, match=r"message 1: '<\|user\|>' begins the next message"):
            chat.encode(TALK[1:])


def test_no_template_and_no_offsets():
    with pytest.raises(ValueError, match="no chat template.*'prompt' and 'completion'"):
        ChatEncoder(byte_level(None))

    class Slow:
        is_fast = False

    with pytest.raises(TypeError, match="Slow does not tell the characters"):
        ChatEncoder(Slow())


def test_completions_end_in_one_eos_and_start_with_bos_where_the_tokenizer_has_one():
    tokenizer = byte_level(None, eos="<|endoftext|>")
    plain = encode_completion(tokenizer, "two and", " two")
    assert trained(tokenizer, plain) == " two<|endoftext|>"
    assert tokenizer.decode(plain.ids) == "two and two<|endoftext|>"
    assert encode_completion(tokenizer, "two and", " two<|endoftext|>") == plain
    with_bos = sentencepiece()
    with_bos.backend_tokenizer.post_processor = _bos_in_front(with_bos)
    encoded = encode_completion(with_bos, "two and", " two")
    assert with_bos.convert_ids_to_tokens(encoded.ids)[0] == "<s>"
    assert not encoded.weights[0]
    assert encode_completion(with_bos, "<s>two and", " two").ids.count(encoded.ids[0]) == 1
    with pytest.raises(ValueError, match="the tokenizer has no EOS token"):
        encode_completion(byte_level(None, eos=None, pad="<|fim_pad|>"), "a", "b")


def _bos_in_front(tokenizer: Any) -> Any:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)])


PIECES = st.sampled_from(
    ["<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>", "</s>", "[/INST]", "\n", " ", "  \n\n"]
    + ["assistant", "{{ x }}", "{% generation %}", "\ue000", "\ue0001\ue000", "e\u0301", "é", "😀"]
)
TEXT = st.lists(st.one_of(PIECES, st.text(max_size=6)), max_size=6).map("".join)
SAID = TEXT.filter(lambda text: bool(text.strip()))
TURNS = st.lists(st.tuples(TEXT, SAID), min_size=1, max_size=3)


@settings(max_examples=150)
@given(
    prompt=st.none() | TEXT, turns=TURNS, template=st.sampled_from([CHATML, MARKED, LLAMA3, PHI])
)
def test_any_conversation_reads_back(prompt, turns, template):
    messages = [] if prompt is None or template == PHI else [system(prompt)]
    for asked, said in turns:
        messages += [user(asked), assistant(said)]
    tokenizer = byte_level(template)
    encoded = ChatEncoder(tokenizer).encode(messages)
    end = {CHATML: "<|im_end|>", MARKED: "<|im_end|>\n", LLAMA3: "<|eot_id|>", PHI: "<|end|>"}
    contents = [said.strip() if template == LLAMA3 else said for _, said in turns]
    expected = "".join(content + end[template] for content in contents)
    got = trained(tokenizer, encoded)
    if template == MARKED:
        # transformers counts a line end before the text in, where both are one token.
        assert got.split() == expected.split()
    else:
        assert got == expected
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    assert tokenizer.decode(encoded.ids) == whole


@settings(max_examples=100)
@given(prompt=TEXT, completion=SAID)
def test_any_completion_reads_back(prompt, completion):
    tokenizer = byte_level(None, eos="<|endoftext|>")
    encoded = encode_completion(tokenizer, prompt, completion)
    assert trained(tokenizer, encoded) == completion + "<|endoftext|>"
    assert tokenizer.decode(encoded.ids) == prompt + completion + "<|endoftext|>"


@pytest.mark.parametrize("by_normalizer", [False, True])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("how many marbles: ", "four"), ("the red ", "marbles"), ("two and two", "two"), ("", "two")],
)
def test_an_answer_behind_a_space_begins_without_another(prompt, completion, by_normalizer):
    """A space in front of a text, by the pre-tokenizer or (as Llama 2) by the normalizer."""
    tokenizer = sentencepiece()
    if by_normalizer:
        tokenizer.backend_tokenizer.normalizer = Sequence([Prepend("▁"), Replace(" ", "▁")])
        tokenizer.backend_tokenizer.pre_tokenizer = None
    encoded = encode_completion(tokenizer, prompt, completion)
    assert tokenizer.decode(encoded.ids) == f"{prompt}{completion}</s>"
    assert trained(tokenizer, encoded) == completion + "</s>"
    before = encoded.ids[: encoded.weights.index(True)]
    assert before == tokenizer(prompt, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("completion", ["e\u0301te\u0301", "\u1112\u1161\u11ab"])
def test_composed_characters_at_the_end_are_those_of_the_text(completion):
    """Qwen's tokenizers compose characters, and their offsets then end before the text does."""
    tokenizer = byte_level(None)
    try:
        tokenizer.backend_tokenizer.normalizer = NFC()
        encoded = encode_completion(tokenizer, "two ", completion)
        assert trained(tokenizer, encoded) == normalize("NFC", completion) + "<|im_end|>"
    finally:
        tokenizer.backend_tokenizer.normalizer = None


def test_a_tokenizer_that_drops_white_space_at_the_end_of_the_prompt():
    tokenizer = sentencepiece()
    backend = tokenizer.backend_tokenizer
    backend.normalizer = Strip(left=False, right=True)
    with pytest.raises(ValueError, match="this tokenizer drops white space at the end"):
        encode_completion(tokenizer, "Answer: ", "two")
    encoded = encode_completion(tokenizer, "Answer:", " two")
    assert tokenizer.decode(encoded.ids, skip_special_tokens=True) == "Answer: two"


def test_a_byte_level_tokenizer_with_a_prefix_space_continues_without_it():
    tokenizer = byte_level(None)
    plain = tokenizer.backend_tokenizer.pre_tokenizer
    tokenizer.backend_tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=True)
    try:
        encoded = encode_completion(tokenizer, "two and t", "wo is")
        assert trained(tokenizer, encoded) == "wo is<|im_end|>"
        assert tokenizer.decode(encoded.ids) == " two and two is<|im_end|>"
    finally:
        tokenizer.backend_tokenizer.pre_tokenizer = plain
