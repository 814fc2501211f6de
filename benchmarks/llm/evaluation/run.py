"""Generate, grade and score one task after the other, each in a folder of its own, and show."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.commands import typed
from benchmarks.device import chosen_device
from benchmarks.llm.evaluation.options import Options
from benchmarks.llm.evaluation.tasks import QuestionSet, read_questions
from benchmarks.llm.generators import (
    as_generation,
    check_room,
    load_generator,
    load_prompter,
    pinned,
    requests_of,
)
from benchmarks.options import check_once
from benchmarks.results import printable
from benchmarks.runs import CONFIG, RESULT, claim, hardware, versions
from benchmarks.statistics import CONFIDENCE, interval_over_questions, wilson_interval
from iwsft.checkpoint import CheckpointError
from iwsft.files import alone_in, write_json, write_json_lines
from iwsft.language.budget import S1, TAGS, Delimiters, overhead, think_then_answer
from iwsft.language.generation import Generator
from iwsft.language.generations import (
    GENERATIONS,
    Generation,
    Key,
    Prompter,
    generate_missing,
    read_generations,
)
from iwsft.language.grading import Grader, Grades, grade

BENCHMARK = "llm-evaluation"
GRADES = "grades.jsonl"
_PACKAGES = (
    *("iwsft", "torch", "transformers", "vllm", "math-verify", "sympy"),
    "latex2sympy2_extended",
)


def run(options: Options) -> list[dict[str, Any]]:
    """Evaluate a model on the tasks, after all checks, and return each ``result.json``."""
    sets = [read_questions(name, seed=options.seed, limit=options.limit) for name in options.tasks]
    check_once(tasks=[each.name for each in sets])
    earlier = [options.folder(each.name) / CONFIG for each in sets] if options.resume else []
    model_name = pinned(options.model, *earlier)
    prompter = load_prompter(model_name, trust_remote_code=options.trust_remote_code)
    evaluations = [_Evaluation(options, each, prompter) for each in sets]
    for evaluation in evaluations:
        evaluation.check_context()
    with Grader() as grader, ExitStack() as opened:
        # Fails here, not after hours of generation.
        if any(each.kind == "math" for each in sets):
            grader.start()
        configs = {evaluation: evaluation.config for evaluation in evaluations}
        for folder in (evaluation.folder for evaluation in evaluations):
            if (folder / GENERATIONS).exists() and not (folder / CONFIG).exists():
                raise CheckpointError(f"{folder} holds generations without {CONFIG}; move it away")
        resume = configs if options.resume else ()
        claim(options.out, configs, same=["settings"], resume=resume)
        model: Generator | None = None
        results = []
        for evaluation in evaluations:
            with alone_in(evaluation.folder, wait=False):
                wall, cpu = time.perf_counter(), time.process_time()
                generations = read_generations(evaluation.folder / GENERATIONS, evaluation.keys)
                missing = len(evaluation.keys) - len(generations)
                if missing:
                    if model is None:
                        model = load_generator(
                            model_name,
                            backend=options.backend,
                            batch=options.batch,
                            device=chosen_device(options.device),
                            dtype=options.dtype,
                            trust_remote_code=options.trust_remote_code,
                        )
                        opened.callback(model.close)
                    evaluation.generate(model, generations)
                cost = {
                    "generated_by_this_call": missing,
                    "wall_seconds": time.perf_counter() - wall,
                    "cpu_seconds": time.process_time() - cpu,
                }
                results.append(evaluation.score(generations, grader, cost))
    return results


@dataclass(frozen=True, eq=False)
class _Evaluation:
    """A model on a task, with the options that the command was given."""

    options: Options
    task: QuestionSet
    prompter: Prompter

    @cached_property
    def delimiters(self) -> Delimiters:
        """The tokens that delimit the thinking."""
        thinking = S1 if self.options.think_format == "s1" else TAGS
        return thinking.tokens(self.prompter.tokenizer)

    @cached_property
    def prompts(self) -> dict[str, list[int]]:
        """The prompt of each question in tokens."""
        return {each.id: self.prompter.prompt(each.prompt) for each in self.task.questions}

    @cached_property
    def keys(self) -> list[tuple[str, int]]:
        """The question and the number of each sample, in the order of generation."""
        return [(name, sample) for name in self.prompts for sample in range(self.options.n)]

    @property
    def folder(self) -> Path:
        """The folder of the task's results."""
        return self.options.folder(self.task.name)

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of ``config.json``."""
        content = [(each.id, self.prompts[each.id], each.answer) for each in self.task.questions]
        return {
            "benchmark": BENCHMARK,
            "model": self.options.model,
            "source": self.task.source,
            "note": self.prompter.note,
            "private": self.task.private,
            "settings": {
                "model": self.prompter.identity,
                "task": self.task.name,
                # Covers data, template, tokenizer and order of choices, and reveals no text.
                "prompts": hashlib.sha256(repr(content).encode()).hexdigest(),
                "stop": sorted(self.prompter.stop),
                **self.options.settings,
            },
            "versions": versions(_PACKAGES),
            "hardware": hardware(self.options.used_device),
            "command": typed("llm"),
        }

    def check_context(self) -> None:
        """Check that the prompts leave room for their answers."""
        new, way_out = self.options.max_tokens, "lower --max-tokens"
        if (budget := self.options.think_budget) is not None:
            new, way_out = new + budget + overhead(self.delimiters), f"{way_out} or --think-budget"
        named = {f"{self.task.title}: question {name}": own for name, own in self.prompts.items()}
        check_room(self.prompter, named, new, way_out)

    def generate(self, model: Generator, generations: list[Generation]) -> None:
        """Generate what is missing, see :func:`iwsft.language.generations.generate_missing`."""
        path, batch = self.folder / GENERATIONS, self.options.batch
        answer = partial(self._answer, model)
        generate_missing(path, self.keys, generations, answer, batch=batch, title=self.task.name)

    def _answer(self, model: Generator, keys: Sequence[Key]) -> list[Generation]:
        options, tokenizer, name = self.options, self.prompter.tokenizer, self.task.name
        requests = requests_of(self.prompts, keys, options.max_tokens, options.seed, name)
        sampling: dict[str, Any] = {
            "stop": self.prompter.stop,
            "temperature": options.temperature,
            "top_p": options.top_p,
        }
        if options.think_budget is None:
            answers = zip(requests, model.generate(requests, **sampling), strict=True)
            return [as_generation(tokenizer, own, each.tokens, each.stop) for own, each in answers]
        sampling |= {"delimiters": self.delimiters, "think_budget": options.think_budget}
        thoughts = think_then_answer(model, requests, waits=options.waits, **sampling)
        return [
            as_generation(
                tokenizer,
                own,
                each.tokens,
                each.answer.stop,
                thinking_tokens=len(each.thinking),
                waits=each.waits,
                cut=each.cut,
            )
            for own, each in zip(requests, thoughts, strict=True)
        ]

    def score(
        self, generations: Sequence[Generation], grader: Grader, cost: dict[str, Any]
    ) -> dict[str, Any]:
        """Grade the generations, and write grades and scores."""
        grader.problems.clear()
        grades = grade(self.task.kind, self.task.questions, generations, grader)
        result = {
            "benchmark": BENCHMARK,
            "task": self.task.name,
            "title": self.task.title,
            **{key: self.config[key] for key in ("model", "source", "note", "private", "settings")},
            **score(grades, generations),
            "grading_problems": list(grader.problems.values()),
            **cost,
            "versions": versions(_PACKAGES),
        }
        write_json_lines(self.folder / GRADES, map(asdict, grades))
        write_json(self.folder / RESULT, result)
        return result


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
