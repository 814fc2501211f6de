"""From grades to scores, from scores to the printed table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.results import printable
from benchmarks.statistics import CONFIDENCE, interval_over_questions, wilson_interval
from iwsft.language.generations import Generation
from iwsft.language.grading import Grades


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
