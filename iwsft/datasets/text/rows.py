"""Rows of text for fine-tuning: chat messages, or a prompt and its completion.

    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]}
    {"prompt": "2+2=", "completion": "4", "score": 0.7, "weight": 3, "correct": true}

They come from JSON lines, Parquet, a folder, or a Hugging Face dataset by name. Three columns are
optional: ``score`` (higher is better, for ``iwsft.curate``), ``weight`` (how often the row counts,
a whole number) and ``correct`` (whether a checker accepted it).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Message = Mapping[str, Any]
Record = Mapping[str, Any]

ROLES = ("system", "developer", "user", "assistant", "tool")
ASSISTANT = "assistant"
_SUFFIXES = (".jsonl", ".json", ".parquet")
_HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# The type of an optional column, and its rule for errors.
_OPTIONAL: dict[str, tuple[type, str]] = {
    "score": (float, "a finite number"),
    "weight": (int, "how often the row is drawn, 0, 1, 2, ... (for quality use a 'score')"),
    "correct": (bool, "true or false"),
}


@dataclass(frozen=True)
class Row:
    """A trajectory as text: ``messages``, or ``prompt`` and ``completion``.

    Attributes:
        where: File and line of the row, for errors.
        messages: Conversation, or None.
        prompt: Text that is not trained on; it may be empty.
        completion: Text that is trained on, or None where there are messages.
        score: Finite quality, or None.
        weight: How often the row counts, at least 0, or None.
        correct: Whether a checker accepted the row, or None.
    """

    where: str
    messages: tuple[Message, ...] | None = None
    prompt: str = ""
    completion: str | None = None
    score: float | None = None
    weight: int | None = None
    correct: bool | None = None


def read(
    source: str | Path,
    *,
    split: str = "train",
    config: str | None = None,
    make: Callable[[Record, str], Row] | None = None,
    cache_dir: str | Path | None = None,
) -> list[Row]:
    """Read all rows of a source, in their order.

    Args:
        source: A ``.jsonl``, ``.json`` (lines, or one array) or ``.parquet`` file; a folder
            (written by ``Dataset.save_to_disk``, or with such files); or the name of a Hugging Face
            dataset, which ``datasets`` downloads and caches.
        split: Split of a folder or a named dataset; a file has none.
        config: Configuration of a named dataset, where it has several.
        make: Function from a record and its place to a row, for data with other columns (see
            ``iwsft.datasets.text.s1k``); :func:`to_row` by default.
        cache_dir: Folder in which ``datasets`` caches; its own by default.

    Raises:
        FileNotFoundError: The file does not exist.
        ValueError: The kind of source, the split or the dataset is unknown, there is no row, or a
            row can't be trained on; the message names the file and the line.
        ConnectionError: The named dataset can't be reached.
    """
    make = to_row if make is None else make
    rows = [make(record, where) for where, record in records(source, split, config, cache_dir)]
    if not rows:
        raise ValueError(f"{source}: there is no row in it")
    return rows


def records(
    source: str | Path,
    split: str = "train",
    config: str | None = None,
    cache_dir: str | Path | None = None,
) -> Iterator[tuple[str, Record]]:
    """Iterate over the unchanged records of a source, each with its place; see :func:`read`."""
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_datasets(str(path), split, config, cache_dir)
    if path.suffix.lower() in _SUFFIXES:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        return _parquet(path) if path.suffix.lower() == ".parquet" else _json(path)
    if isinstance(source, Path) or path.exists() or not _HUB_NAME.fullmatch(str(source)):
        raise ValueError(
            f"{source} is not data that can be read: pass a folder, the name of a Hugging Face "
            f"dataset, or a file that ends in {', '.join(_SUFFIXES)}"
        )
    return _from_datasets(str(source), split, config, cache_dir)


def to_row(record: Record, where: str) -> Row:
    """Make a row from a record with ``messages``, or with ``prompt`` and ``completion``.

    Args:
        record: Columns by name; those that :class:`Row` does not have are ignored.
        where: Place of the record, for errors.

    Raises:
        ValueError: A column is missing, a role is unknown, there is no assistant turn, a completion
            is empty, a score is NaN, or a weight is not a whole number from 0 on.
    """
    row = Row(where, **{name: _optional(record.get(name), name, where) for name in _OPTIONAL})
    if record.get("messages") is not None:
        return replace(row, messages=_messages(record["messages"], where))
    for column in ("prompt", "completion"):
        if record.get(column) is None:
            raise ValueError(
                f"{where}: column {column!r} is missing, and so is 'messages'; rename the columns "
                f"({', '.join(map(str, record)) or 'none'}), or pass make="
            )
    prompt = check_text(record["prompt"], "prompt", where)
    completion = check_text(record["completion"], "the completion", where, filled=True)
    return replace(row, prompt=prompt, completion=completion)


def check_scores(rows: Sequence[Row]) -> None:
    """Check that rows can be ranked; call it before they are tokenised and curated.

    Raises:
        ValueError: A row has no score, or all scores are equal.
    """
    for row in rows:
        if row.score is None:
            raise ValueError(f"{row.where}: there is no score; add it, or train on all rows")
    if len(rows) > 1 and len({row.score for row in rows}) == 1:
        raise ValueError(
            f"all {len(rows)} scores are {rows[0].score:g} (from {rows[0].where} on); pass other "
            "scores, or train on all rows"
        )


def check_text(value: Any, name: str, where: str, *, filled: bool = False) -> str:
    """Return a value that is text that can be tokenised; with ``filled`` more than white space.

    Raises:
        ValueError: It is something else; the error names it.
    """
    if not isinstance(value, str):
        raise ValueError(f"{where}: {name} must be text, it is {_kind(value)}")
    if filled and not value.strip():
        raise ValueError(f"{where}: {name} is empty; drop the row, or fill it")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: {name} has half a surrogate pair at character {error.start}; drop the row"
        ) from error
    return value


def _messages(value: Any, where: str) -> tuple[Message, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{where}: messages must be a list, it is {_kind(value)}")
    messages = tuple(
        _message(message, f"{where}, message {turn}") for turn, message in enumerate(value)
    )
    if not any(message["role"] == ASSISTANT for message in messages):
        raise ValueError(f"{where}: there is no assistant turn to train on; drop the row")
    return messages


def _message(value: Any, where: str) -> Message:
    role = value.get("role") if isinstance(value, Mapping) else None
    if role not in ROLES:
        raise ValueError(
            f"{where}: a message is {{role, content}} with a role of {', '.join(ROLES)}, this is "
            f"{value!r:.60}"
        )
    # Arrow gives every message all keys of all messages; templates test whether a key exists.
    message = {key: entry for key, entry in value.items() if entry is not None}
    filled = role == ASSISTANT and not message.get("tool_calls")
    check_text(message.setdefault("content", ""), "content", where, filled=filled)
    return message


def _optional(value: Any, name: str, where: str) -> Any:
    if value is None:
        return None
    kind, rule = _OPTIONAL[name]
    if kind is bool:
        right = value in (True, False)
    else:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        right = number and math.isfinite(value)
        right = right and (kind is float or (value >= 0 and value == int(value)))
    if not right:
        raise ValueError(f"{where}: {name} must be {rule}, it is {value!r}")
    return kind(value)


def _json(path: Path) -> Iterator[tuple[str, Record]]:
    with path.open("rb") as file:
        array = path.suffix.lower() == ".json" and file.read(64).lstrip().startswith(b"[")
        file.seek(0)
        values: Iterable[tuple[str, Any]]
        if array:
            parsed = _parse(file.read(), f"{path}: this file")
            values = ((f"{path} row {number}", value) for number, value in enumerate(parsed))
        else:
            lines = ((f"{path}:{number}", line) for number, line in enumerate(file, 1))
            values = ((at, _parse(line, f"{at}: this line")) for at, line in lines if line.strip())
        for where, value in values:
            if not isinstance(value, Mapping):
                raise ValueError(f"{where}: a row is an object of columns, this is {_kind(value)}")
            yield where, value


def _parse(text: bytes, what: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{what} is not JSON ({error}); mend or drop it") from error


def _parquet(path: Path) -> Iterator[tuple[str, Record]]:
    import pyarrow  # type: ignore[import-untyped]
    from pyarrow import parquet

    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for record in batch.to_pylist():
                    yield f"{path} row {number}", record
                    number += 1
    except pyarrow.ArrowException as error:
        raise ValueError(
            f"{path} row {number}: the file is not Parquet from here on ({error}); write it again"
        ) from error


def _from_datasets(
    name: str, split: str, config: str | None, cache_dir: str | Path | None
) -> Iterator[tuple[str, Record]]:
    import datasets  # type: ignore[import-untyped]

    files = (Path(name) / "state.json", Path(name) / "dataset_dict.json")
    try:
        # Written by `save_to_disk`.
        if any(file.exists() for file in files):
            data = datasets.load_from_disk(name)
            if isinstance(data, datasets.DatasetDict):
                data = data[split]
        else:
            cache = None if cache_dir is None else str(cache_dir)
            data = datasets.load_dataset(name, config, split=split, cache_dir=cache)
    except ConnectionError as error:
        raise ConnectionError(f"{name!r} can't be reached ({error}); pass a file") from error
    # DatasetNotFoundError and EmptyDatasetError are FileNotFoundErrors.
    except (KeyError, ValueError, FileNotFoundError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{name!r} can't be loaded (split {split!r}, configuration {config!r}): {error}"
        ) from error
    for number, record in enumerate(data):
        yield f"{name} [{split}] row {number}", record


def _kind(value: Any) -> str:
    return "missing" if value is None else f"of type {type(value).__name__}"
