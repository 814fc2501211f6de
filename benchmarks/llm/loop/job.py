"""The whole loop: checks before anything is generated, the rounds, their table."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from benchmarks.commands import typed
from benchmarks.llm.generators import check_room, load_prompter, pinned
from benchmarks.llm.launch import Launch
from benchmarks.llm.loop.options import LoopOptions
from benchmarks.llm.loop.prompts import Prompt, read_prompts
from benchmarks.llm.loop.stages import LanguageLoop
from benchmarks.llm.loop.verifiers import Verifier
from benchmarks.llm.models import check_whole, shortest
from benchmarks.llm.options import ALGORITHMS
from benchmarks.llm.recipes.chat import asked, check_apart
from benchmarks.llm.run import Run, training_arguments
from benchmarks.report.loops import LOOP, show_loop
from benchmarks.runs import CONFIG, hardware, tell, versions
from iwsft.language.generations import Prompter
from iwsft.loop import run_loop

# Columns whose text is often a part of the question.
_OF_QUESTIONS = (
    *("system", "system_prompt", "system_message", "history", "instruction", "instructions"),
    *("context", "input", "documents", "tools", "question", "problem"),
)
_PACKAGES = ("iwsft", "torch", "transformers", "vllm", "accelerate", "math-verify")


def run_rounds(options: LoopOptions, verifier: Verifier) -> list[dict[str, Any]]:
    """Run the loop of a command line, or what is missing of it, and print the table."""
    job = options.job
    if options.deepspeed is None:
        launch = Launch("single", device=job.own_device)
        run = Run(job.recipe, options.algo, options.seed, job, launch)
        training_arguments(run, ALGORITHMS[options.algo])
    start = pinned(options.model, *([options.out / CONFIG] if options.resume else []))
    check_whole(start)
    prompter = load_prompter(start, trust_remote_code=options.trust_remote_code)
    prompts = _read(options, options.prompts, prompter, limit=options.limit)
    held_out = _read(options, options.eval_prompts, prompter) if options.eval_prompts else []
    check_apart(prompts, held_out, option="prompts", key=lambda each: asked(each.messages))
    notes = describe_twins(options.prompts, prompts), describe_unread(options.prompts, prompts)
    for note in filter(None, notes):
        tell(note)
    settings = {
        "model": prompter.identity,
        "stop": sorted(prompter.stop),
        "prompts": _digest(prompts),
        "eval_prompts": _digest(held_out),
        **options.settings,
    }
    about = {
        "benchmark": LOOP,
        "prompts": options.prompts,
        "algo": options.algo,
        "seed": options.seed,
        "model": options.model,
        "command": typed("llm"),
        "versions": versions(_PACKAGES),
        "hardware": hardware(job.own_device),
        "options": options.file,
    }
    # Rows may be a token longer than what was generated, by the end of the template.
    most = shortest(job.settings.max_length, prompter.context)
    job = replace(job, settings=replace(job.settings, max_length=most))
    loop = LanguageLoop(replace(options, job=job), prompter, verifier, prompts, held_out)
    rows = run_loop(
        options.out,
        loop.stages(),
        start=start,
        rounds=options.rounds,
        settings=settings,
        resume=options.resume,
        early_stop=options.stop_early,
        about=about,
        tell=tell,
    )
    show_loop(rows, f"{options.algo}, {options.prompts}", "model", options.out, start)
    return rows


def _read(
    options: LoopOptions, source: str, prompter: Prompter, *, limit: int | None = None
) -> list[Prompt]:
    """Read prompts, and check that they leave room for an answer."""
    prompts = read_prompts(source, options.verifier, instruction=options.instruction, limit=limit)
    tokens = {f"{prompt.where}: the prompt": prompt.tokens(prompter) for prompt in prompts}
    check_room(prompter, tokens, options.max_tokens, "lower --max-tokens, or drop them")
    return prompts


def describe_twins(source: str, prompts: Sequence[Prompt]) -> str | None:
    """A sentence on prompts of the same text, if there are some: their answers may contradict."""
    first: dict[str, Prompt] = {}
    twins = [(first.setdefault(asked(each.messages), each), each) for each in prompts]
    twins = [(one, other) for one, other in twins if one is not other]
    if not twins:
        return None
    other = sum(one.row.get("answer") != twin.row.get("answer") for one, twin in twins)
    return (
        f"{source} has prompts with the text of an earlier one (rows: {len(twins)}, with another "
        f"answer: {other}); first: {twins[0][0].where} and {twins[0][1].where}"
    )


def describe_unread(source: str, prompts: Sequence[Prompt]) -> str | None:
    """A sentence on columns that may belong to the question and are not in the prompts."""
    counts: Counter[str] = Counter()
    for prompt in prompts:
        asked = "".join("".join(str(turn.get("content")) for turn in prompt.messages).split())
        for name in _OF_QUESTIONS:
            value = prompt.row.get(name)
            if value and not (isinstance(value, str) and "".join(value.split()) in asked):
                counts[name] += 1
    if not counts:
        return None
    columns = ", ".join(f"{name!r} (rows: {count})" for name, count in counts.items())
    return f"{source}: the model is not asked {columns}; write it into the prompt if it matters"


def _digest(prompts: Sequence[Prompt]) -> str:
    """Digest of prompts with all that a verifier reads."""
    content = [(prompt.content, prompt.answer, sorted(prompt.row.items())) for prompt in prompts]
    return hashlib.sha256(repr(content).encode()).hexdigest()
