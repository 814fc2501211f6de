"""Where the messages are in a rendered conversation, and which of its text is trained on.

A mark inside each message's text, rendered along, shows where the template writes it, so a message
that the template has no place for is found out, and text that looks like a header is text. No list
of model families and headers is needed.
"""

from __future__ import annotations

import json
import re
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from os.path import commonprefix
from typing import Any, NamedTuple

from iwsft.datasets.text.encoding import Stretch, squash
from iwsft.datasets.text.rows import ASSISTANT, REASONING, Message

# Letters that templates and JSON write as they are; one that the text lacks begins and ends marks.
_SIGNS = range(0xA000, 0xA48D)
WAY_OUT = "pass a template that keeps it, or drop it from the data"
_END = "end the turn in the template with a special token of the tokenizer"


class Rendered(NamedTuple):
    """A conversation's text, and what of it is between generation markers."""

    text: str
    marked: list[Stretch]


Render = Callable[..., Rendered]


class Conversation:
    """A rendered conversation and the place of each message in it.

    ``render`` renders messages, with ``prompt=True`` and the generation prompt; ``special`` finds
    the special token behind a position, white space apart. A ValueError says what the template
    refuses, drops or rewrites.
    """

    def __init__(
        self,
        messages: Sequence[Message],
        render: Render,
        special: Callable[[str, int], Stretch | None],
        eos: str,
    ) -> None:
        self.messages, self._render = messages, render
        self._special, self._eos = special, eos
        self.text, self.marked = render(messages)
        self._places = self._find_places()
        self._stops = [0, *sorted(place.stop for place in self._places.values())]
        self._prompts: dict[str, str] = {}

    def find_turns(self) -> dict[Stretch, float]:
        """Find the assistant's turns, from the generation prompt to their ends, and the weights."""
        turns = {}
        last = 0
        for index, message in enumerate(self.messages):
            if message["role"] != ASSISTANT:
                continue
            place = self._places[index]
            start = max(last, self._find_start(index))
            self._check_reasoning(index, self.text[start : place.start])
            token = self._end_of_turn(index)
            behind = self._special(self.text, token.stop)
            # A second token belongs to the turn where it is the EOS.
            if behind and self._eos == self.text[slice(*behind)] != self.text[slice(*token)]:
                token = behind
            last = token.stop
            turns[Stretch(start, last)] = float(message.get("weight", 1))
        return turns

    def check_end(self, index: int, alone: Conversation) -> None:
        """Check that a turn's end token is the same where the conversation ends with this turn."""
        token, last = self._end_of_turn(index), alone._end_of_turn(index)
        following = min(place.start for place in self._places.values() if place.start >= token.stop)
        own = self.text[slice(*token)]
        if own != alone.text[slice(*last)] and not self.text[token.stop : following].strip():
            raise self._error(index, f"{own!r} begins the next message", _END)

    def check_marked(self) -> dict[Stretch, float]:
        """Check what the generation markers enclose; return it with the weights of the turns.

        They must enclose all of an answer, its end and its tool calls, and no other message's text.
        """
        if not self.marked:
            raise ValueError("the template's generation markers enclose nothing")
        turns = dict.fromkeys(self.marked, 1.0)
        for index, message in enumerate(self.messages):
            place, gap = self._places.get(index), self._gap(index)
            if message["role"] == ASSISTANT:
                own = [x for x in self.marked if gap.start <= x.start and x.stop <= gap.stop]
                self._check_own(index, place, own, gap)
                turns |= dict.fromkeys(own, float(message.get("weight", 1)))
                if own or message.get("weight", 1) == 1:
                    continue
            if place and any(x.start < place.stop and place.start < x.stop for x in self.marked):
                joined = message["role"] == ASSISTANT
                what = "the weights of two turns" if joined else "text that is not the assistant's"
                raise self._marker_error(index, f"enclose {what}")
        return turns

    def _gap(self, index: int) -> Stretch:
        """The stretch between the texts of the messages before and after one."""
        before = (place.stop for other, place in self._places.items() if other < index)
        after = (place.start for other, place in self._places.items() if other > index)
        return Stretch(max(before, default=0), min(after, default=len(self.text)))

    def _check_own(
        self, index: int, place: Stretch | None, own: Sequence[Stretch], gap: Stretch
    ) -> None:
        """Check the marked stretches ``own`` of an assistant's message, if there are any."""
        calls = self.messages[index].get("tool_calls")
        begin, end = place or (gap.stop, gap.start)
        if own and place:
            if not any(part.start <= begin and end <= part.stop for part in own):
                raise self._marker_error(index, "leave out a part of its text")
            token = self._end_of_turn(index) if not calls else place
            if not any(part.start <= begin and token.stop <= part.stop for part in own):
                raise self._marker_error(index, "leave out a part of its end-of-turn token")
        parts = own or [gap]
        self._check_reasoning(index, "".join(self.text[slice(*part)] for part in parts))
        if calls:
            self._check_calls(
                index, "".join(self.text[max(end, part.start) : part.stop] for part in parts)
            )
            behind = self._special(self.text, parts[-1].stop)
            if own and behind and self.text[slice(*behind)] == self._eos:
                raise self._marker_error(index, "leave out a part of its end-of-turn token")

    def _check_calls(self, index: int, text: str) -> None:
        """Check that a template writes the name and the arguments of each tool call."""
        message = self.messages[index]
        for name in REASONING:
            if message.get(name):
                text = text.replace(message[name].strip(), "")
        text = squash(text)
        forms = [form for call in message["tool_calls"] for form in _call_forms(call)]
        # A short text may be in a longer one, so the longest are taken out first.
        for form in sorted(forms, key=lambda form: len(form[0]), reverse=True):
            written = next((option for option in form if option in text), None)
            if written is None:
                raise self._error(index, f"the chat template drops {form[0][:60]!r} of a tool call")
            text = text.replace(written, "\0", 1)

    def _check_reasoning(self, index: int, text: str) -> None:
        for name in REASONING:
            if squash(self.messages[index].get(name) or "") not in squash(text):
                raise self._error(index, f"the chat template drops {name!r}")

    def _find_places(self) -> dict[int, Stretch]:
        """Find the text of each message that has some."""
        sign = next(c for c in map(chr, _SIGNS) if c not in self.text)
        # A template may look at the ends of a text, or for a word in it, and write another one.
        for middle in (True, False):
            both = [_marked(m, f"{sign}{k}{sign}", middle) for k, m in enumerate(self.messages)]
            marked, cuts = zip(*both, strict=True)
            pieces = re.split(f"{sign}([0-9]+){sign}", self._render(marked).text)
            unchanged = "".join(pieces[::2]) == self.text
            if unchanged:
                break
        positions: dict[int, list[int]] = {}
        position = 0
        for piece, mark in zip(pieces[::2], pieces[1::2], strict=False):
            position += len(piece)
            positions.setdefault(int(mark), []).append(position)
        places: dict[int, Stretch] = {}
        last = 0
        for index, cut in enumerate(cuts):
            if cut is None:
                continue
            role = self.messages[index]["role"]
            turn = "assistant turn" if role == ASSISTANT else f"{role} message"
            if index not in positions:
                raise self._error(index, f"the chat template drops this {turn}")
            place = _place(self.messages[index], cut, positions[index][0], self.text)
            twice = role == ASSISTANT and len(positions[index]) > 1
            if place is None or twice or (role == ASSISTANT and place.start < last):
                raise self._error(index, f"the chat template rewrites this {turn}")
            last = place.stop if role == ASSISTANT else last
            places[index] = place
        if not unchanged:
            raise ValueError(f"the chat template rewrites a message; {WAY_OUT}")
        return places

    def _find_start(self, index: int) -> int:
        """Find the end of the generation prompt in front of an assistant's text."""
        place = self._places[index]
        low = self._stops[bisect(self._stops, place.start) - 1]
        prompt = self._prompt(index)
        begin = self.text.find(prompt, low, place.start) if prompt else -1
        if begin >= 0:
            return begin + len(prompt)
        # Without a generation prompt, the space before the text belongs to its first token.
        start = place.start
        while self.text[start - 1 : start] == " ":
            start -= 1
        return start

    def _prompt(self, index: int) -> str:
        """Return the generation prompt behind a message with the role of the one before."""
        before = self.messages[:index]
        if not before:
            return ""
        role = before[-1]["role"]
        if role not in self._prompts:
            try:
                prompt, closed = (self._render(before, prompt=on).text for on in (True, False))
            # A template may refuse a conversation that ends here, and yet accept the whole.
            except ValueError:
                prompt = closed = ""
            self._prompts[role] = prompt[len(commonprefix([prompt, closed])) :]
        return self._prompts[role]

    def _end_of_turn(self, index: int) -> Stretch:
        """Find the special token behind an assistant's text."""
        end = self._places[index].stop
        token = self._special(self.text, end)
        if token is None:
            behind = f"{self.text[end : end + 20]!r} follows the assistant's text"
            raise self._error(index, f"{behind}, not a special token", _END)
        return token

    def _marker_error(self, index: int, what: str) -> ValueError:
        return self._error(index, f"the generation markers {what}", "correct the markers")

    def _error(self, index: int, what: str, way_out: str = WAY_OUT) -> ValueError:
        return ValueError(f"message {index}: {what}; {way_out}")


def _marked(message: Message, mark: str, middle: bool) -> tuple[Message, int | None]:
    """Put a mark into a message's text; return the message and the position in its text."""
    content, own = message["content"], message["content"].strip()
    assistant = message["role"] == ASSISTANT
    if not own and (not assistant or message.get("tool_calls")):
        return message, None
    cut = len(own) // 2 if middle and not assistant else len(own)
    lead = len(content) - len(content.lstrip())
    return {**message, "content": content[: lead + cut] + mark + content[lead + cut :]}, cut


def _place(message: Message, cut: int, position: int, text: str) -> Stretch | None:
    """Return the stretch of a message's text around a position; None where the text differs."""
    own = message["content"].strip()
    if message["role"] == ASSISTANT:
        start = _find_content(own, text, position)
        return None if start is None else Stretch(start, position)
    front, back = own[:cut], own[cut:]
    # Where the template rewrites the text, the character at the position is taken for it.
    start = position - (len(front) if text.endswith(front, 0, position) else not back)
    return Stretch(start, position + (len(back) if text.startswith(back, position) else 1))


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


def _call_forms(call: Mapping[str, Any]) -> Iterator[list[str]]:
    """Iterate over the texts of a tool call, each in the forms that a template may give it."""
    function = call.get("function", call)
    yield [squash(function["name"])]
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        # As JSON inside JSON it would be another call.
        yield [squash(arguments)]
    else:
        for value in _leaves(arguments):
            forms = [json.dumps(value, ensure_ascii=False), json.dumps(value), repr(value)]
            if isinstance(value, str):
                forms = [value, *(form[1:-1] for form in forms)]
            yield [squash(form) for form in forms]


def _leaves(value: Any) -> Iterator[Any]:
    """Iterate over the keys and values of an argument that are neither objects nor arrays."""
    if isinstance(value, Mapping):
        for key, entry in value.items():
            yield key
            yield from _leaves(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _leaves(entry)
    elif value is not None:
        yield value
