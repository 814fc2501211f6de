"""The tasks: where their questions come from, how they are asked, how answers are graded."""

from __future__ import annotations

import difflib
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from iwsft.datasets.text.rows import records

Kind = Literal["math", "integer", "letter"]
LETTERS = "ABCD"

_BOXED = "Think step by step, then give the final answer inside \\boxed{}."
_LETTER = (
    "Think step by step, then end with a line 'Answer: X', where X is the letter of the correct "
    "choice."
)


@dataclass(frozen=True)
class Question:
    """A question as it is asked.

    Attributes:
        id: names it within its task.
        prompt: what the user says.
        answer: the correct one: LaTeX, an integer, or a letter.
    """

    id: str
    prompt: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A set of questions.

    Attributes:
        name: on the command line.
        title: in tables.
        dataset: hub id, configuration (or None) and split.
        columns: that a row must have.
        kind: how answers are compared: Math-Verify, whole numbers, letters.
        question: from a row, its number and the seed.
        private: whether its text must not be published.
    """

    name: str
    title: str
    dataset: tuple[str, str | None, str]
    columns: tuple[str, ...]
    kind: Kind
    question: Callable[[Mapping[str, Any], int, int], Question]
    private: bool = False


def _math_500(row: Mapping[str, Any], number: int, seed: int) -> Question:
    return Question(
        str(row.get("unique_id", number)), f"{row['problem']}\n\n{_BOXED}", str(row["answer"])
    )


def _aime(row: Mapping[str, Any], number: int, seed: int) -> Question:
    prompt = f"{row['problem']}\n\nThe answer is a whole number from 0 to 999. {_BOXED}"
    return Question(str(row.get("id", number)), prompt, str(row["answer"]).strip())


def _gsm8k(row: Mapping[str, Any], number: int, seed: int) -> Question:
    answer = str(row["answer"]).rpartition("####")[2].strip().replace(",", "")
    return Question(str(number), f"{row['question']}\n\n{_BOXED}", answer)


def _gpqa(row: Mapping[str, Any], number: int, seed: int) -> Question:
    name = str(row.get("Record ID") or number)
    wrong = [str(row[f"Incorrect Answer {which}"]).strip() for which in (1, 2, 3)]
    choices = [(str(row["Correct Answer"]).strip(), True), *((each, False) for each in wrong)]
    random.Random(f"{seed} {name}").shuffle(choices)
    listed = "\n".join(
        f"{letter}) {text}" for letter, (text, _) in zip(LETTERS, choices, strict=True)
    )
    correct = next(letter for letter, (_, right) in zip(LETTERS, choices, strict=True) if right)
    return Question(name, f"{str(row['Question']).strip()}\n\n{listed}\n\n{_LETTER}", correct)


_GPQA_COLUMNS = ("Question", "Correct Answer", *(f"Incorrect Answer {k}" for k in (1, 2, 3)))
_SETS = (
    Task(
        "math-500",
        "MATH-500",
        ("HuggingFaceH4/MATH-500", None, "test"),
        ("problem", "answer"),
        "math",
        _math_500,
    ),
    Task(
        "aime-2024",
        "AIME 2024",
        ("HuggingFaceH4/aime_2024", None, "train"),
        ("problem", "answer"),
        "integer",
        _aime,
    ),
    Task(
        "aime-2025",
        "AIME 2025",
        ("math-ai/aime25", None, "test"),
        ("problem", "answer"),
        "integer",
        _aime,
    ),
    Task(
        "gpqa-diamond",
        "GPQA diamond",
        ("Idavidrein/gpqa", "gpqa_diamond", "train"),
        _GPQA_COLUMNS,
        "letter",
        _gpqa,
        private=True,
    ),
    Task(
        "gsm8k",
        "GSM8K",
        ("openai/gsm8k", "main", "test"),
        ("question", "answer"),
        "integer",
        _gsm8k,
    ),
)
TASKS = {task.name: task for task in _SETS}


@dataclass(frozen=True)
class Asked:
    """A task and the questions of it that are asked; ``source`` is where they were read."""

    task: Task
    source: str
    questions: tuple[Question, ...]


def load(said: str, *, seed: int = 0, limit: int | None = None) -> Asked:
    """Read the questions of ``NAME`` from the hub, or of ``NAME=FILE`` from a file.

    Args:
        said: the task, as on the command line.
        seed: of the order of GPQA's choices; the same for all answers to a question.
        limit: only so many, from the first on.

    Raises:
        ValueError: an unknown task, a missing column, no question, a wrong answer's form, or a
            dataset that cannot be loaded, for want of access for example.
        FileNotFoundError: no such file.
        ConnectionError: the hub cannot be reached.
    """
    name, _, file = said.partition("=")
    task = _named(name)
    hub, config, split = task.dataset
    where, rows = (file, records(Path(file))) if file else (hub, records(hub, split, config))
    questions: list[Question] = []
    try:
        for number, (place, row) in enumerate(rows):
            if limit is not None and number == limit:
                break
            questions.append(_checked(task, row, place, number, seed))
    except (ValueError, ConnectionError) as error:
        if file:
            raise
        access = ""
        if "gated" in str(error):
            access = (
                f"; {hub} asks for its terms to be accepted: do so on its page, log in (hf auth "
                "login, or HF_TOKEN)"
            )
        raise type(error)(
            f"{task.title}: {error}{access}; or read a copy: --tasks {name}=FILE"
        ) from error
    if not questions:
        raise ValueError(f"{where} holds no question")
    if len({each.id for each in questions}) < len(questions):
        raise ValueError(f"{where}: two questions have the same id; make them differ")
    return Asked(task, where, tuple(questions))


def _named(name: str) -> Task:
    if name not in TASKS:
        near = difflib.get_close_matches(name.lower(), TASKS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown task {name!r}; {hint}it is one of {', '.join(TASKS)}")
    return TASKS[name]


def _checked(task: Task, row: Mapping[str, Any], place: str, number: int, seed: int) -> Question:
    missing = [column for column in task.columns if row.get(column) is None]
    if missing:
        raise ValueError(
            f"{place}: {task.title} has the columns {', '.join(task.columns)}; "
            f"{', '.join(missing)} missing here"
        )
    question = task.question(row, number, seed)
    if task.kind == "integer" and not question.answer.lstrip("-").isdigit():
        raise ValueError(f"{place}: the answer of {task.title} must end in a whole number")
    return question
