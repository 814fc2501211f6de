"""From generations to grades, from grades to scores, from scores to the printed table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.llm.evaluation.grading import Grader
from benchmarks.llm.evaluation.tasks import QuestionSet
from benchmarks.results import printable
from benchmarks.statistics import CONFIDENCE, interval_over_questions, wilson_interval
from iwsft.language.verification import extract_answer, parse_integer, parse_letter

# A line of generations.jsonl.
Generation = dict[str, Any]


@dataclass(frozen=True)
class Grades:
    """The answers to a question in the order of their samples; None where a text gives none.

    ``unclear`` are those that are no one whole number or letter, and count as none.
    ``majority_right`` tells whether the most frequent answer is right.
    """

    id: str
    correct: str
    answers: tuple[str | None, ...]
    right: tuple[bool, ...]
    majority_right: bool
    unclear: int = 0


def grade(task: QuestionSet, generations: Sequence[Generation], grader: Grader) -> list[Grades]:
    """Grade the generations of a task; those of a question are in the order of their samples."""
    texts: dict[str, list[str | None]] = {each.id: [] for each in task.questions}
    for generation in generations:
        text = extract_answer(generation["text"], letter=task.kind == "letter")
        texts[generation["id"]].append(text)
    # Models repeat the choice with its letter, and its text may be private.
    read: Any = {"integer": parse_integer, "letter": parse_letter, "math": str}[task.kind]
    same = grader.choose_comparison(task.kind)
    grades = []
    for question in task.questions:
        values = [text if text is None else read(text) for text in texts[question.id]]
        given = [value if value is None else str(value) for value in values]
        right = [answer is not None and same(question.answer, answer) for answer in given]
        chosen = find_majority(given, same) if len(given) > 1 else given[0]
        grades.append(
            Grades(
                question.id,
                question.answer,
                tuple(given),
                tuple(right),
                chosen is not None and right[given.index(chosen)],
                given.count(None) - texts[question.id].count(None),
            )
        )
    return grades


def score(grades: Sequence[Grades], generations: Sequence[Generation]) -> dict[str, Any]:
    """Compute scores in percent, their intervals, and statistics of the generations.

    avg@n is the mean over questions of the share of right answers; its interval is
    :func:`~benchmarks.statistics.interval_over_questions`. maj@n has Wilson's interval.
    """
    n = len(grades[0].right)
    shares = np.array([np.mean(each.right) for each in grades])
    voted = sum(each.majority_right for each in grades)
    right = [sum(each.right) for each in grades]
    subsets = [k for k in (2**power for power in range(n.bit_length())) if k < n]
    result: dict[str, Any] = {
        "questions": len(grades),
        "n": n,
        "avg": 100 * float(shares.mean()),
        "avg_interval": [100 * end for end in interval_over_questions(shares, n)],
        "interval_method": "Wilson, effective number of questions",
        "confidence": CONFIDENCE,
        "maj": 100 * voted / len(grades),
        "maj_interval": [100 * end for end in wilson_interval(voted / len(grades), len(grades))],
        "pass_at": {
            str(k): 100 * float(np.mean([estimate_pass_at(k, n, count) for count in right]))
            for k in [*subsets, n]
        },
        "no_answer": sum(answer is None for each in grades for answer in each.answers),
        "unclear": sum(each.unclear for each in grades),
        "unfinished": sum(not each["stopped"] for each in generations),
        "tokens_mean": _mean(generations, "tokens"),
    }
    if "thinking_tokens" in generations[0]:
        result["thinking_tokens_mean"] = _mean(generations, "thinking_tokens")
        result["thinking_cut"] = sum(each["cut"] for each in generations)
        result["waits_mean"] = _mean(generations, "waits")
    return result


def estimate_pass_at(k: int, answers: int, right: int) -> float:
    """Compute the chance that k of the answers, chosen without replacement, hold a right one.

    Unbiased for pass@k (Chen et al. 2021, "Evaluating Large Language Models Trained on Code").
    """
    return 1 - math.comb(answers - right, k) / math.comb(answers, k)


def find_majority(answers: Sequence[str | None], same: Callable[[str, str], bool]) -> str | None:
    """Return the most frequent answer in its first wording; of several, the one that comes first.

    ``same`` tells whether two answers mean the same. None has no vote.
    """
    votes: Counter[str] = Counter()
    wordings: dict[str, str] = {}
    for answer in (answer for answer in answers if answer is not None):
        if answer not in wordings:
            equals = (first for first in votes if same(first, answer))
            wordings[answer] = next(equals, answer)
        votes[wordings[answer]] += 1
    # Of equal counts the first one counted comes first.
    return votes.most_common(1)[0][0] if votes else None


def show(results: Sequence[dict[str, Any]]) -> None:
    """Print scores with their 95 % intervals, and notes on them."""
    from benchmarks.report.language import evaluation_grid

    console = Console()
    console.print(evaluation_grid(printable(list(results))).rich("Right answers in percent"))
    for result in results:
        answers, failed = result["questions"] * result["n"], len(result["grading_problems"])
        notes = []
        if result["no_answer"]:
            notes.append(f"{result['no_answer']} of {answers} generations give no final answer")
        if result["unclear"]:
            notes.append(f"{result['unclear']} of those give none that is one number or letter")
        if failed:
            notes.append(f"{failed} comparisons hung or failed and count as wrong")
        if result["private"]:
            notes.append("keep the generations private: its authors ask not to publish its text")
        for note in notes:
            console.print(f"{result['title']}: {note}", markup=False, soft_wrap=True)
    if results[0]["note"]:
        console.print(f"note: {results[0]['note']}", markup=False, soft_wrap=True)


def _mean(generations: Sequence[Generation], key: str) -> float:
    return float(np.mean([each[key] for each in generations]))
