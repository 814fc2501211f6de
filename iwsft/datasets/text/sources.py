"""Records of data with their places: JSON, Parquet, folders, Hugging Face datasets."""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

from iwsft.extras import require

Record = Mapping[str, Any]

_SUFFIXES = (".jsonl", ".json", ".parquet")
# Files of rows that would be left out beside those of another kind.
_TABLES = {".jsonl", ".parquet", ".csv", ".tsv"}
# Perhaps with a commit, a branch or a tag.
_HUB_NAME = re.compile(r"([\w-][\w.-]*(?:/[\w-][\w.-]*)?)(?:@([\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NOT_SPACE = re.compile(r"\S")


def records(
    source: str | Path | Iterable[Record],
    split: str | None = None,
    config: str | None = None,
) -> Iterator[tuple[str, Record]]:
    """Iterate over the records of a source, each with its place, see :func:`iwsft.language.read`.

    ``source`` is a ``.jsonl``, ``.json`` or ``.parquet`` file; a folder (written by
    ``Dataset.save_to_disk``, or with such files); the name of a Hugging Face dataset, perhaps with
    a commit (``NAME@COMMIT``); or records in memory. Arrow, which Parquet files and datasets are,
    gives every record the keys of all records. So a null inside a column is dropped there, the
    data's own too. JSON keeps it.
    """
    for where, record in _values(source, split, config):
        if not isinstance(record, Mapping):
            kind = type(record).__name__
            raise ValueError(f"{where}: a row is an object of columns, this is of type {kind}")
        yield where, record


def dataset_commit(name: str, config: str | None = None) -> str:
    """Return the commit of a dataset of the hub, without a network that of the copy here."""
    require("datasets")
    import datasets  # type: ignore[import-untyped]

    name, _, revision = name.partition("@")
    return str(datasets.load_dataset_builder(name, config, revision=revision or None).hash)


def lists_records(value: Any) -> bool:
    """Whether a column lists records, and not the messages of a conversation."""
    listed = value if isinstance(value, list) else []
    return any(isinstance(x, Mapping) and not x.keys() & {"role", "from"} for x in listed)


@contextmanager
def row_named(where: str) -> Iterator[None]:
    """Name the place of a row in a ValueError of the block."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _values(source: Any, split: str | None, config: str | None) -> Iterator[tuple[str, Any]]:
    if not isinstance(source, str | Path):
        return _from_memory(source, "these records", split)
    path = Path(os.path.expanduser(source))
    if path.is_dir():
        return _from_datasets(str(path), split, config)
    if path.suffix.lower() in _SUFFIXES:
        if not path.is_file():
            raise FileNotFoundError(f"there is no file {path}")
        if split is not None or config is not None:
            raise ValueError(f"{path} is a file without splits and configurations; don't name one")
        return _parquet(path) if path.suffix.lower() == ".parquet" else _json(path)
    is_path = isinstance(source, Path) or path.exists() or path.suffix.lower() in _TABLES
    named = None if is_path else _HUB_NAME.fullmatch(str(source))
    if named is None:
        files = f"a file that ends in {', '.join(_SUFFIXES)}"
        way_out = f"pass a folder, the name of a Hugging Face dataset, or {files}"
        raise ValueError(f"{source} is not data that can be read: {way_out}")
    return _from_datasets(named[1], split, config, named[2])


def _json(path: Path) -> Iterator[tuple[str, Any]]:
    data = path.read_bytes()
    decoder = json.JSONDecoder(object_pairs_hook=_object)
    line, last, end = 1, 0, 0
    try:
        text = data.decode(json.detect_encoding(data))
        while found := _NOT_SPACE.search(text, end):
            start, is_first = found.start(), end == 0
            line, last = line + text.count("\n", last, start), start
            value, end = decoder.raw_decode(text, start)
            if isinstance(value, list) and is_first:
                yield from ((f"{path} row {number}", entry) for number, entry in enumerate(value))
            else:
                yield f"{path}:{line}", value
    # A number may have too many digits, and a value may be nested too deeply.
    except (ValueError, RecursionError) as error:
        if isinstance(error, UnicodeDecodeError):
            line += data.count(b"\n", 0, error.start)
            problem = f"this line is not UTF-8 ({error}); save the file as UTF-8"
            raise ValueError(f"{path}:{line}: {problem}") from error
        raise ValueError(f"{path}:{line}: this line is not JSON ({error}); drop it") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise ValueError("an object has a key twice")
    return result


def _parquet(path: Path) -> Iterator[tuple[str, Record]]:
    require("pyarrow")
    from pyarrow import parquet  # type: ignore[import-untyped]

    def rows() -> Iterator[Record]:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                for row in range(batch.num_rows):
                    yield batch.slice(row, 1).to_pylist()[0]

    return _of_arrow(rows(), str(path))


def _of_arrow(rows: Iterable[Record], name: str) -> Iterator[tuple[str, Record]]:
    number = 0
    try:
        for record in rows:
            cells = {column: _without_nulls(value) for column, value in record.items()}
            yield f"{name} row {number}", cells
            number += 1
    # Arrow's errors of damaged data are of these types, or derive from them.
    except (ValueError, TypeError, OSError, LookupError, NotImplementedError) as error:
        damage = f"the data can't be read from here on ({_line(error)})"
        raise ValueError(f"{name} row {number}: {damage}; write it again") from error


def _from_memory(data: Any, name: str, split: str | None) -> Iterator[tuple[str, Any]]:
    if isinstance(data, Mapping):
        split = split or "train"
        if split not in data:
            problem = f"{name} have no split {split!r}, only {', '.join(map(str, data))}"
            raise ValueError(f"{problem}; name one of these, or pass a list of records")
        name, data = f"{name} [{split}]", data[split]
    elif split not in (None, str(getattr(data, "split", None))):
        raise ValueError(f"{name} have no split {split!r}; leave split= out")
    if type(data).__module__.startswith("pandas."):
        raise ValueError("a DataFrame is not read; pass data.to_dict('records')")
    if type(data).__module__.startswith("datasets."):
        return _of_arrow(data, name)
    return ((f"{name} row {number}", record) for number, record in enumerate(data))


def _kind(path: Path) -> str:
    """The suffix of a file; none of one that datasets leaves out, as in ``.git``."""
    hidden = any(part.startswith((".", "__")) for part in path.parts)
    return "" if hidden else path.suffix.lower()


def _holds_json(folder: Path, split: str) -> bool:
    """Whether datasets would read a ``.json`` file of a folder, were there no other kind."""
    from datasets.data_files import (  # type: ignore[import-untyped]
        DataFilesDict,
        get_data_patterns,
    )
    from huggingface_hub import DatasetCard
    from huggingface_hub.constants import REPOCARD_NAME

    card = folder / REPOCARD_NAME
    # The card says what the data are.
    if card.is_file() and DatasetCard.load(card).data.to_dict().get("configs"):
        return False
    files = DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
    return any(Path(file).suffix.lower() == ".json" for file in files.get(split, ()))


def _from_datasets(
    name: str, split: str | None, config: str | None, revision: str | None = None
) -> Iterator[tuple[str, Record]]:
    require("datasets")
    import datasets

    folder = Path(name)
    # Written by `save_to_disk`.
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        if config is not None:
            raise ValueError(f"{name} has no configurations; leave config= out")
        try:
            saved = datasets.load_from_disk(name)
        # Files are missing or damaged in many ways.
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{name} is damaged ({_line(error)}); save it again") from error
        return _from_memory(saved, name, split)
    split = split or "train"
    try:
        if folder.is_dir():
            builder = datasets.load_dataset_builder(name, config)
            splits = {str(key): files for key, files in (builder.config.data_files or {}).items()}
            files = [Path(file) for file in splits.get(split, ())]
            suffixes = {file.suffix for file in files}
            # datasets takes the commonest kind of a folder's files.
            kinds = {_kind(file.relative_to(folder)) for file in folder.rglob("*")}
            others = kinds & _TABLES - suffixes
            # A .json file may be about the data; it is data where datasets would take it.
            if ".json" in kinds - suffixes and _holds_json(folder, split):
                others.add(".json")
            if files and others and config is None:
                listed = ", ".join(sorted({*suffixes, *others}))
                way_out = f"keep one, pass a file, or {name}:{split}:CONFIG of its dataset card"
                raise ValueError(f"files of several kinds ({listed}); {way_out}")
            # JSON is read without Arrow, which has one type a column.
            if files and suffixes <= {".json", ".jsonl"}:
                return chain.from_iterable(map(_json, files))
            if suffixes == {".parquet"}:
                return chain.from_iterable(map(_parquet, files))
        if revision is not None:
            commit = datasets.load_dataset_builder(name, config, revision=revision).hash
            # Without the hub, datasets takes the newest copy, whatever the revision.
            if _COMMIT.fullmatch(revision) and commit != revision:
                raise ValueError(
                    f"the newest copy here is of commit {commit}, not {revision}; "
                    "run where the hub can be reached, or pass a file"
                )
        data = datasets.load_dataset(name, config, split=split, revision=revision)
    except ConnectionError as error:
        raise ConnectionError(f"{name!r} can't be reached ({error}); pass a file") from error
    # DatasetNotFoundError and EmptyDatasetError are FileNotFoundErrors.
    except (KeyError, ValueError, OSError, datasets.exceptions.DatasetsError) as error:
        part, reason = f"split {split!r}, configuration {config!r}", error.__cause__ or error
        raise ValueError(f"{name!r} can't be loaded ({part}): {_line(reason)}") from error
    return _from_memory(data, f"{name} [{split}]", None)


def _line(error: BaseException) -> str:
    """The text of an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _without_nulls(value: Any) -> Any:
    """Drop the keys without a value inside a column."""
    if isinstance(value, Mapping):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list):
        return [_without_nulls(entry) for entry in value]
    return value
