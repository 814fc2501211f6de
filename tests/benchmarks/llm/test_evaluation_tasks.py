"""Questions of every task from rows with the columns of the public datasets."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from pyarrow import parquet

from benchmarks.llm.evaluation.tasks import LETTERS, TASKS, read_questions

GPQA: dict[str, Any] = {
    "Record ID": "rec1",
    "Question": "What is the first letter?\n",
    "Correct Answer": "right",
    "Incorrect Answer 1": "wrong one",
    "Incorrect Answer 2": "wrong two",
    "Incorrect Answer 3": "wrong three",
    "High-level domain": "Physics",
}
ROWS: dict[str, dict[str, Any]] = {
    "math-500": {
        "problem": "What is $1+1$?",
        "solution": "It is $\\boxed{2}$.",
        "answer": "2",
        "subject": "Prealgebra",
        "level": 1,
        "unique_id": "test/prealgebra/1.json",
    },
    "aime-2024": {"id": 60, "problem": "Find $n$.", "solution": "It is 73.", "answer": "073"},
    "aime-2025": {"id": "0", "problem": "Find $n$.", "answer": "70"},
    "gpqa-diamond": GPQA,
    "gsm8k": {"question": "How many?", "answer": "It is <<600*2=1200>>1200.\n#### 1,200"},
    "minerva-math": {"question": "How far, in parsecs?", "answer": "20"},
    "olympiadbench": {"id": 1606, "question": "Find $x$.", "final_answer": ["2", "5"]},
    "amc-2023": {"id": 0, "question": "Find $x$.", "answer": "27.0"},
}
EXPECTED = {
    "math-500": ("test/prealgebra/1.json", "2"),
    "aime-2024": ("60", "073"),
    "aime-2025": ("0", "70"),
    "gsm8k": ("0", "1200"),
    "minerva-math": ("0", "20"),
    "olympiadbench": ("0", "2, 5"),
    "amc-2023": ("0", "27.0"),
}


def written(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        parquet.write_table(pyarrow.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", list(EXPECTED))
def test_from_a_file(tmp_path: Path, name: str, suffix: str) -> None:
    row = ROWS[name]
    path = written(tmp_path / f"data{suffix}", [row])
    asked = read_questions(f"{name}={path}")
    (question,) = asked.questions
    assert (question.id, question.answer) == EXPECTED[name]
    assert question.prompt.startswith(row.get("problem") or row["question"])
    assert "\\boxed{}" in question.prompt and "solution" not in question.prompt
    assert asked.title == TASKS[name].title and asked.source == str(path)


def test_choices_are_shuffled_by_the_seed_and_the_question(tmp_path: Path) -> None:
    rows = [{**GPQA, "Record ID": f"rec{number}"} for number in range(200)]
    path = written(tmp_path / "gpqa.jsonl", rows)
    questions = read_questions(f"gpqa-diamond={path}").questions
    for question in questions:
        choices = dict(
            line.split(") ", 1) for line in question.prompt.splitlines() if line[1:3] == ") "
        )
        assert sorted(choices) == list(LETTERS)
        assert sorted(choices.values()) == ["right", "wrong one", "wrong three", "wrong two"]
        assert choices[question.answer] == "right"
    # 50 each in the mean, 6 the standard deviation.
    counts = Counter(question.answer for question in questions)
    assert set(counts) == set(LETTERS) and min(counts.values()) > 25
    assert read_questions(f"gpqa-diamond={path}").questions == questions
    assert read_questions(f"gpqa-diamond={path}", seed=1).questions != questions
    # The order depends on the question, not on those before it.
    fewer = written(tmp_path / "fewer.jsonl", rows[100:])
    assert read_questions(f"gpqa-diamond={fewer}").questions == questions[100:]


def test_limit(tmp_path: Path) -> None:
    path = written(tmp_path / "gsm8k.jsonl", [ROWS["gsm8k"]] * 5)
    questions = read_questions(f"gsm8k={path}", limit=3).questions
    assert [question.id for question in questions] == ["0", "1", "2"]


@pytest.mark.parametrize("name", list(TASKS))
def test_from_the_hub(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    asked: list[tuple[str, str | None, str]] = []

    def load_dataset(hub: str, config: str | None, *, split: str, **_: Any) -> list[dict[str, Any]]:
        asked.append((hub, config, split))
        return [ROWS[name]]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read_questions(name).questions) == 1
    task = TASKS[name]
    assert asked == [(task.hub, task.config, task.split)]


def test_a_gated_dataset_says_how_to_get_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise datasets.exceptions.DatasetNotFoundError(
            "Dataset 'Idavidrein/gpqa' is a gated dataset on the Hub. You must be authenticated"
        )

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"terms.*HF_TOKEN.*--tasks gpqa-diamond=FILE"):
        read_questions("gpqa-diamond")


def test_no_network_says_how_to_do_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*_: Any, **__: Any) -> None:
        raise ConnectionError("could not reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ConnectionError, match="MATH-500.*--tasks math-500=FILE"):
        read_questions("math-500")


@pytest.mark.parametrize(
    ("said", "rows", "message"),
    [
        ("math500", None, "unknown task 'math500'; did you mean 'math-500'"),
        (
            "{}/q.jsonl",
            None,
            "q.jsonl is a file: write NAME=FILE, as --tasks gsm8k=/.*q.jsonl; NAME",
        ),
        ("gsm8k={}/nowhere.jsonl", None, "there is no file"),
        ("gsm8k={}/data.txt", None, "is not data that can be read"),
        ("gsm8k={}/data.jsonl", [], "holds no question"),
        (
            "gsm8k={}/data.jsonl",
            [{"question": "?"}],
            "data.jsonl:1: GSM8K needs answer in each row",
        ),
        (
            "gsm8k={}/data.jsonl",
            [ROWS["gsm8k"], {"question": "?", "answer": "#### many"}],
            "data.jsonl:2: the answer of GSM8K must end in a whole number",
        ),
        ("aime-2024={}/data.jsonl", [ROWS["aime-2024"]] * 2, "two questions have the same id"),
        ("math-500={}/data.jsonl", [{"problem": " ", "answer": "4"}], "jsonl:1: problem is empty"),
        ("math-500={}/data.jsonl", [{"problem": "?", "answer": ""}], "1: the answer is empty"),
        ("olympiadbench={}/data.jsonl", [{"question": "?", "final_answer": [["4"]]}], "be text or"),
    ],
)
def test_refused_questions(
    tmp_path: Path, said: str, rows: list[dict[str, Any]] | None, message: str
) -> None:
    if rows is not None:
        written(tmp_path / "data.jsonl", rows)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_questions(said.format(tmp_path))
