"""Rows from every kind of source, and errors that name file and line."""

from __future__ import annotations

import json
import math
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from row_records import CHAT, PAIR, contents, jsonl, turn

from iwsft.datasets.text.rows import Row, check_scores, read, to_row

SCORED = [
    {**PAIR, "score": 0.5, "weight": -0.5, "count": 2, "correct": True},
    {**PAIR, "score": -1, "weight": 3, "count": 0.0, "correct": 0},
]


EXPECTED = [
    (None, "2+2=", "4", 0.5, -0.5, 2, True),
    (None, "2+2=", "4", -1.0, 3.0, 0, False),
]


def test_json_lines_name_their_line(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(SCORED[0]) + "\n\n  \n" + json.dumps(SCORED[1]))
    rows = read(path)
    assert contents(rows) == EXPECTED
    assert [row.where for row in rows] == [f"{path}:1", f"{path}:4"]


def test_json_arrays_parquet_folders_and_saved_datasets_hold_the_same_rows(tmp_path, monkeypatch):
    array = tmp_path / "data.json"
    array.write_text(json.dumps(SCORED))
    # Parquet and Arrow have one type a column.
    more = {"score": -1.0, "weight": 3.0, "count": 0, "correct": False}
    typed = [{**SCORED[0]}, {**SCORED[1], **more}]
    table = datasets.Dataset.from_list(typed)
    table.to_parquet(str(tmp_path / "data.parquet"))
    table.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"good": table}).save_to_disk(str(tmp_path / "splits"))
    (tmp_path / "folder").mkdir()
    jsonl(tmp_path / "folder" / "train.jsonl", typed)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    assert contents(read(array)) == EXPECTED
    assert contents(read(tmp_path / "data.parquet")) == EXPECTED
    assert contents(read(str(tmp_path / "saved"))) == EXPECTED
    assert contents(read(tmp_path / "splits", split="good")) == EXPECTED
    assert contents(read(tmp_path / "folder")) == EXPECTED
    assert read(tmp_path / "data.parquet")[1].where.endswith("data.parquet row 1")
    with pytest.raises(ValueError, match="split 'train'"):
        read(tmp_path / "splits")
    with pytest.raises(ValueError, match="split 'test'"):
        read(tmp_path / "folder", split="test")


def test_keys_that_arrow_fills_with_none_are_absent_from_messages(tmp_path):
    records = [CHAT, {"messages": [{"role": "assistant", "content": "a", "thinking": "t"}]}]
    datasets.Dataset.from_list(records).to_parquet(str(tmp_path / "chat.parquet"))
    rows = read(tmp_path / "chat.parquet")
    assert [dict(m) for m in rows[0].messages or ()] == CHAT["messages"]
    assert rows[1].messages == ({"role": "assistant", "content": "a", "thinking": "t"},)


@pytest.mark.parametrize(
    ("record", "error"),
    [
        ({"question": "a", "answer": "b"}, "column 'prompt' is missing.*question, answer.$"),
        ({"prompt": "a"}, "column 'completion' is missing"),
        ({"input_ids": [1], "labels": [1]}, "'prompt' is missing.*rows are text.*of 'input_ids'"),
        ({"conversations": []}, "column 'prompt' is missing.*conversations"),
        ({"conversations": [{"from": "gpt", "value": "a"}]}, "rename .*columns .conversations.$"),
        ({"version": 1, "data": [PAIR]}, "missing.*save the list 'data' as the whole file$"),
        ({"prompt": "a", "completion": None}, "the completion must be text, it is missing"),
        ({"prompt": "a", "completion": " \n"}, "the completion is empty"),
        ({"prompt": 3, "completion": "a"}, "prompt must be text, it is of type int"),
        ({"prompt": [], "completion": "a"}, "prompt .* type list; join its texts, or write 'mes"),
        ({"prompt": "a", "completion": "\ud800"}, "half a surrogate pair at character 0"),
        ({"messages": "hello"}, "messages must be a list"),
        ({"messages": []}, "no assistant turn to train on"),
        ({"messages": [turn("user", "a")]}, "no assistant turn to train on"),
        ({"messages": [turn("user", "a"), turn("assistant", " ")]}, "message 1: content is empty"),
        ({"messages": [turn("gpt", "a")]}, "a role of system, .*this is .*'gpt'"),
        ({"messages": [turn("narrator", "a")]}, "a role of system, .*this is .*'narrator'"),
        ({"messages": [turn("assistant", [{"text": "a"}])]}, "be text, .* list; join its texts$"),
        ({"messages": ["a"]}, "a message is {role, content} .*this is 'a'"),
        ({**PAIR, "score": math.nan}, "score must be a finite number, it is nan"),
        ({**PAIR, "score": math.inf}, "score must be a finite number, it is inf"),
        ({**PAIR, "score": "good"}, "score must be a finite number, it is 'good'"),
        ({**PAIR, "score": True}, "score must be a finite number, it is True"),
        ({**PAIR, "count": 0.5}, "count must be how often .*it is 0.5"),
        ({**PAIR, "count": -1}, "count must be how often .*it is -1"),
        ({**PAIR, "weight": math.inf}, "weight must be a finite number, or a list .*it is inf"),
        ({**PAIR, "weight": math.nan}, "weight must be a finite number, .*it is nan"),
        ({**PAIR, "weight": "0.5"}, "weight must be a finite number, .*it is '0.5'"),
        ({**PAIR, "weight": [1, "a"]}, "weight must be .*it is .1, 'a'"),
        ({**PAIR, "correct": "yes"}, "correct must be true or false, it is 'yes'"),
        ([1], "a row is an object of columns, this is of type list"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path, record, error):
    path = jsonl(tmp_path / "bad.jsonl", [PAIR, record])
    with pytest.raises(ValueError, match=error) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}:2")


@pytest.mark.parametrize(
    "switch",
    [
        *({"train": False}, {"train": 0}, {"training": False}, {"loss": 0.0}, {"masked": True}),
        {"loss_scale": 0, "train": False, "weight": 0},
    ],
)
def test_turns_that_data_of_other_programs_leaves_out_weigh_0(switch):
    on = {name: not value for name, value in switch.items()}
    messages = [turn("user", "q"), turn("assistant", "BAD") | switch, turn("assistant", "b") | on]
    row = to_row({"messages": [turn("user", "q") | switch, *messages]}, "f:1")
    assert [message.get("weight", 1) for message in row.messages or ()][2:] == [0, 1]


@pytest.mark.parametrize(
    ("more", "weight"),
    [
        *(({name: x}, x) for name in ("weight", "loss_weight", "loss_scale") for x in (0.5, -2, 3)),
        ({"weight": True, "train": 1}, 1),
        ({"weight": 0.25, "loss_scale": 0.25, "loss": True, "masked": False}, 0.25),
    ],
)
def test_weights_of_a_turn_by_the_names_of_other_programs(more, weight):
    row = to_row({"messages": [turn("user", "q"), turn("assistant", "a") | more]}, "f:1")
    assert row.messages[1].get("weight", 1) == weight
    with pytest.raises(ValueError, match="message 0: only the assistant's turns are trained on"):
        to_row({"messages": [turn("user", "q") | {"weight": 0.5}, *row.messages]}, "f:1")


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"weight": "0.5"}, "message 1: weight must be a finite number, it is '0.5'"),
        ({"loss_scale": math.nan}, "message 1: loss_scale must be a finite number, it is nan"),
        ({"loss_weight": [1, 0]}, "message 1: loss_weight must be a finite number"),
        ({"weight": 0.5, "loss_scale": 2}, r"message 1: the turn has the weights \[0.5, 2.0\]"),
        ({"weight": 0.5, "train": False}, "message 1: one says that the turn is trained on"),
        ({"train": "false"}, "message 1: train must be 0 or 1, it is 'false'"),
        ({"loss": 0.5}, "message 1: loss must be 0 or 1"),
        ({"train": True, "weight": 0}, "message 1: one says that the turn is trained on"),
        ({"mask": True}, "message 1: 'mask' is not read; write it as a 'weight'"),
        (
            {"train_detail": [{"begin_offset": 0, "train": False}]},
            "message 1: 'train_detail' is not read",
        ),
        ({"trainable": False}, "message 1: 'trainable' is not read; write it"),
        ({"Train": False}, "message 1: 'Train' is not read; write it as a 'weight'"),
        ({"Weight": 0.5}, "message 1: 'Weight' is not read; write it as a 'weight'"),
        ({"is_masked": 1}, "message 1: 'is_masked' is not read"),
        ({"no_loss": True, "weight": 1}, "message 1: 'no_loss' is not read"),
        ({"token_weights": [0, 1]}, "message 1: 'token_weights' is not read"),
        ({"images": ["a.png"]}, "message 1: 'images' can't be trained on"),
    ],
)
def test_switches_and_contents_of_a_turn_that_are_not_known(more, error):
    with pytest.raises(ValueError, match=f"f:1: {error}"):
        to_row({"messages": [turn("user", "q"), turn("assistant", "a") | more]}, "f:1")
    with pytest.raises(ValueError, match="message 0: only the assistant's turns are trained on"):
        to_row({"messages": [turn("user", "q") | {"train": True}, turn("assistant", "a")]}, "f:1")


HARMLESS: list[dict[str, Any]] = [
    {"id": 3, "source": "x", "num_tokens": 9, "category": "math", "train": True, "loss": 1.3},
    {"prompt": "2+2?", "chosen": CHAT["messages"], "rejected": [turn("assistant", "5")]},
    {"sample_weight": "1", "train": "true", "label": "0", "weights": "heavy", "repeats": "1"},
    {"trainable": True, "sample_weight": 1.0, "no_loss": False, "train_loss": 0, "skip": None},
    {"system": "", "label": True, "images": [], "history": [], "tools": None, "context": 5},
    {"prompt": [turn("user", "2 + 2?")], "rejected": "5", "label": "arithmetic"},
    {"correct": False, "is_correct": False, "solved": True, "tests_passed": 3, "right": 0},
    {"correct": 0, "wrong": True, "verdict": "incorrect"},
    {"wrong": False, "failed": 0, "verdict": "correct", "right": 3, "incorrect": "5", "valid": ""},
]


@pytest.mark.parametrize("columns", HARMLESS)
def test_columns_that_change_nothing_are_not_read(columns):
    row = to_row({**columns, **CHAT}, "f:1")
    assert row.messages == tuple(CHAT["messages"]) and not row.template_kwargs
    pair = to_row({**columns, "prompt": "2+2?", "completion": "vier 😀"}, "f:1")
    assert (pair.prompt, pair.completion) == ("2+2?", "vier 😀")


@pytest.mark.parametrize("record", [CHAT, PAIR])
def test_columns_that_are_not_read_are_named_once(record):
    unread = {"id": 3, "verdict": True, "reward": 1.5, "empty": None, "text": ""}
    with pytest.warns(UserWarning) as caught:
        rows = read([{**record, **unread, "score": 1}, {**record, "id": 4, "wrong": False}])
    assert len(rows) == 2 and len(caught) == 1
    named = "not read: 'id', 'verdict', 'reward', 'wrong'; training reads 'score'"
    assert named in str(caught[0].message)


def test_columns_that_are_read_are_not_named(recwarn):
    tools = {"tools": [{"name": "f"}], "documents": [], "chat_template_kwargs": {"brief": 1}}
    read([{**CHAT, **tools, "correct": True}, {**PAIR, "weight": 2, "other": None}])
    assert not recwarn


@pytest.mark.parametrize(
    ("columns", "error"),
    [
        ({"system": "Be brief."}, "the text of column 'system' is not in '(messages|prompt)'"),
        ({"history": [["a", "b"]]}, "the text of column 'history' is not in"),
        ({"thinking": "2 and 2"}, "the text of column 'thinking' is not in"),
        ({"context": "It is 1999."}, "the text of column 'context' is not in"),
        ({"chosen": [turn("assistant", "5")]}, "the answer is not that of column 'chosen'"),
        ({"rejected": "VIER 😀"}, "the answer is not that of column 'chosen'"),
        ({"label": False}, "column 'label' is not read; write it as weight or correct"),
        ({"train": False}, "column 'train' is not read"),
        ({"is_correct": False}, "column 'is_correct' says .*; write 'correct': false, or drop it"),
        ({"right": False}, "column 'right' says that the row is wrong"),
        ({"is_right": 0, "score": 0.0}, "column 'is_right' says that the row is wrong"),
        ({"verdict": "Incorrect"}, "column 'verdict' says that the row is wrong, and is not read"),
        ({"correct": True, "judgment": "no"}, "column 'judgment' says that the row is wrong"),
        ({"wrong": True}, "column 'wrong' says that the row is wrong, and is not read"),
        ({"incorrect": "true"}, "column 'incorrect' says that the row is wrong"),
        ({"isFailed": 1}, "column 'isFailed' says that the row is wrong"),
        ({"passed": 0}, "column 'passed' says that the row is wrong"),
        ({"isCorrect": False}, "column 'isCorrect' says that the row is wrong"),
        ({"iscorrect": "no"}, "column 'iscorrect' says that the row is wrong"),
        ({"Tests-Passed": [False, 0]}, "column 'Tests-Passed' says that the row is wrong"),
        ({"LABEL": False}, "column 'LABEL' is not read"),
        ({"correct": True, "verified": "false"}, "column 'verified' says that the row is wrong"),
        ({"Correct": False}, "column 'Correct' is not read; write it as 'correct', or drop it"),
        ({"score": 1.0, "Score": 0.5}, "column 'Score' is not read; write it as 'score'"),
        ({"Train": False}, "column 'Train' is not read"),
        ({"Loss_Weight": 0.3}, "column 'Loss_Weight' is not read"),
        ({"unmask": True}, "column 'unmask' is not read"),
        ({"sample_weight": 0.3}, "column 'sample_weight' is not read"),
        ({"weights": "2"}, "column 'weights' is not read"),
        ({"train": "False"}, "column 'train' is not read"),
        ({"repeats": "3"}, "column 'repeats' is not read; write it as count"),
        ({"data_weight": 0.5}, "column 'data_weight' is not read; write it as weight"),
        ({"multiplicity": 2}, "column 'multiplicity' is not read; write it as count"),
        ({"loss_weight": 0.3}, "column 'loss_weight' is not read; write it as weight, or"),
        ({"loss_scale": 0.3}, "column 'loss_scale' is not read; write it as weight"),
        ({"loss_scale": [0.3]}, "column 'loss_scale' is not read"),
        ({"turn_weights": [0, 1]}, "column 'turn_weights' is not read"),
        ({"ignore": True}, "column 'ignore' is not read"),
        ({"functions": [{"name": "f"}]}, "'functions' is an old form; write them as 'tools'"),
        ({"image": {"bytes": "x"}}, "'image' can't be trained on"),
    ],
)
def test_columns_that_would_change_the_text_or_the_training(columns, error):
    for record in (CHAT, {"prompt": "2+2?", "completion": "vier 😀"}):
        with pytest.raises(ValueError, match=f"f:1: {error}"):
            to_row({**columns, **record}, "f:1")


def test_columns_of_conversations_beside_another_text():
    for columns in ({"prompt": "3+3?"}, {"completion": "drei"}):
        with pytest.raises(ValueError, match="f:1: the text of column .* is not in 'messages'"):
            to_row({**columns, **CHAT}, "f:1")
    for columns, error in (
        ({"tools": [{"name": "f"}]}, "'tools' need 'messages'"),
        ({"documents": [{"text": "It is 1999."}]}, "column 'documents' is not in 'prompt'"),
    ):
        with pytest.raises(ValueError, match=f"f:1: .*{error}"):
            to_row({**columns, **PAIR}, "f:1")


def test_files_that_can_not_be_read(tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_bytes(json.dumps(PAIR).encode() + b'\n{"prompt": "a", ')
    with pytest.raises(ValueError, match=r"broken.jsonl:2: this line is not JSON"):
        read(broken)
    broken.write_bytes(b'{"prompt": "a", "completion": "\xff\xfe"}\n')
    with pytest.raises(ValueError, match=r"broken.jsonl:1: this line is not UTF-8 .*; save the"):
        read(broken)
    (tmp_path / "broken.json").write_text("[1, 2")
    with pytest.raises(ValueError, match="broken.json:1: this line is not JSON"):
        read(tmp_path / "broken.json")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and then nothing of the kind PAR1")
    with pytest.raises(ValueError, match="broken.parquet row 0: the data can.t be read"):
        read(tmp_path / "broken.parquet")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="empty.jsonl: there is no row"):
        read(tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError, match="no file .*none.jsonl"):
        read(tmp_path / "none.jsonl")
    (tmp_path / "data.csv").write_text("a,b")
    with pytest.raises(ValueError, match="data.csv is not data that can be read: .*.jsonl"):
        read(tmp_path / "data.csv")
    # Neither is the name of a dataset of the hub, which would be asked for it.
    for name in ("https://example.org/data set", "none.csv"):
        with pytest.raises(ValueError, match="not data that can be read"):
            read(name)


@pytest.mark.parametrize("error", [ConnectionError("offline"), FileNotFoundError("no such name")])
def test_a_named_dataset_that_can_not_be_had_is_named(monkeypatch, error):
    def refuse(*_: Any, **__: Any) -> None:
        raise error

    # The network alone is replaced; what the library raises there is passed on by name.
    monkeypatch.setattr(datasets, "load_dataset", refuse)
    kind = ConnectionError if isinstance(error, ConnectionError) else ValueError
    with pytest.raises(kind, match="'owner/name' can't be"):
        read("owner/name")


def test_values_of_numpy_and_torch_are_those_of_python():
    plain = {"score": 1.5, "correct": True, "count": 2, "weight": [0.5, 1.0]}
    arrays = {
        "score": np.float64(1.5),
        "correct": np.bool_(True),
        "count": torch.tensor(2),
        "weight": np.array([0.5, 1.0]),
    }
    text = {"prompt": "a", "completion": "b"}
    assert read([text | arrays]) == read([text | plain])
    with pytest.raises(ValueError, match="score must be a finite number, it is nan"):
        read([text | {"score": np.float32("nan")}])


def test_scores_must_be_there_and_tell_rows_apart():
    rows = [to_row({**PAIR, "score": score}, f"f:{score}") for score in (1.0, 2.0, 1.0)]
    check_scores(rows)
    with pytest.raises(ValueError, match=r"all 2 scores are 1 \(from f:1.0 on\)"):
        check_scores([rows[0], rows[2]])
    with pytest.raises(ValueError, match="f:9: there is no score"):
        check_scores([*rows, to_row(PAIR, "f:9")])


@pytest.mark.parametrize(
    ("values", "error"),
    [
        ({"score": math.nan}, "score must be a finite number, it is nan"),
        ({"score": "1"}, "score must be a finite number, it is '1'"),
        ({"weight": math.inf}, "weight must be a finite number, or a list"),
        ({"count": 1.5}, "count must be how often"),
        ({"correct": 0.5}, "correct must be true or false, it is 0.5"),
        ({"ref_log_probs": (0.5,)}, "ref_log_probs must be a list with a number of at most 0"),
        ({"messages": ({"role": "user", "content": "2+2?"},)}, "there is no assistant turn"),
        ({"messages": ()}, "there is no assistant turn"),
    ],
)
def test_a_row_of_a_function_is_checked_as_others_are(values, error):
    with pytest.raises(ValueError, match=f"^f:1: {error}"):
        Row("f:1", **values)
    with pytest.raises(TypeError, match="row 0: make must return a Row, not dict"):
        read([{"text": "4"}], make=lambda record, where: record)


def test_other_columns_by_a_function(tmp_path):
    path = jsonl(tmp_path / "data.jsonl", [{"question": "2+2=", "answer": "4"}])

    def make(record: Any, where: str) -> Row:
        return to_row({"prompt": record["question"], "completion": record["answer"]}, where)

    assert contents(read(path, make=make)) == [(None, "2+2=", "4", None, None, None, None)]
