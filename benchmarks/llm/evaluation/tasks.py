"""The tasks as data (``tasks.toml``), and their questions."""

from __future__ import annotations

import random
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.options import check_known
from iwsft.datasets.text.rows import check_answer, check_text
from iwsft.datasets.text.sources import records, row_named
from iwsft.language.grading import AnswerKind, Question

LETTERS = "ABCD"


@dataclass(frozen=True)
class QuestionSet:
    """A public benchmark, with the questions to ask and their ``source``, a file or a hub id.

    ``hub``, ``config`` and ``split`` name its dataset. ``kind`` tells how answers are
    compared: by Math-Verify, as whole numbers, or as letters. ``instruction`` follows the question
    in the prompt. ``id``, ``question``, ``answer`` and ``wrong`` (of multiple choice) are columns;
    a question without an id has its number, and a whole number may follow ``####``. ``private``
    tells whether the authors ask that the text is not published.
    """

    name: str
    title: str
    hub: str
    split: str
    kind: AnswerKind
    instruction: str
    config: str | None = None
    id: str | None = None
    question: str = "problem"
    answer: str = "answer"
    wrong: Sequence[str] = ()
    private: bool = False
    source: str = ""
    questions: tuple[Question, ...] = ()


# Without their questions.
TASKS = {
    name: QuestionSet(name, **fields)
    for name, fields in tomllib.loads(Path(__file__).with_name("tasks.toml").read_text()).items()
}


def read_questions(name: str, *, seed: int = 0, limit: int | None = None) -> QuestionSet:
    """Read the questions of a task, ``NAME`` or ``NAME=FILE``; the first ``limit`` of them.

    ``seed`` draws the order of GPQA's choices, which is the same for all answers to a question.
    """
    name, _, file = name.partition("=")
    if not file and Path(name).suffix.startswith((".json", ".parquet")):
        example, known = f"--tasks gsm8k={name}", ", ".join(TASKS)
        raise ValueError(f"{name} is a file: write NAME=FILE, as {example}; NAME is one of {known}")
    check_known("task", name, list(TASKS))
    task = TASKS[name]
    if file:
        source, rows = file, records(Path(file))
    else:
        source, rows = task.hub, records(task.hub, task.split, task.config)
    try:
        questions = tuple(
            _question(task, row, place, number, seed)
            for number, (place, row) in enumerate(islice(rows, limit))
        )
    except (ValueError, ConnectionError) as error:
        if file:
            raise
        terms = "; accept its terms on its page and log in (hf auth login, or HF_TOKEN)"
        access = terms if "gated" in str(error) else ""
        problem = f"{task.title}: {error}{access}; or read a copy: --tasks {name}=FILE"
        raise type(error)(problem) from error
    if not questions:
        raise ValueError(f"{source} holds no question")
    if len({question.id for question in questions}) < len(questions):
        raise ValueError(f"{source}: two questions have the same id; make them differ")
    return replace(task, source=source, questions=questions)


def _question(
    task: QuestionSet, row: Mapping[str, Any], place: str, number: int, seed: int
) -> Question:
    columns = (task.question, task.answer, *task.wrong)
    missing = [column for column in columns if row.get(column) is None]
    if missing:
        raise ValueError(f"{place}: {task.title} needs {', '.join(missing)} in each row")
    name = row.get(task.id) if task.id else None
    name = str(number if name in (None, "") else name)
    with row_named(place):
        text, answer = check_text(row[task.question], task.question, filled=True), row[task.answer]
        # OlympiadBench lists what belongs to an answer.
        answer = ", ".join(map(check_answer, answer if isinstance(answer, list) else [answer]))
    if task.kind == "integer":
        answer = answer.rpartition("####")[2].strip().replace(",", "")
        if not answer.lstrip("-").isdigit():
            raise ValueError(f"{place}: the answer of {task.title} must end in a whole number")
    if task.wrong:
        choices = [(answer.strip(), True), *((str(row[key]).strip(), False) for key in task.wrong)]
        random.Random(f"{seed} {name}").shuffle(choices)
        lettered = list(zip(LETTERS, choices, strict=True))
        answer = next(letter for letter, (_, right) in lettered if right)
        listed = "\n".join(f"{letter}) {choice}" for letter, (choice, _) in lettered)
        text = f"{text.strip()}\n\n{listed}"
    return Question(name, f"{text}\n\n{task.instruction}", answer)
