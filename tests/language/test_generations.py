"""What ends an answer, by the chat template alone."""

from __future__ import annotations

from iwsft.language.generations import turn_end
from tests.datasets.text.chat_tokenizers import byte_level


def test_the_end_of_a_turn_is_the_token_behind_the_answer() -> None:
    tokenizer = byte_level()
    assert turn_end(tokenizer) == {tokenizer.convert_tokens_to_ids("<|im_end|>")}
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "###")
    assert turn_end(tokenizer) == set()


def test_a_template_that_rewrites_the_answer_has_no_known_end() -> None:
    """The token at the start of its text, which begins a turn, would end answers."""
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.content | lower }}<|im_end|>{% endfor %}"
    )
    assert turn_end(tokenizer) == set()
    tokenizer.chat_template = None
    assert turn_end(tokenizer) == set()
