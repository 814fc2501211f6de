"""From conversations to token ids and the mask of the assistant's text, by a chat template.

A template with generation markers (``{% generation %}``) marks the text to train on itself. With
any other template the turns are found in the rendered conversation. They are checked in both cases.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from typing import Any

from iwsft.datasets.text.encoding import Encoded, Stretch, check_tokenizer, encode_stretches
from iwsft.datasets.text.rows import ASSISTANT, Message
from iwsft.datasets.text.sources import row_named
from iwsft.datasets.text.turns import WAY_OUT, Conversation, Rendered

_MARKERS = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")
# Keys of a message with text of their own.
_MESSAGE_KEYS = (
    *("tools", "functions", "documents", "context", "tool_plan", "tool_call", "thought"),
    *("thoughts", "rationale", "reasoning_details", "thinking_blocks", "attachments"),
)
# A conversation that shows how a template writes one.
_PROBE = ({"role": "user", "content": "ask"}, {"role": ASSISTANT, "content": "reply"})


class ChatEncoder:
    """Encodes conversations with a tokenizer's chat template.

    Ids are those of ``tokenizer.apply_chat_template``, except that without generation markers a
    token never straddles the generation prompt and the answer (see ``encode_stretches``).

    The arguments are those of :func:`iwsft.language.tokenize`.
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
            way_out = "pass template=, or give rows with 'prompt' and 'completion'"
            raise ValueError(f"the tokenizer has no chat template; {way_out}")
        self.tokenizer = tokenizer
        self.template: str = tokenizer.get_chat_template(template)
        self.template_kwargs = dict(template_kwargs or {})
        self.has_markers = _MARKERS.search(self.template) is not None
        added = (str(token) for token in tokenizer.added_tokens_decoder.values())
        # The longest first: one token may be the start of another.
        tokens = sorted((token for token in added if token.strip()), key=len, reverse=True)
        self._special = re.compile(rf"\s*({'|'.join(map(re.escape, tokens)) or '(?!)'})")
        self._checked_end = False

    def encode(
        self,
        messages: Sequence[Message],
        where: str = "this row",
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> Encoded:
        """Encode a conversation; each assistant's turn and its end are trained on.

        The data weight of an assistant's message is its ``weight``; turns of 0 are not trained on.
        ``template_kwargs`` are the row's own variables of the template, such as ``tools``. A
        ValueError names ``where`` and what the template refuses, drops, rewrites or marks wrongly.
        """
        variables = {**self.template_kwargs, **(template_kwargs or {})}
        with row_named(where):
            self._check_keys(messages)
            conversation = self._conversation(messages, variables)
            self._check_variables(conversation, variables)
            text = conversation.text
            if self.has_markers:
                stretches = conversation.check_marked()
                return encode_stretches(self.tokenizer, text, stretches, cut=False)
            stretches = conversation.find_turns()
            self._check_end_of_turn(conversation, variables)
            return encode_stretches(self.tokenizer, text, stretches)

    def _check_keys(self, messages: Sequence[Message]) -> None:
        """Check that the template reads what the messages hold beside their contents."""
        if not self.has_markers and any(message.get("tool_calls") for message in messages):
            way_out = "pass such a template=, or drop the row"
            raise ValueError(f"tool calls need a chat template with generation markers; {way_out}")
        for index, message in enumerate(messages):
            for name in _MESSAGE_KEYS:
                if message.get(name) and name not in self._keys:
                    drops = f"message {index}: the chat template drops {name!r}"
                    raise ValueError(f"{drops}; {WAY_OUT}")

    def _check_variables(self, conversation: Conversation, variables: Mapping[str, Any]) -> None:
        """Check that the template writes the tools and the documents of a row."""
        tools = variables.get("tools") or ()
        unread = tools and not self._reads("tools", conversation, variables)
        for tool in tools:
            name = str(tool.get("function", tool).get("name", ""))
            if unread or name not in conversation.text:
                way_out = "pass a template that writes tools, or drop them from the data"
                raise ValueError(f"the chat template drops the tool {name!r}; {way_out}")
        if variables.get("documents") and not self._reads("documents", conversation, variables):
            way_out = "write them into a message, or drop the column"
            raise ValueError(f"the chat template drops the documents; {way_out}")

    def _conversation(
        self, messages: Sequence[Message], variables: Mapping[str, Any]
    ) -> Conversation:
        render = partial(self._render, variables=variables)
        return Conversation(messages, render, self._find_special, self.tokenizer.eos_token)

    @cached_property
    def variables(self) -> frozenset[str]:
        """Names of the variables that the template reads."""
        from jinja2 import meta

        return frozenset(meta.find_undeclared_variables(self._program))

    @cached_property
    def _keys(self) -> frozenset[str]:
        """Names of the keys that the template may read."""
        from jinja2 import nodes

        attributes = self._program.find_all(nodes.Getattr)
        texts = self._program.find_all(nodes.Const)
        return frozenset(node.attr for node in attributes) | {str(node.value) for node in texts}

    @cached_property
    def _program(self) -> Any:
        from jinja2 import Environment, TemplateSyntaxError

        environment = Environment(extensions=["jinja2.ext.loopcontrols"])
        try:
            return environment.parse(_MARKERS.sub("", self.template))
        except TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not one ({error}); pass another") from error

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether the template reads contents as lists of parts only, as some with images do."""
        for parts in (False, True):
            try:
                text = self._render(_PROBE, self.template_kwargs, parts=parts).text
            except ValueError:
                continue
            if "ask" in text and "reply" in text:
                return parts
        return False

    def _render(
        self,
        messages: Sequence[Message],
        variables: Mapping[str, Any],
        *,
        parts: bool | None = None,
        prompt: bool = False,
    ) -> Rendered:
        """Render a conversation as text, with its contents as ``parts`` if the template does so."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        chat = [dict(message) for message in messages]
        if self._reads_parts if parts is None else parts:
            chat = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in chat]
        try:
            rendered: Any = render_jinja_template(
                [chat],
                chat_template=self.template,
                return_assistant_tokens_mask=self.has_markers,
                add_generation_prompt=prompt,
                **{**self.tokenizer.special_tokens_map, **variables},
            )
        # A template is a program: it may refuse a row with TemplateError, or fail in any way.
        except (TemplateError, ArithmeticError, AttributeError, LookupError, TypeError) as error:
            raise ValueError(f"the chat template refuses this row: {error}") from error
        except (ValueError, RecursionError, MemoryError) as error:
            raise ValueError(f"the chat template fails on this row: {error}") from error
        (text,), marked = rendered
        stretches: list[Stretch] = []
        for start, stop in marked[0] if marked else ():
            if stretches and stretches[-1].stop == start:
                start = stretches.pop().start
            if start < stop:
                stretches.append(Stretch(start, stop))
        return Rendered(text, stretches)

    @cached_property
    def turn_end(self) -> str | None:
        """The special token that the template writes after an assistant's turn, if any."""
        try:
            text = self._render(_PROBE, self.template_kwargs).text
        except ValueError:
            return None
        found = self._find_special(text, text.rfind("reply") + len("reply"))
        return None if found is None else text[slice(*found)]

    def _reads(self, name: str, conversation: Conversation, variables: Mapping[str, Any]) -> bool:
        """Whether a conversation reads otherwise without a variable: messages may name it too."""
        without = {key: value for key, value in variables.items() if key != name}
        try:
            text = self._render(conversation.messages, without).text
        except ValueError:
            return True
        return text != conversation.text

    def _find_special(self, text: str, position: int) -> Stretch | None:
        """Find the special token behind a position, white space apart."""
        match = self._special.match(text, position)
        return None if match is None else Stretch(*match.span(1))

    def _check_end_of_turn(self, conversation: Conversation, variables: Mapping[str, Any]) -> None:
        """Check once that a turn ends with its own token, not with the next turn's header."""
        messages = conversation.messages
        first = next(i for i, message in enumerate(messages) if message["role"] == ASSISTANT)
        if not self._checked_end and first + 1 < len(messages):
            alone = self._conversation(messages[: first + 1], variables)
            conversation.check_end(first, alone)
            self._checked_end = True
