"""Conversations -> token ids and the mask of what the assistant says, by a chat template.

A template with generation markers (``{% generation %}``) says itself what is trained. For any other
the assistant's stretches are found by rendering the conversation: a mark set behind each
assistant's text shows where it ends up, and the rendering of the messages before it, with the
generation prompt, shows where the model takes over. So headers need no list of model families, and
text that looks like a header is text. The stretches are checked either way.
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
    squashed,
    token_range,
)
from iwsft.datasets.text.rows import ASSISTANT, Message

_MARKERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_REASONING = ("reasoning_content", "reasoning", "thinking")
_PRIVATE_USE = range(0xE000, 0xF900)
_WAY_OUT = (
    "train on single-turn rows, drop what the template drops from the data, or pass a template "
    "that keeps it"
)


class Turn(NamedTuple):
    """One assistant turn in the rendered conversation, as character positions.

    Attributes:
        start: where the model takes over from the generation prompt. What the template writes from
            there to the content (such as an empty think block) is trained too.
        content: where the message's own text starts.
        end: where it ends.
        stop: behind the end-of-turn token.
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
        tokenizer: a fast tokenizer of transformers.
        template: a Jinja chat template; the tokenizer's own by default.
        template_kwargs: variables of the template, such as ``enable_thinking``.

    Attributes:
        template: the template in use.
        has_markers: whether it says itself what is trained.

    Raises:
        TypeError: a tokenizer without offsets.
        ValueError: no template at all.
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
                "the tokenizer has no chat template, which rows with messages need: take the "
                "tokenizer of the model's instruction-tuned version, pass template= a Jinja "
                "template, or give rows with 'prompt' and 'completion'"
            )
        self.tokenizer = tokenizer
        self.template: str = tokenizer.get_chat_template(template)
        self.template_kwargs = dict(template_kwargs or {})
        self.has_markers = _MARKERS.search(self.template) is not None
        added = (str(token) for token in tokenizer.added_tokens_decoder.values())
        # The longest first: one token may start another.
        self._added = sorted((token for token in added if token.strip()), key=len, reverse=True)
        self._seen_to_end = False

    def encode(self, messages: Sequence[Message], where: str = "this row") -> Encoded:
        """Token ids and trained tokens of a conversation: each assistant turn and its end.

        Args:
            messages: {role, content} each, with at least one of the assistant.
            where: place of the row, for errors.

        Raises:
            ValueError: a template that refuses the row, drops or rewrites an assistant's text (up
                to white space), has no end-of-turn token, or marks what is not the assistant's; a
                mask that is off everywhere.
        """
        tools = any(message.get("tool_calls") for message in messages)
        if tools and not self.has_markers:
            raise ValueError(
                f"{where}: tool calls are trained only with a template that has generation "
                "markers ({% generation %}); pass such a template=, or drop the row"
            )
        text = self.render(messages, where)
        # A template writes a tool call as it likes, so there is no text to look for.
        turns = [] if tools else self.turns(messages, text, where)
        if self.has_markers:
            return self._by_markers(messages, turns, text, where)
        if not self._seen_to_end:
            self._check_end_of_turn(messages, where)
        return encode_stretches(
            self.tokenizer, text, [Stretch(turn.start, turn.stop) for turn in turns], where
        )

    def render(
        self, messages: Sequence[Message], where: str, *, generation_prompt: bool = False
    ) -> str:
        """The conversation as text."""
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=self.template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **self.template_kwargs,
            )
        # Templates refuse with TemplateError and stumble with TypeError.
        except (TemplateError, TypeError) as error:
            raise ValueError(f"{where}: the chat template refuses this row: {error}") from error
        return text

    def turns(self, messages: Sequence[Message], text: str, where: str) -> list[Turn]:
        """Find the assistant's turns in ``text``, the rendered conversation."""
        found = []
        last = 0
        for index, end in self._ends(messages, text, where).items():
            message = messages[index]
            here = f"{where}, message {index}"
            content = _start_of(message["content"].strip(), text, end)
            if content is None or content < last:
                raise ValueError(
                    f"{here}: the chat template rewrites this assistant turn (templates of "
                    f"thinking models strip thoughts from earlier turns); {_WAY_OUT}"
                )
            start = max(last, self._takeover(messages, index, text, content, where))
            for name in _REASONING:
                thought = message.get(name) or ""
                if squashed(thought) not in squashed(text[start:content]):
                    raise ValueError(
                        f"{here}: the chat template drops {name!r} of this turn; {_WAY_OUT}"
                    )
            last = self._stop(text, end, here)
            found.append(Turn(start, content, end, last))
        return found

    def _ends(self, messages: Sequence[Message], text: str, where: str) -> dict[int, int]:
        """Where each assistant's text ends in ``text``, by index of the message."""
        sign = next(c for c in map(chr, _PRIVATE_USE) if c not in text)
        marks, marked = {}, []
        for index, message in enumerate(messages):
            if message["role"] == ASSISTANT:
                content = message["content"]
                marks[index] = f"{sign}{index}{sign}"
                # In front of trailing white space, which a template may trim.
                kept = content.rstrip()
                message = {**message, "content": kept + marks[index] + content[len(kept) :]}
            marked.append(message)
        rendered = self.render(marked, where)
        ends = {}
        for index, mark in marks.items():
            before, found, after = rendered.partition(mark)
            if not found:
                raise ValueError(
                    f"{where}, message {index}: the chat template drops this assistant turn; "
                    f"{_WAY_OUT}"
                )
            ends[index] = len(before)
            rendered = before + after
        if rendered != text:
            raise ValueError(
                f"{where}: the chat template rewrites the assistant's text, so what is trained "
                f"can't be told; {_WAY_OUT}"
            )
        return ends

    def _takeover(
        self, messages: Sequence[Message], index: int, text: str, content: int, where: str
    ) -> int:
        """Where the model takes over in turn ``index``, at ``content`` the latest."""
        if index > 0:
            before = messages[:index]
            try:
                prompt = self.render(before, where, generation_prompt=True)
                closed = self.render(before, where)
            # A template may refuse a conversation that ends here, and yet take the whole.
            except ValueError:
                prompt = closed = ""
            if prompt != closed and text.startswith(prompt):
                return min(len(prompt), content)
        # There is no generation prompt: the space in front belongs to the first word's token.
        while content > 0 and text[content - 1] == " ":
            content -= 1
        return content

    def _stop(self, text: str, end: int, here: str) -> int:
        """Behind the token that ends a turn whose text ends at ``end``."""
        token_start = end + len(text[end:]) - len(text[end:].lstrip())
        for token in self._added:
            if text.startswith(token, token_start):
                return token_start + len(token)
        raise ValueError(
            f"{here}: the chat template puts no special token behind the assistant's text, so the "
            f"model would not learn to stop (it goes on with {text[end : end + 20]!r}); pass a "
            "template that ends the turn with one, such as the EOS token"
        )

    def _check_end_of_turn(self, messages: Sequence[Message], where: str) -> None:
        """Once: a turn must end with a token of its own, not with the next turn's header."""
        first = next(i for i, message in enumerate(messages) if message["role"] == ASSISTANT)
        if first + 1 < len(messages):
            alone = messages[: first + 1]
            self.turns(alone, self.render(alone, where), where)
        self._seen_to_end = True

    def _by_markers(
        self, messages: Sequence[Message], turns: list[Turn], text: str, where: str
    ) -> Encoded:
        encoding = self.tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=self.template,
            return_dict=True,
            return_assistant_tokens_mask=True,
            **self.template_kwargs,
        )
        mask = [bool(on) for on in encoding["assistant_masks"]]
        if not any(mask):
            raise ValueError(
                f"{where}: the mask of trained tokens is off everywhere; the template's generation "
                "markers must enclose the assistant's text and its end-of-turn token"
            )
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
                    f"out a part of its {what}; they must enclose both"
                )
            white = len(text[turn.stop :]) - len(text[turn.stop :].lstrip())
            own = token_range(encoding, turn.start, turn.stop + white)
            allowed[own.start : own.stop] = [True] * len(own)
        outside = [i for i, (on, own) in enumerate(zip(mask, allowed, strict=True)) if on > own]
        if outside:
            tokens = self.tokenizer.convert_ids_to_tokens(encoding["input_ids"])
            raise ValueError(
                f"{where}: the template's generation markers train on {len(outside)} tokens that "
                f"are not the assistant's, the first is token {outside[0]} "
                f"({tokens[outside[0]]!r}); correct the markers"
            )


def _start_of(content: str, text: str, end: int) -> int | None:
    """Where ``content`` starts if it stands in front of ``end``, up to white space."""
    if text.endswith(content, 0, end):
        return end - len(content)
    position = end
    for char in reversed(squashed(content)):
        while position > 0 and text[position - 1].isspace():
            position -= 1
        if position == 0 or text[position - 1] != char:
            return None
        position -= 1
    return position
