"""Rows from every kind of source, and errors that name file and line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import datasets
import pytest
from pyarrow import parquet

from iwsft.datasets.text.rows import Row, check_scores, read, to_row

CHAT = {
    "messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "vier 😀"}]
}
PAIR = {"prompt": "2+2=", "completion": "4"}
SCORED = [
    {**PAIR, "score": 0.5, "weight": 2, "correct": True},
    {**PAIR, "score": -1, "weight": 0.0, "correct": 0},
]


def jsonl(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def contents(rows: list[Row]) -> list[tuple[Any, ...]]:
    return [(r.messages, r.prompt, r.completion, r.score, r.weight, r.correct) for r in rows]


EXPECTED = [
    (None, "2+2=", "4", 0.5, 2, True),
    (None, "2+2=", "4", -1.0, 0, False),
]


def test_json_lines_name_their_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(SCORED[0]) + "\n\n  \n" + json.dumps(SCORED[1]))
    rows = read(path)
    assert contents(rows) == EXPECTED
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:4"]


def test_json_arrays_parquet_folders_and_saved_datasets_hold_the_same_rows(tmp_path):
    array = tmp_path / "data.json"
    array.write_text(json.dumps(SCORED))
    # Parquet and Arrow have one type a column.
    typed = [{**SCORED[0]}, {**SCORED[1], "score": -1.0, "weight": 0, "correct": False}]
    table = datasets.Dataset.from_list(typed)
    table.to_parquet(str(tmp_path / "data.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"good": table}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "folder").mkdir()
    jsonl(tmp_path / "folder" / "train.jsonl", typed)
    cache = tmp_path / "cache"
    assert contents(read(array)) == EXPECTED
    assert contents(read(tmp_path / "data.parquet")) == EXPECTED
    assert contents(read(str(tmp_path / "saved"))) == EXPECTED
    assert contents(read(tmp_path / "splits", split="good")) == EXPECTED
    assert contents(read(tmp_path / "folder", cache_dir=cache)) == EXPECTED
    assert read(tmp_path / "data.parquet")[1].where.endswith("data.parquet row 1")
    with pytest.raises(ValueError, match="split 'train'"):
        read(tmp_path / "splits")
    with pytest.raises(ValueError, match="split 'test'"):
        read(tmp_path / "folder", split="test", cache_dir=cache)


def test_keys_that_arrow_fills_with_none_are_absent_from_messages(tmp_path):
    records = [CHAT, {"messages": [{"role": "assistant", "content": "a", "thinking": "t"}]}]
    datasets.Dataset.from_list(records).to_parquet(str(tmp_path / "chat.parquet"))
    rows = read(tmp_path / "chat.parquet")
    assert [dict(m) for m in rows[0].messages or ()] == CHAT["messages"]
    assert rows[1].messages == ({"role": "assistant", "content": "a", "thinking": "t"},)


def turn(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"question": "a", "answer": "b"}, "column 'prompt' is missing.*question, answer"),
        ({"prompt": "a"}, "column 'completion' is missing"),
        ({"conversations": []}, "column 'prompt' is missing.*conversations"),
        ({"prompt": "a", "completion": " \n"}, "the completion is empty"),
        ({"prompt": 3, "completion": "a"}, "prompt must be text, it is of type int"),
        ({"prompt": "a", "completion": "\ud800"}, "half a surrogate pair at character 0"),
        ({"messages": "hello"}, "messages must be a list"),
        ({"messages": []}, "no assistant turn to train on"),
        ({"messages": [turn("user", "a")]}, "no assistant turn to train on"),
        ({"messages": [turn("user", "a"), turn("assistant", " ")]}, "message 1: content is empty"),
        ({"messages": [turn("gpt", "a")]}, "a role of system, .*this is .*'gpt'"),
        ({"messages": [turn("narrator", "a")]}, "a role of system, .*this is .*'narrator'"),
        ({"messages": [turn("assistant", [{"text": "a"}])]}, "content must be text, it is of type"),
        ({"messages": ["a"]}, "a message is {role, content} .*this is 'a'"),
        ({**PAIR, "score": math.nan}, "score must be a finite number, it is nan"),
        ({**PAIR, "score": math.inf}, "score must be a finite number, it is inf"),
        ({**PAIR, "score": "good"}, "score must be a finite number, it is 'good'"),
        ({**PAIR, "score": True}, "score must be a finite number, it is True"),
        ({**PAIR, "weight": 0.5}, "weight must be how often .*it is 0.5"),
        ({**PAIR, "weight": -1}, "weight must be how often .*it is -1"),
        ({**PAIR, "weight": math.inf}, "weight must be how often .*it is inf"),
        ({**PAIR, "correct": "yes"}, "correct must be true or false, it is 'yes'"),
        ([1], "a row is an object of columns, this is of type list"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path, record, error):
    path = jsonl(tmp_path / "bad.jsonl", [PAIR, record])
    with pytest.raises(ValueError, match=error) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:2")


def test_files_that_can_not_be_read(tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(json.dumps(PAIR).encode() + b'\n{"prompt": "a", ')
    with pytest.raises(ValueError, match=r"broken.jsonl:2: this line is not JSON"):
        read(broken)
    broken.write_bytes(b'{"prompt": "a", "completion": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match=r"broken.jsonl:1: this line is not JSON"):
        read(broken)
    (tmp_path / "broken.json").write_text("[1, 2")
    with pytest.raises(ValueError, match="broken.json:1: this line is not JSON"):
        read(tmp_path / "broken.json")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing of the kind PAR1")
    with pytest.raises(ValueError, match="broken.parquet row 0: the file can.t be read as Parquet"):
        read(tmp_path / "broken.parquet")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="empty.jsonl: there is no row"):
        read(tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError, match="no file .*none.jsonl"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(ValueError, match="data.csv is not data that can be read: .*.jsonl"):
        read(tmp_path / "data.csv")
    with pytest.raises(ValueError, match="not data that can be read"):
        read("https://example.org/data set")


@pytest.mark.parametrize("error", [ConnectionError("offline"), FileNotFoundError("no such name")])
def test_a_named_dataset_that_can_not_be_had_is_named(monkeypatch, error):
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    # The network alone is replaced; what the library raises there is passed on by name.
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    kind = ConnectionError if isinstance(error, ConnectionError) else ValueError
    with pytest.raises(kind, match="'owner/name' can't be"):
        read("owner/name")


def test_scores_must_be_there_and_tell_rows_apart():
    rows = [to_row({**PAIR, "score": score}, f"f:{score}") for score in (1.0, 2.0, 1.0)]
    check_scores(rows)
    with pytest.raises(ValueError, match=r"all 2 scores are 1 \(from f:1.0 on\)"):
        check_scores([rows[0], rows[2]])
    with pytest.raises(ValueError, match="f:9: there is no score"):
        check_scores([*rows, to_row(PAIR, "f:9")])


def test_other_columns_by_a_function(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", [{"question": "2+2=", "answer": "4"}])

    def make(record: Any, where: str) -> Row:
        return to_row({"prompt": record["question"], "completion": record["answer"]}, where)

    assert contents(read(path, make=make)) == [(None, "2+2=", "4", None, None, None)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_of_any_layout(tmp_path, encoding, suffix):
    path = tmp_path / f"data{suffix}"
    pretty = json.dumps(PAIR, indent=2)
    for text in (json.dumps([PAIR, PAIR]), f"[{pretty},\n{pretty}]", f"\n{pretty}\n{pretty}\n"):
        path.write_text(text, encoding=encoding)
        assert contents(read(path)) == [(None, "2+2=", "4", None, None, None)] * 2
    assert [row.where for row in read(path)] == [f"{path}:2", f"{path}:6"]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"prompt": "a", "completion": "good", "completion": "bad"}', "an object has a key twice"),
        ('{"prompt": "a", "completion": "b", "score": ' + "9" * 5000 + "}", "limit"),
        ('{"prompt": "a", "completion": "b", "x": ' + "[" * 10**5 + "]" * 10**5 + "}", "recursion"),
        ('{"prompt": "a", "completion": "b"},', "Expecting value"),
        (json.dumps({**PAIR, "score": 10**400}), "score must be a finite number"),
        (json.dumps({**PAIR, "weight": 10**400}), "weight must be"),
        (
            json.dumps({"messages": [turn("assistant", "a") | {"reasoning": ["hm"]}]}),
            "message 0: reasoning must be text",
        ),
        (
            json.dumps({"messages": [turn("assistant", None) | {"tool_calls": [{"f": 1}]}]}),
            "message 0: the name of a tool call must be text, it is missing",
        ),
        (
            json.dumps({"messages": [turn("assistant", "a") | {"function_call": {"name": "f"}}]}),
            "message 0: function_call is an old form; write it as tool_calls",
        ),
        (json.dumps({**CHAT, "tools": "look_up"}), "tools is not JSON"),
        (json.dumps({**CHAT, "tools": [3]}), "a tool must be a JSON schema"),
        (json.dumps({**CHAT, "chat_template_kwargs": [1]}), "kwargs must be an object"),
    ],
)
def test_damaged_and_odd_json_is_named_with_its_line(tmp_path, text, error):
    path = tmp_path / "bad.jsonl"
    path.write_text(json.dumps(PAIR) + "\n" + text + "\n")
    with pytest.raises(ValueError, match=f"bad.jsonl:2.*{error}"):
        read(path)


def test_damaged_parquet_is_named_with_its_row(tmp_path):
    path = tmp_path / "bad.parquet"
    rows = [{**PAIR, "prompt": "good"}, {**PAIR, "prompt": "the "}]
    table = datasets.Dataset.from_list(rows).data.table
    parquet.write_table(table, path, compression="none", use_dictionary=False)
    path.write_bytes(path.read_bytes().replace(b"the ", b"th\xe9 "))
    with pytest.raises(ValueError, match="bad.parquet row 1: .*write it again"):
        read(path)


def test_nulls_of_arrow_inside_records_are_absent_and_those_of_json_stay(tmp_path):
    def calling(**arguments: Any) -> dict[str, Any]:
        call = {"function": {"name": "f", "arguments": arguments}}
        return {"messages": [{"role": "assistant", "content": "", "tool_calls": [call]}]}

    def arguments(rows: list[Row]) -> list[Any]:
        calls = [(row.messages or ())[0]["tool_calls"][0] for row in rows]
        return [call["function"]["arguments"] for call in calls]

    records = [calling(a=1), calling(b={"c": "x"}), calling(b={"d": 2})]
    expected = [{"a": 1}, {"b": {"c": "x"}}, {"b": {"d": 2}}]
    table = datasets.Dataset.from_list(records)
    table.to_parquet(str(tmp_path / "calls.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    for source in (table, tmp_path / "calls.parquet", tmp_path / "saved", records):
        assert arguments(read(source)) == expected
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "calls.jsonl", tmp_path / "folder" / "train.jsonl"):
        jsonl(path, [calling(a=None), *records])
    for source in (tmp_path / "calls.jsonl", tmp_path / "folder"):
        assert arguments(read(source)) == [{"a": None}, *expected]


def test_data_in_memory_and_splits_that_would_change_nothing(tmp_path):
    table = datasets.Dataset.from_list([PAIR])
    assert read([PAIR])[0].completion == read(table)[0].completion == "4"
    assert read(datasets.DatasetDict({"good": table}), split="good")[0].where.endswith("row 0")
    with pytest.raises(ValueError, match="no split 'train', only good"):
        read(datasets.DatasetDict({"good": table}))
    path = jsonl(tmp_path / "data.jsonl", [PAIR])
    table.save_to_disk(str(tmp_path / "saved"))
    for source in (path, tmp_path / "saved", table):
        with pytest.raises(ValueError, match="split"):
            read(source, split="test")
    with pytest.raises(FileNotFoundError, match="no file ~nobody-of-that-name/data.jsonl"):
        read("~nobody-of-that-name/data.jsonl")
