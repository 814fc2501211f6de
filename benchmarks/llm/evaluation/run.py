"""Generate, grade, score: one task after the other, each in a folder of its own."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from benchmarks.llm.evaluation import arguments as command_line
from benchmarks.llm.evaluation.arguments import Arguments
from benchmarks.llm.evaluation.grading import Grader
from benchmarks.llm.evaluation.model import Prompter, check_device, generator
from benchmarks.llm.evaluation.scores import grade, result_of
from benchmarks.llm.evaluation.store import (
    GRADES,
    RESULT,
    Generations,
    Row,
    check_claim,
    claim,
)
from benchmarks.llm.evaluation.tasks import Asked, load
from benchmarks.provenance import hardware, write_json
from benchmarks.runs import alone_in
from iwsft.files import written_whole
from iwsft.language import budget
from iwsft.language.budget import Delimiters, overhead, think_then_answer
from iwsft.language.generation import Generator, Request

BENCHMARK = "llm-evaluation"
_FORMATS = {"s1": budget.S1, "tags": budget.TAGS}
_PACKAGES = ("torch", "transformers", "vllm", "math-verify", "sympy", "latex2sympy2_extended")
# Of the arguments, what decides the generations. A path is named by what it holds.
_DECIDE = (
    "n",
    "temperature",
    "top_p",
    "max_tokens",
    "think_budget",
    "waits",
    "think_format",
    "seed",
    "limit",
    "backend",
    "dtype",
)


@dataclass(frozen=True)
class _Job:
    """A task with its prompts in tokens and its folder."""

    asked: Asked
    prompts: dict[str, list[int]]
    folder: Path
    config: dict[str, Any]

    @property
    def keys(self) -> list[tuple[str, int]]:
        """Question and sample of each generation, in their order."""
        samples = range(self.config["settings"]["n"])
        return [(each.id, sample) for each in self.asked.questions for sample in samples]


def run(arguments: Arguments) -> list[dict[str, Any]]:
    """Evaluate a model on the tasks; what can be known to be wrong is found before it is loaded.

    Returns:
        The content of each task's ``result.json``.

    Raises:
        ValueError: and others of ``benchmarks.command.EXPECTED``.
    """
    command_line.check(arguments)
    check_device(arguments.device)
    asked = [load(said, seed=arguments.seed, limit=arguments.limit) for said in arguments.tasks]
    names = [each.task.name for each in asked]
    if len(set(names)) < len(names):
        raise ValueError(f"--tasks {' '.join(names)}: name each task once")
    prompter = Prompter.load(arguments)
    delimiters = None
    if arguments.think_budget is not None:
        delimiters = _FORMATS[arguments.think_format].tokens(prompter.tokenizer)
    jobs = [_job(arguments, each, prompter) for each in asked]
    for job in jobs:
        _check_context(arguments, job, prompter, delimiters)
        check_claim(job.folder, job.config, resume=arguments.resume)
    with Grader() as grader:
        # Fails here, not after hours of generation.
        if any(job.asked.task.kind == "math" for job in jobs):
            grader.check()
        if prompter.note is not None:
            print(f"note: {prompter.note}", file=sys.stderr)
        model: Generator | None = None
        results = []
        for job in jobs:
            with alone_in(job.folder, wait=False):
                claim(job.folder, job.config)
                kept = Generations(job.folder, job.keys)
                since = time.perf_counter(), time.process_time()
                missing = len(job.keys) - len(kept.rows)
                if missing:
                    model = generator(arguments) if model is None else model
                    _generate(arguments, job, kept, model, prompter, delimiters)
                cost = {
                    "generated_by_this_call": missing,
                    "wall_seconds": time.perf_counter() - since[0],
                    "cpu_seconds": time.process_time() - since[1],
                }
                results.append(_score(job, kept.rows, grader, cost))
    return results


def _job(arguments: Arguments, asked: Asked, prompter: Prompter) -> _Job:
    prompts = {each.id: prompter.prompt(each.prompt) for each in asked.questions}
    content = [(each.id, prompts[each.id], each.answer) for each in asked.questions]
    settings = {
        "model": prompter.identity,
        "task": asked.task.name,
        # Stands for data, template, tokenizer and order of choices; tells nothing of their text.
        "prompts": hashlib.sha256(repr(content).encode()).hexdigest(),
        "stop": sorted(prompter.stop),
        "batch_size": arguments.batch,
        **{name: getattr(arguments, name) for name in _DECIDE},
        # vLLM chooses its own.
        "device": arguments.device if arguments.backend == "transformers" else None,
    }
    config = {
        "benchmark": BENCHMARK,
        "model": arguments.model,
        "source": asked.source,
        "note": prompter.note,
        "private": asked.task.private,
        "settings": settings,
        "versions": _versions(),
        "hardware": hardware(_device(arguments)),
        "command": " ".join(["python -m benchmarks.llm", *sys.argv[1:]]),
    }
    name = Path(arguments.model).resolve().name
    return _Job(asked, prompts, arguments.out / name / asked.task.name, config)


def _check_context(
    arguments: Arguments, job: _Job, prompter: Prompter, delimiters: Delimiters | None
) -> None:
    if prompter.context is None:
        return
    new = arguments.max_tokens
    if delimiters is not None and arguments.think_budget is not None:
        new += arguments.think_budget + overhead(delimiters)
    name, prompt = max(job.prompts.items(), key=lambda item: len(item[1]))
    if len(prompt) + new > prompter.context:
        raise ValueError(
            f"{job.asked.task.title}: question {name} has {len(prompt)} tokens, and {new} new ones "
            f"do not fit in the {prompter.context} that the model takes; lower --max-tokens"
            + (" or --think-budget" if delimiters is not None else "")
        )


def _generate(
    arguments: Arguments,
    job: _Job,
    kept: Generations,
    model: Generator,
    prompter: Prompter,
    delimiters: Delimiters | None,
) -> None:
    """Generate what is missing, batch for batch.

    Batches are the same in every run: one that a kill cut through is generated again as a whole,
    so that its rows are those of a run that was not killed, bit for bit.
    """
    keys, size = job.keys, arguments.batch
    for start in range(len(kept.rows) // size * size, len(keys), size):
        batch = keys[start : start + size]
        requests = [
            Request(job.prompts[name], arguments.max_tokens, _seed(arguments, job, name, sample))
            for name, sample in batch
        ]
        rows = _answers(arguments, requests, model, prompter, delimiters)
        whole = [
            {"id": name, "sample": sample, "seed": request.seed, **row}
            for (name, sample), request, row in zip(batch, requests, rows, strict=True)
        ]
        kept.append(whole[len(kept.rows) - start :])
        print(f"{job.asked.task.name}  {len(kept.rows)}/{len(keys)}", file=sys.stderr)


def _answers(
    arguments: Arguments,
    requests: Sequence[Request],
    model: Generator,
    prompter: Prompter,
    delimiters: Delimiters | None,
) -> list[Row]:
    draws = {"temperature": arguments.temperature, "top_p": arguments.top_p}
    if delimiters is None or arguments.think_budget is None:
        found = model.generate(requests, stop=prompter.stop, **draws)
        return [
            {
                "tokens": len(each.tokens),
                "stopped": each.stop is not None,
                "text": prompter.tokenizer.decode(each.tokens),
            }
            for each in found
        ]
    thoughts = think_then_answer(
        model,
        requests,
        delimiters=delimiters,
        think_budget=arguments.think_budget,
        waits=arguments.waits,
        stop=prompter.stop,
        **draws,
    )
    return [
        {
            "tokens": len(each.tokens),
            "stopped": each.answer.stop is not None,
            "thinking_tokens": len(each.thinking),
            "waits": each.waits,
            "cut": each.cut,
            "text": prompter.tokenizer.decode(each.tokens),
        }
        for each in thoughts
    ]


def _score(job: _Job, rows: Sequence[Row], grader: Grader, cost: dict[str, Any]) -> dict[str, Any]:
    grader.problems.clear()
    graded = grade(job.asked, rows, grader)
    result = {
        "benchmark": BENCHMARK,
        "task": job.asked.task.name,
        "title": job.asked.task.title,
        **{key: job.config[key] for key in ("model", "source", "note", "private", "settings")},
        **result_of(graded, rows, job.config["settings"]["seed"]),
        "grading_problems": list(grader.problems),
        **cost,
        "versions": _versions(),
    }
    with written_whole(job.folder / GRADES) as partial:
        partial.write_text("".join(each.line() for each in graded))
    write_json(job.folder / RESULT, result)
    return result


def _seed(arguments: Arguments, job: _Job, name: str, sample: int) -> int:
    """A seed for each answer, below 2^62."""
    text = f"{arguments.seed} {job.asked.task.name} {name} {sample}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def _device(arguments: Arguments) -> str:
    """Where the model runs, for the record."""
    if arguments.backend == "transformers" and arguments.device != "auto":
        return arguments.device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            # vLLM is a choice, and Math-Verify serves one kind of task.
            continue
    return found
