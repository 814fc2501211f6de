"""Generate, grade and score: one task after the other, each in a folder of its own."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from benchmarks.commands import typed
from benchmarks.llm.evaluation.grading import Grader
from benchmarks.llm.evaluation.options import Options
from benchmarks.llm.evaluation.scores import Generation, grade, score
from benchmarks.llm.evaluation.tasks import QuestionSet, read_questions
from benchmarks.llm.models import check_fit, context_of, load, load_config, load_tokenizer, locate
from benchmarks.options import check_once
from benchmarks.runs import CONFIG, RESULT, alone_in, claim, hardware, versions, write_json
from iwsft.checkpoint import CheckpointError
from iwsft.files import full_disk_named, written_whole
from iwsft.language.budget import S1, TAGS, Delimiters, overhead, think_then_answer
from iwsft.language.generation import Generator, Request, TransformersGenerator, VLLMGenerator
from iwsft.progress import Progress

BENCHMARK = "llm-evaluation"
GENERATIONS, GRADES = "generations.jsonl", "grades.jsonl"
_PACKAGES = ("torch", "transformers", "vllm", "math-verify", "sympy", "latex2sympy2_extended")
_ANSWER = "<<<ANSWER>>>"


def run(options: Options) -> list[dict[str, Any]]:
    """Evaluate a model on the tasks; all checks come before its weights are loaded.

    Returns the content of each task's ``result.json``.
    """
    prompter = load_prompter(options)
    sets = [read_questions(name, seed=options.seed, limit=options.limit) for name in options.tasks]
    check_once(tasks=[each.name for each in sets])
    evaluations = [_Evaluation(options, each, prompter) for each in sets]
    for evaluation in evaluations:
        evaluation.check_context()
    with Grader() as grader:
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
                generations = read_generations(evaluation.folder, evaluation.keys)
                missing = len(evaluation.keys) - len(generations)
                if missing:
                    model = load_generator(options) if model is None else model
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
        model = Path(self.options.model).resolve().name
        return self.options.out / model / self.task.name

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
        """Check that the longest prompt leaves room for its answer."""
        new, budget = self.options.max_tokens, self.options.think_budget
        if budget is not None:
            new += budget + overhead(self.delimiters)
        name, prompt = max(self.prompts.items(), key=lambda item: len(item[1]))
        context = self.prompter.context
        if context is not None and len(prompt) + new > context:
            lower = "--max-tokens" if budget is None else "--max-tokens or --think-budget"
            raise ValueError(
                f"{self.task.title}: question {name} has {len(prompt)} tokens, and {new} new ones "
                f"do not fit in the model's context of {context}; lower {lower}"
            )

    def generate(self, model: Generator, generations: list[Generation]) -> None:
        """Generate what is missing and add it to the list and the file, batch by batch.

        Batches are the same in every run, and one that a kill cut is generated again as a whole,
        so that the generations are those of an uninterrupted run, bit for bit.
        """
        size = self.options.batch
        with Progress() as progress:
            task = progress.add_task(self.task.name, total=len(self.keys))
            for start in range(len(generations) // size * size, len(self.keys), size):
                keys = self.keys[start : start + size]
                most = self.options.max_tokens
                requests = [Request(self.prompts[key[0]], most, self._seed(*key)) for key in keys]
                answers = zip(keys, requests, self._answer(model, requests), strict=True)
                batch = [
                    {"id": name, "sample": sample, "seed": request.seed, **answer}
                    for (name, sample), request, answer in answers
                ]
                new = batch[len(generations) - start :]
                path = self.folder / GENERATIONS
                with full_disk_named(path), path.open("ab") as file:
                    file.write(
                        "".join(json.dumps(generation) + "\n" for generation in new).encode()
                    )
                    file.flush()
                    os.fsync(file.fileno())
                generations += new
                progress.update(task, completed=len(generations))

    def _answer(self, model: Generator, requests: Sequence[Request]) -> list[Generation]:
        options = self.options
        sampling: dict[str, Any] = {
            "stop": self.prompter.stop,
            "temperature": options.temperature,
            "top_p": options.top_p,
        }
        if options.think_budget is None:
            completions = model.generate(requests, **sampling)
            return [self._generation(each.tokens, each.stop) for each in completions]
        sampling |= {"delimiters": self.delimiters, "think_budget": options.think_budget}
        thoughts = think_then_answer(model, requests, waits=options.waits, **sampling)
        return [
            self._generation(
                each.tokens,
                each.answer.stop,
                thinking_tokens=len(each.thinking),
                waits=each.waits,
                cut=each.cut,
            )
            for each in thoughts
        ]

    def _generation(self, tokens: Sequence[int], stop: int | None, **thinking: int) -> Generation:
        text = self.prompter.tokenizer.decode(tokens)
        return {"tokens": len(tokens), "stopped": stop is not None, **thinking, "text": text}

    def _seed(self, name: str, sample: int) -> int:
        """Return the seed of an answer, below 2^62."""
        text = f"{self.options.seed} {self.task.name} {name} {sample}"
        return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2

    def score(
        self, generations: Sequence[Generation], grader: Grader, cost: dict[str, Any]
    ) -> dict[str, Any]:
        """Grade the generations, and write grades and scores."""
        grader.problems.clear()
        grades = grade(self.task, generations, grader)
        result = {
            "benchmark": BENCHMARK,
            "task": self.task.name,
            "title": self.task.title,
            **{key: self.config[key] for key in ("model", "source", "note", "private", "settings")},
            **score(grades, generations),
            "grading_problems": list(grader.problems),
            **cost,
            "versions": versions(_PACKAGES),
        }
        with written_whole(self.folder / GRADES) as partial:
            partial.write_text("".join(json.dumps(asdict(each)) + "\n" for each in grades))
        write_json(self.folder / RESULT, result)
        return result


def read_generations(folder: Path, keys: Sequence[tuple[str, int]]) -> list[Generation]:
    """Read the generations of a task so far; a last line that a kill cut short is removed.

    The file has a line for each generation, in the order of ``keys`` (question, sample).
    """
    path = folder / GENERATIONS
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    generations: list[Generation] = []
    for number, line in enumerate(whole.splitlines()):
        try:
            generations.append(json.loads(line))
            fits = (generations[-1]["id"], generations[-1]["sample"]) == keys[number]
        except (ValueError, LookupError, TypeError):
            fits = False
        if not fits:
            raise CheckpointError(
                f"{path}:{number + 1} is not the generation that belongs there; remove it and all "
                "lines after it, then pass --resume"
            )
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return generations


@dataclass(frozen=True)
class Prompter:
    """Questions in a model's tokens.

    ``stop`` are the tokens that end an answer. ``context`` is the most tokens of prompt and answer.
    ``note`` is what a reader of the scores must know about the prompts. ``identity`` is the model's
    commit on the hub, or a digest of its weights.
    """

    tokenizer: Any
    stop: frozenset[int]
    context: int | None
    note: str | None
    identity: str

    def prompt(self, text: str) -> list[int]:
        """Encode a user's text as the prompt that the model answers."""
        if self.tokenizer.chat_template is None:
            return list(self.tokenizer.encode(f"{text}\n\n"))
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer.encode(chat, add_special_tokens=False))


def load_prompter(options: Options) -> Prompter:
    """Load the tokenizer and the settings of a model, but not its weights."""
    name = locate(options.model)
    code: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    config = load_config(name, **code)
    tokenizer = load_tokenizer(name, **code)
    check_fit(options.model, config, tokenizer)
    try:
        ends = GenerationConfig.from_pretrained(name, **code).eos_token_id
    # It is optional.
    except (OSError, ValueError):
        ends = config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    stop = {*ends, tokenizer.eos_token_id, *_turn_end(tokenizer)} - {None}
    if not stop:
        raise ValueError(f"--model {name} has no end token; set eos_token in its tokenizer")
    note = f"{name} has no chat template: the bare question is its prompt"
    return Prompter(
        tokenizer,
        frozenset(stop),
        context_of(config),
        f"{note}, which suits only base models" if tokenizer.chat_template is None else None,
        getattr(config, "_commit_hash", None) or _digest(Path(name)),
    )


def load_generator(options: Options) -> Generator:
    """Load the weights."""
    settings: Any = {"dtype": options.dtype, "trust_remote_code": options.trust_remote_code}
    if options.backend == "vllm":
        gpus = max(1, torch.cuda.device_count())
        return VLLMGenerator(locate(options.model), parallel=gpus, **settings)
    model, _ = load(options.model, device_map=options.device, **settings)
    return TransformersGenerator(model, batch_size=options.batch)


def _turn_end(tokenizer: Any) -> set[int]:
    """Return the special token that the chat template writes after an assistant's turn, if any."""
    # Tuned models end with it, also where the tokenizer still names a base model's end.
    if tokenizer.chat_template is None:
        return set()
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(_ANSWER)[2]
    tokens = tokenizer.encode(after, add_special_tokens=False)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return set(tokens[:1]) & special


def _digest(folder: Path) -> str:
    """Return the SHA-256 of the weight files' names, sizes and 16 blocks spread over each."""
    # All of 65 GB would take minutes; training changes every block.
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin"):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for number in range(16):
                    file.seek(max(0, size - 2**16) * number // 15)
                    digest.update(file.read(2**16))
    return digest.hexdigest()
