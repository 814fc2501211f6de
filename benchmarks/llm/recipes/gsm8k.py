"""The GSM8K recipe: any causal language model on labelled solutions of word problems."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.llm.models import SMOLLM2, locate, mean_log_probs
from benchmarks.llm.recipes import Evaluation, Prepared, Recipe, Settings
from benchmarks.statistics import bootstrap_interval
from iwsft.datasets.text.rows import Row, check_text, to_row
from iwsft.datasets.text.sources import Record, records

BUNDLED = Path(__file__).parent / "data" / "gsm8k-solutions.jsonl"
_CAUTION = "the questions are from GSM8K's test set: report no GSM8K score of what trains on them"
# GSM8K marks what its calculator computed: 3*4 = <<3*4=12>>12.
_CALCULATION = re.compile(r"<<[^<>]*>>")
_LABEL, _TEXT = "is_correct", "solution"


@dataclass(frozen=True)
class SolvedQuestion:
    """A prompt and its labelled solutions: a row for each, all with this prompt."""

    prompt: str
    rows: tuple[Row, ...]

    @property
    def labels(self) -> set[bool]:
        """Whether solutions are right: a model can prefer one where there are both kinds."""
        return {bool(row.correct) for row in self.rows}


@dataclass(frozen=True)
class Gsm8kRecipe(Recipe):
    """Right solutions are D+; a model is tested by how far it prefers right ones to wrong ones.

    The test generates nothing: on held-out questions it compares the log-probs of solutions that
    others wrote, right against wrong, which a model of any size can tell apart to a degree, where
    exact match is 0 for small ones. The settings are for a model as small as SmolLM2-135M; large
    ones want a lower learning rate.
    """

    name: str = "gsm8k"
    defaults: Settings = Settings(
        learning_rate=1e-4, batch_size=8, max_steps=60, warmup=0.1, max_length=512
    )
    # Share of the questions that is held out, about, and how many of those are asked at the most.
    share: float = 0.25
    tested: int = 64

    def prepare(
        self,
        folder: Path,
        *,
        seed: int,
        model: str | None = None,
        data: str | None = None,
        trust_remote_code: bool = False,
    ) -> Prepared:
        """See :meth:`Recipe.prepare`; nothing is drawn, so all seeds have the same rows.

        The defaults are SmolLM2-135M and the bundled 400 questions of GSM8K.
        """
        del seed, trust_remote_code
        questions = read_solved_questions(BUNDLED if data is None else data)
        training, held_out = split(questions, share=self.share)
        rows = rows_of(training)
        notes: dict[str, Any] = {
            "questions": len(training),
            "rows": len(rows),
            "right": sum(bool(row.correct) for row in rows) / len(rows),
            "held_out": len(held_out),
            "tested": min(len(held_out), self.tested),
        }
        if data is None:
            notes["caution"] = _CAUTION
        return Prepared(
            model=locate(SMOLLM2 if model is None else model, folder),
            rows=rows,
            score_name="right likelier than wrong",
            notes=notes,
            held_out=held_out[: self.tested],
        )

    def tested_rows(self, prepared: Prepared) -> list[Row]:
        """See :meth:`Recipe.tested_rows`."""
        return rows_of(prepared.held_out)

    def evaluate(self, model: Any, tokenizer: Any, prepared: Prepared, *, seed: int) -> Evaluation:
        """Compare log-probs of right and wrong solutions; see :func:`right_against_wrong`."""
        log_probs = mean_log_probs(
            model, tokenizer, self.tested_rows(prepared), max_length=self.defaults.max_length
        )
        return right_against_wrong(prepared.held_out, log_probs, seed=seed)


def read_solved_questions(source: str | Path) -> list[SolvedQuestion]:
    """Read labelled solutions and gather them by question, in the order of first sight.

    ``source`` is anything that :func:`iwsft.datasets.text.rows.read` reads. A record is a question
    of GSM8K's ``example_model_solutions.jsonl`` (``question``, and for each model an object with
    ``is_correct`` and ``solution``), or one solution (``prompt``, ``completion``, ``correct``).
    """
    gathered: dict[str, list[Row]] = {}
    for where, record in records(source):
        rows = _of_question(record, where) if "question" in record else [_labelled(record, where)]
        for row in rows:
            gathered.setdefault(_same(row.prompt), []).append(row)
    return [SolvedQuestion(rows[0].prompt, tuple(rows)) for rows in gathered.values()]


def split(
    questions: Sequence[SolvedQuestion], *, share: float
) -> tuple[list[SolvedQuestion], list[SolvedQuestion]]:
    """Split questions into training and held-out ones.

    Only questions that have right and wrong solutions are held out, about ``share`` of them. Choice
    and order depend only on a question's text, so no seed moves one from the test into training.
    """
    both = [question for question in questions if len(question.labels) == 2]
    held_out = sorted((question for question in both if _mark(question) < share), key=_mark)
    asked = {question.prompt for question in held_out}
    training = [question for question in questions if question.prompt not in asked]
    right = sum(True in question.labels for question in training)
    if not held_out or not right:
        raise ValueError(
            f"of {len(questions)} questions {len(both)} have both right and wrong solutions: "
            f"{len(held_out)} to test on, {right} with right ones to train on; pass more data"
        )
    return training, held_out


def rows_of(questions: Iterable[SolvedQuestion]) -> list[Row]:
    """Return all rows, in order."""
    return [row for question in questions for row in question.rows]


def right_against_wrong(
    questions: Sequence[SolvedQuestion], log_probs: NDArray[np.float64], *, seed: int
) -> Evaluation:
    """How much more likely right solutions are than wrong ones, question by question.

    ``log_probs`` are mean log-probs of a token for each row of the questions. ``score`` is the
    probability that the right one of a right and a wrong solution of a question has the higher
    log-prob per token (AUC within the question, 1/2 for equal ones), mean over questions.
    ``right_likelier`` is the share of questions where the mean of the right ones is higher;
    ``margin`` is right minus wrong in nats per token, mean over questions.
    """
    wins, means = [], []
    ends = np.cumsum([len(question.rows) for question in questions])
    for question, of_question in zip(questions, np.split(log_probs, ends[:-1]), strict=True):
        right = np.array([bool(row.correct) for row in question.rows])
        good, bad = of_question[right], of_question[~right]
        ahead = good[:, None] - bad[None, :]
        wins.append(((ahead > 0) + (ahead == 0) / 2).mean())
        means.append((good.mean(), bad.mean()))
    good, bad = np.array(means).T
    margins = good - bad
    return {
        "score": float(np.mean(wins)),
        "interval": bootstrap_interval(wins, seed=seed),
        "n": len(questions),
        "right_likelier": float(((margins > 0) + (margins == 0) / 2).mean()),
        "margin": float(margins.mean()),
        "margin_interval": bootstrap_interval(margins, seed=seed),
        "right_log_prob": float(good.mean()),
        "wrong_log_prob": float(bad.mean()),
    }


def _of_question(record: Record, where: str) -> Iterator[Row]:
    question = check_text(record["question"], "question", where).strip()
    prompt = f"Question: {question}\nAnswer:\n"
    solutions = {
        name: value
        for name, value in record.items()
        if isinstance(value, Mapping) and _LABEL in value and _TEXT in value
    }
    if not question or not solutions:
        raise ValueError(f"{where}: needs a question, and for a model {{{_LABEL}, {_TEXT}}}")
    for name, value in solutions.items():
        here = f"{where}, {name}"
        text = _CALCULATION.sub("", check_text(value[_TEXT], _TEXT, here)).strip()
        yield _labelled({"prompt": prompt, "completion": text, "correct": value[_LABEL]}, here)


def _labelled(record: Record, where: str) -> Row:
    row = to_row(record, where)
    if row.completion is None or row.correct is None:
        raise ValueError(f"{where}: a labelled solution has 'prompt', 'completion' and 'correct'")
    return row


def _mark(question: SolvedQuestion) -> float:
    """A number in [0, 1) that depends only on the text, spaces aside."""
    digest = hashlib.sha256(_same(question.prompt).encode()).digest()
    return int.from_bytes(digest[:7], "big") / 2**56


def _same(prompt: str) -> str:
    """The text that questions share when they differ only in spaces."""
    return " ".join(prompt.split())


RECIPE = Gsm8kRecipe()
