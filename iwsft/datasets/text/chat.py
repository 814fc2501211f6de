"""From conversations to token ids and the mask of the assistant's text, by a chat template.

A template with generation markers (``{% generation %}``) marks the text to train on itself. With
any other template the conversation is rendered. A mark behind each assistant's text shows where the
text ends. The messages before it, rendered with the generation prompt, show where the model's text
starts. So no list of model families and headers is needed, and text that looks like a header is
text. The stretches are checked in both cases.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from iwsft.datasets.text.encoding import (
    Encoded,
    Stretch,
    check_tokenizer,
    encode_stretches,
    squash,
    token_range,
)
from iwsft.datasets.text.rows import ASSISTANT, Message

_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_PRIVATE_USE = range(0xE000, 0xF900)
_WAY_OUT = "pass a template that keeps it, or drop it from the data"


class Turn(NamedTuple):
    """An assistant's turn in the rendered conversation, as positions of characters.

    Attributes:
        start: End of the generation prompt. The template's text from there to the content (such as
            an empty think block) is trained on too.
        content: Start of the message's own text.
        end: End of the message's own text.
        stop: End of the end-of-turn token.
    """

    start: int
    content: int
    end: int
    stop: int


class ChatEncoder:
    """Encodes conversations with a tokenizer's chat template.

    Ids are those of ``tokenizer.apply_chat_template``, except that without generation markers a
    token never straddles the generation prompt and the answer (see ``encode_stretches``).

    Args:
        tokenizer: Fast tokenizer of transformers.
        template: Jinja chat template; the tokenizer's own by default.
        template_kwargs: Variables of the template, such as ``enable_thinking``.

    Raises:
        TypeError: The tokenizer has no offsets.
        ValueError: There is no template.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        template: str | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        check_tokenizer(tokenizer)
        if template is None and not tokenizer.chat_template:
            raise ValueError(
                "the tokenizer has no chat template; pass template=, or give rows with 'prompt' "
                "and 'completion'"
            )
        self.tokenizer = tokenizer
        self.template: str = tokenizer.get_chat_template(template)
        self.template_kwargs = dict(template_kwargs or {})
        self.has_markers = _MARKERS.search(self.template) is not None
        added = (str(token) for token in tokenizer.added_tokens_decoder.values())
        # The longest first: one token may be the start of another.
        self._added = sorted((token for token in added if token.strip()), key=len, reverse=True)
        self._checked_end = False

    def encode(self, messages: Sequence[Message], where: str = "this row") -> Encoded:
        """Encode a conversation; each assistant's turn and its end are trained on.

        Args:
            messages: Messages {role, content}, at least one of the assistant.
            where: Place of the row, for errors.

        Raises:
            ValueError: The template refuses the row, drops or rewrites an assistant's text (white
                space apart), has no end-of-turn token, marks other text than the assistant's, or
                marks nothing.
        """
        tools = any(message.get("tool_calls") for message in messages)
        if tools and not self.has_markers:
            raise ValueError(
                f"{where}: tool calls need a chat template with generation markers; pass such a "
                "template=, or drop the row"
            )
        text = self._render(messages, where)
        # A template writes a tool call in its own form, so its text can't be looked for.
        turns = [] if tools else self._find_turns(messages, text, where)
        if self.has_markers:
            return self._encode_by_markers(messages, turns, text, where)
        if not self._checked_end:
            self._check_end_of_turn(messages, where)
        return encode_stretches(
            self.tokenizer, text, [Stretch(turn.start, turn.stop) for turn in turns], where
        )

    def _render(self, messages: Sequence[Message], where: str, **options: bool) -> Any:
        """Render a conversation as text; ``options`` are those of ``apply_chat_template``."""
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self.template,
                **({"tokenize": False} | options | self.template_kwargs),
            )
        # Templates refuse rows with TemplateError and fail with TypeError.
        except (TemplateError, TypeError) as error:
            raise ValueError(f"{where}: the chat template refuses this row: {error}") from error

    def _find_turns(self, messages: Sequence[Message], text: str, where: str) -> list[Turn]:
        """Find the assistant's turns in ``text``, the rendered conversation."""
        turns = []
        last = 0
        for index, end in self._find_ends(messages, text, where).items():
            message = messages[index]
            here = f"{where}, message {index}"
            content = _find_content(message["content"].strip(), text, end)
            if content is None or content < last:
                raise ValueError(
                    f"{here}: the chat template rewrites this assistant turn; {_WAY_OUT}"
                )
            start = max(last, self._find_start(messages, index, text, content, where))
            for name in _REASONING:
                thinking = message.get(name) or ""
                if squash(thinking) not in squash(text[start:content]):
                    raise ValueError(f"{here}: the chat template drops {name!r}; {_WAY_OUT}")
            last = self._find_stop(text, end, here)
            turns.append(Turn(start, content, end, last))
        return turns

    def _find_ends(self, messages: Sequence[Message], text: str, where: str) -> dict[int, int]:
        """Find the end of each assistant's text in ``text``, by index of the message."""
        sign = next(c for c in map(chr, _PRIVATE_USE) if c not in text)
        marks, marked = {}, []
        for index, message in enumerate(messages):
            if message["role"] == ASSISTANT:
                content = message["content"]
                marks[index] = f"{sign}{index}{sign}"
                # Before trailing white space, which a template may trim.
                end = len(content.rstrip())
                message = {**message, "content": content[:end] + marks[index] + content[end:]}
            marked.append(message)
        rendered = self._render(marked, where)
        ends = {}
        for index, mark in marks.items():
            ends[index] = rendered.find(mark)
            if ends[index] < 0:
                here = f"{where}, message {index}"
                raise ValueError(f"{here}: the chat template drops this assistant turn; {_WAY_OUT}")
            rendered = rendered.replace(mark, "", 1)
        if rendered != text:
            raise ValueError(f"{where}: the chat template rewrites a turn; {_WAY_OUT}")
        return ends

    def _find_start(
        self, messages: Sequence[Message], index: int, text: str, content: int, where: str
    ) -> int:
        """Find the end of the generation prompt of turn ``index``, at most ``content``."""
        if index > 0:
            before = messages[:index]
            try:
                prompt = self._render(before, where, add_generation_prompt=True)
                closed = self._render(before, where)
            # A template may refuse a conversation that ends here, and yet accept the whole.
            except ValueError:
                prompt = closed = ""
            if prompt != closed and text.startswith(prompt):
                return min(len(prompt), content)
        # Without a generation prompt, the space before the text belongs to its first token.
        while content > 0 and text[content - 1] == " ":
            content -= 1
        return content

    def _find_stop(self, text: str, end: int, here: str) -> int:
        """Find the end of the end-of-turn token of a turn whose text ends at ``end``."""
        token_start = end + len(text[end:]) - len(text[end:].lstrip())
        for token in self._added:
            if text.startswith(token, token_start):
                return token_start + len(token)
        raise ValueError(
            f"{here}: {text[end : end + 20]!r} follows the assistant's text, not a special token; "
            "pass a template that ends the turn with one"
        )

    def _check_end_of_turn(self, messages: Sequence[Message], where: str) -> None:
        """Check once that a turn ends with its own token, not with the next turn's header."""
        first = next(i for i, message in enumerate(messages) if message["role"] == ASSISTANT)
        if first + 1 < len(messages):
            alone = messages[: first + 1]
            self._find_turns(alone, self._render(alone, where), where)
        self._checked_end = True

    def _encode_by_markers(
        self, messages: Sequence[Message], turns: list[Turn], text: str, where: str
    ) -> Encoded:
        encoding = self._render(
            messages, where, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        mask = [bool(on) for on in encoding["assistant_masks"]]
        if not any(mask):
            raise ValueError(f"{where}: the template's generation markers enclose nothing; mend it")
        if turns:
            self._check_markers(encoding, mask, turns, text, where)
        return Encoded(list(encoding["input_ids"]), mask)

    def _check_markers(
        self, encoding: Any, mask: list[bool], turns: list[Turn], text: str, where: str
    ) -> None:
        allowed = [False] * len(mask)
        for number, turn in enumerate(turns):
            content = token_range(encoding, turn.content, turn.end)
            on = [mask[token] for token in content]
            end_of_turn = mask[token_range(encoding, turn.stop - 1, turn.stop).start]
            if any(on) and not (all(on) and end_of_turn):
                what = "end-of-turn token" if all(on) else "text"
                raise ValueError(
                    f"{where}, assistant turn {number}: the template's generation markers leave "
                    f"out a part of its {what}; correct the markers"
                )
            white = len(text[turn.stop :]) - len(text[turn.stop :].lstrip())
            own = token_range(encoding, turn.start, turn.stop + white)
            allowed[own.start : own.stop] = [True] * len(own)
        outside = [i for i, (on, own) in enumerate(zip(mask, allowed, strict=True)) if on > own]
        if outside:
            raise ValueError(
                f"{where}: the template's generation markers enclose {len(outside)} tokens that "
                f"are not the assistant's, from token {outside[0]} on; correct the markers"
            )


def _find_content(content: str, text: str, end: int) -> int | None:
    """Find the start of a content that ends at ``end`` (white space apart), or None."""
    if text.endswith(content, 0, end):
        return end - len(content)
    position = end
    for char in reversed(squash(content)):
        while position > 0 and text[position - 1].isspace():
            position -= 1
        if position == 0 or text[position - 1] != char:
            return None
        position -= 1
    return position
