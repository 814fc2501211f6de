"""The tasks as data, and their questions."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from benchmarks.llm.evaluation.grading import AnswerKind
from benchmarks.options import check_known
from iwsft.datasets.text.rows import records

LETTERS = "ABCD"

_BOXED = "Think step by step, then give the final answer inside \\boxed{}."
_NUMBER = f"The answer is a whole number from 0 to 999. {_BOXED}"
_LETTER = (
    "Think step by step, then end with a line 'Answer: X', where X is the letter of the correct "
    "choice."
)


@dataclass(frozen=True)
class Task:
    """A public benchmark.

    ``dataset`` is a hub id, configuration (or None) and split. ``kind`` tells how answers are
    compared: by Math-Verify, as whole numbers, or as letters. ``instruction`` follows the question
    in the prompt. ``id``, ``question``, ``answer`` and ``wrong`` (of multiple choice) are columns;
    a question without an id has its number, and a whole number may follow ``####``. ``private``
    tells whether the authors ask that the text is not published.
    """

    name: str
    title: str
    dataset: tuple[str, str | None, str]
    kind: AnswerKind
    instruction: str
    id: str | None = None
    question: str = "problem"
    answer: str = "answer"
    wrong: tuple[str, ...] = ()
    private: bool = False


_ALL = (
    Task(
        "math-500",
        "MATH-500",
        ("HuggingFaceH4/MATH-500", None, "test"),
        "math",
        _BOXED,
        "unique_id",
    ),
    Task(
        "aime-2024",
        "AIME 2024",
        ("HuggingFaceH4/aime_2024", None, "train"),
        "integer",
        _NUMBER,
        "id",
    ),
    Task("aime-2025", "AIME 2025", ("math-ai/aime25", None, "test"), "integer", _NUMBER, "id"),
    Task(
        "gpqa-diamond",
        "GPQA diamond",
        ("Idavidrein/gpqa", "gpqa_diamond", "train"),
        "letter",
        _LETTER,
        "Record ID",
        question="Question",
        answer="Correct Answer",
        wrong=("Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),
        private=True,
    ),
    Task(
        "gsm8k", "GSM8K", ("openai/gsm8k", "main", "test"), "integer", _BOXED, question="question"
    ),
)
TASKS = {task.name: task for task in _ALL}


@dataclass(frozen=True)
class Question:
    """A question of a task; the answer is LaTeX, a whole number, or a letter."""

    id: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class QuestionSet:
    """A task with the questions to ask; ``source`` is the file or the hub id they come from."""

    task: Task
    source: str
    questions: tuple[Question, ...]


def read_questions(name: str, *, seed: int = 0, limit: int | None = None) -> QuestionSet:
    """Read the questions of a task from the hub, or from a file; the first ``limit`` of them.

    ``name`` is ``NAME`` or ``NAME=FILE``, as on the command line. The order of GPQA's choices is
    drawn by ``seed`` and is the same for all answers to a question.
    """
    name, _, file = name.partition("=")
    check_known("task", name, list(TASKS))
    task = TASKS[name]
    hub, config, split = task.dataset
    source, rows = (file, records(Path(file))) if file else (hub, records(hub, split, config))
    try:
        questions = tuple(
            _question(task, row, place, number, seed)
            for number, (place, row) in enumerate(islice(rows, limit))
        )
    except (ValueError, ConnectionError) as error:
        if file:
            raise
        terms = (
            f"; {hub} asks for its terms to be accepted: do so on its page, log in (hf auth login, "
            "or HF_TOKEN)"
        )
        access = terms if "gated" in str(error) else ""
        raise type(error)(
            f"{task.title}: {error}{access}; or read a copy: --tasks {name}=FILE"
        ) from error
    if not questions:
        raise ValueError(f"{source} holds no question")
    if len({question.id for question in questions}) < len(questions):
        raise ValueError(f"{source}: two questions have the same id; make them differ")
    return QuestionSet(task, source, questions)


def _question(task: Task, row: Mapping[str, Any], place: str, number: int, seed: int) -> Question:
    columns = (task.question, task.answer, *task.wrong)
    missing = [column for column in columns if row.get(column) is None]
    if missing:
        raise ValueError(
            f"{place}: {task.title} has the columns {', '.join(columns)}; "
            f"{', '.join(missing)} missing here"
        )
    name = row.get(task.id) if task.id else None
    name = str(number if name in (None, "") else name)
    text, answer = str(row[task.question]), str(row[task.answer])
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
