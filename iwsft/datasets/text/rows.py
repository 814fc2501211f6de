"""Rows of text for fine-tuning: chat messages, or a prompt and its completion.

    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    {"prompt": "2+2=", "completion": "4", "score": 0.7, "weight": 0.5, "correct": true}

They come from JSON, Parquet, a folder, or a Hugging Face dataset. Five columns are optional:
``score`` (higher is better, for ``iwsft.curate``), ``weight`` (data weight, any number, or a list
with one for each token), ``count`` (how often the row counts, a whole number), ``correct`` (whether
a checker accepted it) and ``ref_log_probs`` (log-probability of each token under the policy that
wrote the row, which is then its reference; 0 where a token is not trained on). An assistant's
message may have a ``weight``, too. Rows with ``messages`` may have what the chat template reads:
``tools``, ``documents`` and ``chat_template_kwargs``. Other columns are not read, such as ids; one
warning names them. A row is refused where one of them would change its text or its training.
"""

from __future__ import annotations

import json
import math
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from iwsft.datasets.text.names import SWITCHES, WRONG, counts_less, objection, snake_case
from iwsft.datasets.text.sources import Record, lists_records, records, row_named

Message = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
ASSISTANT = "assistant"
REASONING = ("reasoning_content", "reasoning", "thinking")
# Names of a turn's data weight.
_WEIGHTS = ("weight", "loss_weight", "loss_scale")
# Other names that say which turns are trained on.
_OTHER_SWITCHES = ("mask", "loss_mask", "train_detail")
# Columns whose text belongs to a conversation.
_TEXTS = (
    *("prompt", "completion", "system", "system_prompt", "history", "context", "instruction"),
    *("input", "documents", "instructions", "system_message", "preamble", *REASONING),
)
_MEDIA = ("image", "images", "audio", "audios", "video", "videos")
# Arguments of a rendering that are not the row's.
_RESERVED = (
    *("messages", "add_generation_prompt", "continue_final_message", "chat_template"),
    *("conversations", "tokenize", "return_assistant_tokens_mask", "return_dict"),
)


@dataclass(frozen=True)
class Row:
    """A trajectory as text: ``messages``, or ``prompt`` and ``completion``.

    A ValueError says that a value does not fit, as in :func:`to_row`.

    Attributes:
        where: File and line of the row, for errors.
        messages: Conversation, or None.
        prompt: Text that is not trained on; it may be empty.
        completion: Text that is trained on, or None where there are messages.
        score: Finite quality, or None.
        weight: Data weight of the row, or of each of its tokens, or None.
        count: How often the row counts, at least 0, or None.
        correct: Whether a checker accepted the row, or None.
        ref_log_probs: log pi_ref of each of its tokens, or None for the model to train.
        template_kwargs: The row's own variables of the chat template, such as ``tools``.
        unread: Names of the columns that are not in the row.
    """

    where: str
    messages: tuple[Message, ...] | None = None
    prompt: str = ""
    completion: str | None = None
    score: float | None = None
    weight: float | tuple[float, ...] | None = None
    count: int | None = None
    correct: bool | None = None
    ref_log_probs: tuple[float, ...] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        with row_named(self.where):
            for name in _OPTIONAL:
                object.__setattr__(self, name, _optional(getattr(self, name), name))
            if self.messages is not None:
                _check_answered(self.messages)


def read(
    source: str | Path | Iterable[Record],
    *,
    split: str | None = None,
    config: str | None = None,
    make: Callable[[Record, str], Row] | None = None,
) -> list[Row]:
    """Read all rows of a source, in their order.

    Args:
        source: File, folder, name of a dataset, or records in memory; for this, ``split``
            and ``config`` see :func:`iwsft.datasets.text.sources.records`.
        split: Split of a folder or dataset that has several, "train" by default.
        config: Configuration of a named dataset, where it has several.
        make: Function from a record and its place to a row, for data with other columns (see
            ``iwsft.datasets.text.s1k``); :func:`to_row` by default.

    Raises:
        ValueError: There is no row, or a row can't be trained on, besides the errors of
            ``records``; the message names the file and the row.
    """
    rows: list[Row] = []
    for where, record in records(source, split, config):
        rows.append((make or to_row)(record, where))
        if not isinstance(rows[-1], Row):
            raise TypeError(f"{where}: make must return a Row, not {type(rows[-1]).__name__}")
    if not rows:
        raise ValueError(f"{source}: there is no row in it")
    if unread := dict.fromkeys(name for row in rows for name in row.unread):
        names, read_ones = (", ".join(map(repr, own)) for own in (unread, _OPTIONAL))
        problem = f"not read: {names}"
        warnings.warn(f"{rows[0].where}: {problem}; training reads {read_ones}", stacklevel=2)
    return rows


def to_row(record: Record, where: str) -> Row:
    """Make a row from a record with ``messages``, or with ``prompt`` and ``completion``.

    Raises:
        ValueError: A column is missing, a role is unknown, there is no assistant turn, a completion
            is empty, a score or a weight is not finite, a count is not a whole number from 0 on, or
            another column would change the text or the training. The error names ``where``, the
            record's place.
    """
    # Values of numpy and torch, which records in memory may hold.
    record = {name: x.tolist() if hasattr(x, "tolist") else x for name, x in record.items()}
    optional: dict[str, Any] = {name: record.get(name) for name in _OPTIONAL}
    row = Row(where, **optional)
    with row_named(where):
        parts = _conversation(record) if record.get("messages") is not None else _pair(record)
    return replace(row, **parts)


def _conversation(record: Record) -> dict[str, Any]:
    """Return the parts of a row with messages."""
    messages, variables = _messages(record["messages"]), _template_kwargs(record)
    read = {"messages", "tools", "documents", "chat_template_kwargs"}
    unread = _check_unread(record, read, messages)
    return {"messages": messages, "template_kwargs": variables, "unread": unread}


def _pair(record: Record) -> dict[str, Any]:
    """Return the parts of a row with a prompt and its completion."""
    for column in ("prompt", "completion"):
        if column not in record:
            columns = ", ".join(map(str, record)) or "none"
            way_out = f"rename one of the columns ({columns})"
            if "input_ids" in record:
                way_out = "rows are text, which iwsft tokenises: give the text of 'input_ids'"
            if lists := [name for name, value in record.items() if lists_records(value)]:
                way_out = f"save the list {lists[0]!r} as the whole file"
            raise ValueError(f"column {column!r} is missing, and so is 'messages'; {way_out}")
    prompt = check_text(record["prompt"], "prompt")
    completion = check_text(record["completion"], "the completion", filled=True)
    turns = ({"role": "user", "content": prompt}, {"role": ASSISTANT, "content": completion})
    unread = _check_unread(record, ("prompt", "completion"), turns)
    return {"prompt": prompt, "completion": completion, "unread": unread}


def check_scores(rows: Sequence[Row]) -> None:
    """Check that all rows have a score, not all the same; call it before they are tokenised."""
    for row in rows:
        if row.score is None:
            raise ValueError(f"{row.where}: there is no score; add it, or train on all rows")
    if len(rows) > 1 and len({row.score for row in rows}) == 1:
        equal = f"all {len(rows)} scores are {rows[0].score:g} (from {rows[0].where} on)"
        raise ValueError(f"{equal}; pass other scores, or train on all rows")


def check_text(value: Any, name: str, *, filled: bool = False) -> str:
    """Return a value that is text that can be tokenised; with ``filled`` more than white space."""
    if not isinstance(value, str):
        # The content of a message is in messages already.
        other = "" if name == "content" else ", or write 'messages'"
        parts = f"; join its texts{other}" if isinstance(value, list) else ""
        raise ValueError(f"{name} must be text, it is {_kind(value)}{parts}")
    if filled and not value.strip():
        raise ValueError(f"{name} is empty; drop the row, or fill it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"{name} has half a surrogate pair at character {error.start}"
        raise ValueError(f"{half}; drop the row") from error
    return value


def check_answer(value: Any) -> str:
    """Return a right answer, which is a text or a number, as text."""
    if not isinstance(value, str) and not is_number(value):
        raise ValueError(f"the answer must be text or a finite number, it is {value!r:.60}")
    return check_text(str(value), "the answer", filled=True)


def _messages(value: Any) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"messages must be a list, it is {_kind(value)}")
    messages = []
    for turn, message in enumerate(value):
        with row_named(f"message {turn}"):
            messages.append(_message(message))
    _check_answered(messages)
    return tuple(messages)


def _check_answered(messages: Iterable[Message]) -> None:
    if not any(message.get("role") == ASSISTANT for message in messages):
        raise ValueError("there is no assistant turn to train on; drop the row")


def _message(value: Any) -> Message:
    role = value.get("role") if isinstance(value, Mapping) else None
    if role not in ROLES:
        form = f"{{role, content}} with a role of {', '.join(ROLES)}"
        raise ValueError(f"a message is {form}, this is {value!r:.60}")
    # Templates test whether a key exists.
    message = {key: entry for key, entry in value.items() if entry is not None}
    if "function_call" in message:
        raise ValueError("function_call is an old form; write it as tool_calls")
    calls = message.get("tool_calls") or ()
    if calls and role != ASSISTANT:
        raise ValueError("only the assistant calls tools; drop the message's tool_calls")
    filled = role == ASSISTANT and not calls
    check_text(message.setdefault("content", ""), "content", filled=filled)
    for name in message.keys() & set(REASONING):
        check_text(message[name], name)
    for call in calls if isinstance(calls, Sequence) else [calls]:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        name = function.get("name") if isinstance(function, Mapping) else None
        check_text(name, "the name of a tool call", filled=True)
    _check_media(message)
    weight = turn_weight(message)
    return message if weight == 1 else {**message, "weight": weight}


def turn_weight(message: Message) -> float:
    """Data weight of a message's turn by any of the usual names; 0 where it is not trained on."""
    weights, trained = set(), set()
    for name in (*_WEIGHTS, *SWITCHES):
        if (value := message.get(name)) is None:
            continue
        if name in _WEIGHTS:
            if not is_number(value) and value not in (True, False):
                raise ValueError(f"{name} must be a finite number, it is {value!r:.60}")
            weight = float(value)
            weights.add(weight)
        elif value in (True, False):
            weight = float(value == SWITCHES[name])
        else:
            raise ValueError(f"{name} must be 0 or 1, it is {value!r:.60}")
        tolerated = (0.0, 1.0) if name in ("weight", "loss_weight") else (0.0,)
        if message["role"] != ASSISTANT and weight not in tolerated:
            raise ValueError(f"only the assistant's turns are trained on; drop {name!r}")
        trained.add(weight != 0)
    for name in message if message["role"] == ASSISTANT else ():
        other = name in _OTHER_SWITCHES and message[name] != []
        if other or (name not in _WEIGHTS and counts_less(name, message[name])):
            raise ValueError(f"{name!r} is not read; write it as a 'weight'")
    if len(trained) > 1:
        raise ValueError("one says that the turn is trained on, another that it is not")
    if len(weights) > 1:
        raise ValueError(f"the turn has the weights {sorted(weights)}; keep one of them")
    return 0.0 if trained == {False} else (weights or {1.0}).pop()


def untrained(message: Message) -> dict[str, Any]:
    """The message with the weight 0, and no other word on whether it is trained on."""
    kept = {name: message[name] for name in message if name not in (*_WEIGHTS, *SWITCHES)}
    return {**kept, "weight": 0}


def _check_media(record: Mapping[str, Any]) -> None:
    for name in _MEDIA:
        if record.get(name):
            raise ValueError(f"{name!r} can't be trained on, only text; drop the row")


def _check_unread(
    record: Record, read: Collection[str], turns: Sequence[Message]
) -> tuple[str, ...]:
    """Check that columns that are not read change neither text nor training; return their names."""
    _check_media(record)
    for name, value in record.items():
        lower = snake_case(name)
        if name != lower in _READ and record.get(lower) != value:
            raise ValueError(f"column {name!r} is not read; write it as {lower!r}, or drop it")
        if (instead := objection(name, value)) == WRONG:
            if record.get("correct") in (None, True):
                problem = f"column {name!r} says that the row is wrong, and is not read"
                raise ValueError(f"{problem}; write {instead}, or drop it")
        elif instead is not None:
            raise ValueError(f"column {name!r} is not read; write it as {instead}, or drop it")
    if record.get("functions"):
        raise ValueError("'functions' is an old form; write them as 'tools'")
    if "tools" not in read and record.get("tools"):
        raise ValueError("'tools' need 'messages'; write the row so, or drop them")
    place = "messages" if "messages" in read else "prompt"
    for name in _TEXTS:
        parts = [] if name in read else [_plain(part) for part in _strings(record.get(name))]
        text = _plain("".join(_strings(turns))) if parts else ""
        if any(part not in text for part in parts):
            problem = f"the text of column {name!r} is not in {place!r}"
            raise ValueError(f"{problem}; write it there, or drop the column")
    chosen, rejected = ([*map(_plain, _strings(record.get(n)))] for n in ("chosen", "rejected"))
    answer = _plain(next(turn["content"] for turn in reversed(turns) if turn["role"] == ASSISTANT))
    if (chosen and answer not in "".join(chosen)) or answer in rejected[-1:]:
        way_out = "correct it, or drop 'chosen' and 'rejected'"
        raise ValueError(f"the answer is not that of column 'chosen'; {way_out}")
    given = (name for name, value in record.items() if value not in (None, "", [], {}))
    return tuple(name for name in given if name not in {*read, *_OPTIONAL})


def _strings(value: Any) -> Iterator[str]:
    """Iterate over the texts of a value, without the roles of messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from () if key in ("role", "from", "type") else _strings(entry)
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _strings(entry)


def _plain(text: str) -> str:
    return "".join(text.split()).casefold()


def _template_kwargs(record: Record) -> dict[str, Any]:
    """Return what the row's chat template reads beside the messages; JSON text is parsed."""
    variables = _parsed(record.get("chat_template_kwargs") or {}, "chat_template_kwargs")
    if not isinstance(variables, Mapping):
        raise ValueError("chat_template_kwargs must be an object")
    variables = dict(variables)
    for name in _RESERVED:
        if name in variables:
            raise ValueError(f"{name!r} can't be in chat_template_kwargs; drop it")
    for name, kind in {"tools": "a JSON schema", "documents": "an object"}.items():
        entries = _parsed(record.get(name) or [], name)
        if not isinstance(entries, list | tuple):
            raise ValueError(f"{name} must be a list; correct or drop it")
        entries = [_parsed(entry, f"an entry of {name}") for entry in entries]
        if not all(isinstance(entry, Mapping) for entry in entries):
            raise ValueError(f"an entry of {name} must be {kind}; correct or drop it")
        if entries and variables.get(name) not in (None, [], entries):
            raise ValueError(f"chat_template_kwargs has other {name}; drop one of the two")
        variables.update({name: entries} if entries else {})
    return variables


def _parsed(value: Any, name: str) -> Any:
    try:
        return json.loads(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"{name} is not JSON ({error}); mend or drop it") from error


def is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) <= sys.float_info.max


_COUNT = "how often the row is drawn, 0, 1, 2, ..."
# The type of an optional column, what fits it, and that in words.
_OPTIONAL: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "score": (float, is_number, "a finite number"),
    "weight": (float, is_number, "a finite number, or a list with one for each token"),
    "count": (int, lambda x: is_number(x) and x >= 0 and x == int(x), _COUNT),
    "correct": (bool, lambda x: x in (True, False), "true or false"),
    "ref_log_probs": (tuple, lambda _: False, "a list with a number of at most 0 for each token"),
}
# Columns that are read, some in one kind of row alone.
_READ = {"messages", "prompt", "completion", *_OPTIONAL}


def _optional(value: Any, name: str) -> Any:
    if value is None:
        return None
    kind, fits, rule = _OPTIONAL[name]
    if name in ("weight", "ref_log_probs") and isinstance(value, list | tuple):
        # Up to rounding: probabilities are no log-probabilities.
        most = math.inf if name == "weight" else 1e-3
        kind, fits = tuple, lambda numbers: all(is_number(x) and x <= most for x in numbers)
    if not fits(value):
        raise ValueError(f"{name} must be {rule}, it is {repr(value):.60}")
    if name == "ref_log_probs" and _are_rounded(value):
        problem = f"{name} are rounded to half precision, and so would be importance weights"
        raise ValueError(f"{problem}; compute them from logits.float(), or drop them")
    return kind(value)


def _are_rounded(log_probs: Iterable[float]) -> bool:
    """Whether log-probs have the digits of bfloat16 or float16 alone, whatever holds them now."""
    # A few, and those near 0, may have no other digits by chance.
    x = torch.tensor([*{x for x in log_probs if x < -0.1}], dtype=torch.float64)
    half = (torch.bfloat16, torch.float16)
    return len(x) >= 8 and any(torch.equal(x, x.to(dtype).double()) for dtype in half)


def _kind(value: Any) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"
