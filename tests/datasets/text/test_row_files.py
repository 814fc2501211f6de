"""Files of rows: encodings, layouts, damage, and what Arrow does to records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from pyarrow import parquet
from row_records import CHAT, PAIR, contents, jsonl, turn

from iwsft.datasets.text.rows import Row, read, to_row


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_json_of_any_layout(tmp_path, encoding, suffix):
    path = tmp_path / f"data{suffix}"
    pretty = json.dumps(PAIR, indent=2)
    for text in (json.dumps([PAIR, PAIR]), f"[{pretty},\n{pretty}]", f"\n{pretty}\n{pretty}\n"):
        path.write_text(text, encoding=encoding)
        assert contents(read(path)) == [(None, "2+2=", "4", None, None, None, None)] * 2
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
        (json.dumps({**CHAT, "tools": [3]}), "an entry of tools must be a JSON schema"),
        (json.dumps({**CHAT, "chat_template_kwargs": [1]}), "kwargs must be an object"),
        (json.dumps({**CHAT, "documents": 3}), "documents must be a list"),
        (
            json.dumps({**CHAT, "chat_template_kwargs": {"add_generation_prompt": True}}),
            "'add_generation_prompt' can't be in chat_template_kwargs; drop it",
        ),
        (
            json.dumps({**CHAT, "tools": [{"a": 1}], "chat_template_kwargs": {"tools": [{}]}}),
            "chat_template_kwargs has other tools; drop one of the two",
        ),
        (
            json.dumps({"messages": [turn("user", "a") | {"tool_calls": [{"name": "f"}]}]}),
            "message 0: only the assistant calls tools",
        ),
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
    for source in (path, tmp_path):
        with pytest.raises(ValueError, match="bad.parquet row 1: .*write it again"):
            read(source)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        *(("state.json", b""), ("state.json", b"{\n\n\x00"), ("dataset_info.json", b"[]")),
        *(("data-00000-of-00001.arrow", b"ARROW1\n"), ("data-00000-of-00001.arrow", None)),
    ],
)
def test_a_damaged_saved_dataset_is_named(tmp_path, name, damage):
    datasets.Dataset.from_list([PAIR]).save_to_disk(str(tmp_path / "saved"))
    file = tmp_path / "saved" / name
    file.unlink() if damage is None else file.write_bytes(damage)
    with pytest.raises(ValueError, match="saved is damaged .*; save it again") as caught:
        read(tmp_path / "saved")
    assert "\n" not in str(caught.value)


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


@pytest.mark.parametrize("other", ["more.csv", "below/more.parquet"])
def test_a_folder_of_which_a_part_would_be_left_out(tmp_path, other):
    (tmp_path / "below").mkdir()
    for name in ("one.jsonl", "two.jsonl"):
        jsonl(tmp_path / name, [PAIR])
    # datasets leaves hidden files out, too.
    (tmp_path / ".kept").mkdir()
    (tmp_path / ".kept" / "old.csv").write_text("a\n1\n")
    assert len(read(tmp_path)) == 2
    rows = datasets.Dataset.from_list([PAIR])
    (rows.to_csv if other.endswith("csv") else rows.to_parquet)(tmp_path / other)
    with pytest.raises(ValueError, match=r"files of several kinds \(\.\w+, \.\w+\); keep one"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("names", "refused"),
    [
        (("one.parquet", "two.parquet", "three.json"), True),
        (("train.parquet", "train-2.json"), True),
        (("below/one.csv", "below/two.csv", "below/three.json"), True),
        # datasets leaves these out whatever the other files are.
        (("one.parquet", "dataset_infos.json", "config.json"), False),
        (("train.parquet", "figures.json"), False),
        # They are of one kind.
        (("one.jsonl", "two.json"), False),
        # datasets does not read this one.
        (("one.jsonl", "TWO.PARQUET"), True),
    ],
)
def test_a_json_file_beside_files_of_another_kind(tmp_path, names, refused):
    rows = datasets.Dataset.from_list([PAIR])
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write = {".parquet": rows.to_parquet, ".csv": rows.to_csv}
        if name in ("dataset_infos.json", "config.json"):
            (tmp_path / name).write_text("{}")
        else:
            write.get((tmp_path / name).suffix.lower(), rows.to_json)(tmp_path / name)
    if refused:
        with pytest.raises(ValueError, match=r"files of several kinds \(\.\w+, \.\w+\); keep one"):
            read(tmp_path)
        return
    # What datasets reads of the folder.
    assert len(read(tmp_path)) == len(datasets.load_dataset(str(tmp_path), split="train"))


def test_a_json_file_that_is_no_data_by_the_card(tmp_path):
    datasets.Dataset.from_list([PAIR]).to_parquet(tmp_path / "data.parquet")
    (tmp_path / "stats.json").write_text("{}")
    card = "---\nconfigs:\n- config_name: default\n  data_files: data.parquet\n---\n"
    (tmp_path / "README.md").write_text(card)
    assert len(read(tmp_path)) == 1


def test_data_in_memory_and_splits_that_would_change_nothing(tmp_path):
    table = datasets.Dataset.from_list([PAIR])
    assert read([PAIR])[0].completion == read(table)[0].completion == "4"
    assert read(datasets.DatasetDict({"good": table}), split="good")[0].where.endswith("row 0")
    with pytest.raises(ValueError, match="no split 'train', only good"):
        read(datasets.DatasetDict({"good": table}))
    with pytest.raises(ValueError, match="only prompt, completion; .* pass a list of records"):
        read({"prompt": ["2+2="], "completion": ["4"]})
    with pytest.raises(ValueError, match=r"pass data\.to_dict\('records'\)"):
        read(table.to_pandas())
    path = jsonl(tmp_path / "data.jsonl", [PAIR])
    table.save_to_disk(str(tmp_path / "saved"))
    for source in (path, tmp_path / "saved", table):
        with pytest.raises(ValueError, match="split"):
            read(source, split="test")
    with pytest.raises(FileNotFoundError, match="no file ~nobody-of-that-name/data.jsonl"):
        read("~nobody-of-that-name/data.jsonl")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_log_probs_of_half_precision_are_refused(tmp_path: Path, dtype: torch.dtype) -> None:
    """Whatever holds them by then; weights of long answers amplify what was rounded."""
    logs = torch.log_softmax(torch.randn(20, 9, generator=torch.Generator().manual_seed(0)), 1)
    record = {"prompt": "2+2=", "completion": "four", "ref_log_probs": logs[:, 0]}
    assert read([record])[0].ref_log_probs == tuple(logs[:, 0].tolist())
    rounded = logs[:, 0].to(dtype)
    (tmp_path / "rows.json").write_text(json.dumps([{**record, "ref_log_probs": rounded.tolist()}]))
    for source in ([{**record, "ref_log_probs": rounded}], tmp_path / "rows.json"):
        with pytest.raises(ValueError, match="row 0: ref_log_probs are rounded to half precision"):
            read(source)
    # Float32 has no more digits of the steps of a model that is sure.
    sure = 30.0 - torch.tensor(30.0).add(1e-5 * torch.arange(20.0))
    assert torch.equal(sure, sure.bfloat16().float())
    assert len(to_row({**record, "ref_log_probs": sure}, "f:1").ref_log_probs or ()) == 20
