"""Questions with labelled solutions, and which of them are held out."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from iwsft.datasets.text.rows import Record, Row, check_text, records, to_row

# GSM8K marks what its calculator computed: 3*4 = <<3*4=12>>12.
_CALCULATION = re.compile(r"<<[^<>]*>>")
_LABEL, _TEXT = "is_correct", "solution"


@dataclass(frozen=True)
class Question:
    """A prompt and its labelled solutions.

    Attributes:
        prompt: Text that the model is given.
        rows: A row for each solution, all with this prompt and ``correct`` set.
    """

    prompt: str
    rows: tuple[Row, ...]

    @property
    def right(self) -> tuple[Row, ...]:
        """The right solutions."""
        return tuple(row for row in self.rows if row.correct)

    @property
    def wrong(self) -> tuple[Row, ...]:
        """The wrong solutions."""
        return tuple(row for row in self.rows if not row.correct)

    @property
    def tells_apart(self) -> bool:
        """Whether there are solutions of both kinds, so that a model can prefer one."""
        return bool(self.right) and bool(self.wrong)


def read_questions(source: str | Path) -> list[Question]:
    """Read labelled solutions and gather them by question, in the order of first sight.

    Args:
        source: Anything that :func:`iwsft.datasets.text.rows.read` reads. A record is a question of
            GSM8K's ``example_model_solutions.jsonl`` (``question``, and for each model an object
            with ``is_correct`` and ``solution``), or one solution: ``prompt``, ``completion``,
            ``correct``, and perhaps ``score``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If a record is of neither kind, a solution is empty, a label is missing or not a
            truth value, or there is no record at all; the message names the line.
    """
    gathered: dict[str, list[Row]] = {}
    for where, record in records(source):
        rows = _of_question(record, where) if "question" in record else [_labelled(record, where)]
        for row in rows:
            gathered.setdefault(_same(row.prompt), []).append(row)
    if not gathered:
        raise ValueError(f"{source}: there is not a single solution in it")
    return [Question(rows[0].prompt, tuple(rows)) for rows in gathered.values()]


def split(questions: Sequence[Question], *, share: float) -> tuple[list[Question], list[Question]]:
    """Split questions into training and held-out ones.

    Only questions that have right and wrong solutions are held out. The choice depends only on a
    question's text, so no seed and no other question moves one from the test into training.

    Args:
        questions: All questions.
        share: Share of the questions of both kinds that is held out, about.

    Returns:
        The training questions (with those of one kind) in their order, and the held-out ones in an
        order that depends only on their texts.

    Raises:
        ValueError: If there is nothing to test on, or no right solution to train on.
    """
    both = [question for question in questions if question.tells_apart]
    held_out = sorted((question for question in both if _mark(question) < share), key=_mark)
    if not held_out:
        raise ValueError(
            f"of {len(questions)} questions {len(both)} have both right and wrong solutions, too "
            "few to hold some out for the test; pass more data"
        )
    training = [
        question for question in questions if not question.tells_apart or _mark(question) >= share
    ]
    if not any(question.right for question in training):
        raise ValueError(
            f"none of the {len(training)} training questions has a right solution to train on; "
            "pass more data"
        )
    return training, held_out


def rows_of(questions: Iterable[Question]) -> list[Row]:
    """Return all rows, in order."""
    return [row for question in questions for row in question.rows]


def _of_question(record: Record, where: str) -> Iterator[Row]:
    question = check_text(record["question"], "question", where).strip()
    prompt = f"Question: {question}\nAnswer:\n"
    solutions = {
        name: value
        for name, value in record.items()
        if isinstance(value, Mapping) and _LABEL in value and _TEXT in value
    }
    if not question or not solutions:
        problem = "there is no solution" if question else "the question is empty"
        raise ValueError(
            f"{where}: {problem}; a line holds a question, and for each model "
            f"{{{_LABEL}, {_TEXT}}}. Columns found: {', '.join(map(str, record))}"
        )
    for name, value in solutions.items():
        here = f"{where}, {name}"
        text = _CALCULATION.sub("", check_text(value[_TEXT], _TEXT, here)).strip()
        yield _labelled({"prompt": prompt, "completion": text, "correct": value[_LABEL]}, here)


def _labelled(record: Record, where: str) -> Row:
    row = to_row(record, where)
    if row.completion is None or row.correct is None:
        raise ValueError(
            f"{where}: a labelled solution has 'prompt', 'completion' and 'correct'; columns "
            f"found: {', '.join(map(str, record))}"
        )
    return row


def _mark(question: Question) -> float:
    """A number in [0, 1) that depends only on the text, spaces aside."""
    digest = hashlib.sha256(_same(question.prompt).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def _same(prompt: str) -> str:
    """The text that two questions share when they differ only in spaces."""
    return " ".join(prompt.split())
