"""The five stages of a round of the language loop."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils.memory import clear_device_cache  # type: ignore[import-untyped]

from benchmarks.llm.generators import as_generation, load_generator, requests_of
from benchmarks.llm.job import fine_tune
from benchmarks.llm.loop.curation import annotate, select_answers, trainable, unusable
from benchmarks.llm.loop.options import LoopOptions
from benchmarks.llm.loop.prompts import Prompt
from benchmarks.llm.loop.verifiers import Verifier
from benchmarks.llm.models import make_once, merge_adapters
from benchmarks.runs import RESULT, tell
from benchmarks.statistics import interval_over_questions
from iwsft import checkpoint
from iwsft.files import write_json_lines
from iwsft.language.generation import Generator
from iwsft.language.generations import (
    GENERATIONS,
    Generation,
    Key,
    Prompter,
    generate_missing,
    read_generations,
)
from iwsft.loop import Round, Stages

SCORES, CURATED, TRAINED_ON = "scores.jsonl", "curated.jsonl", "rows.jsonl"
TRAINING, MODEL, EVALUATION = "training", "model", "evaluation"
# Verdicts that are written together.
_BATCH = 64
# A verifier that fails on all of so many answers is broken.
_FIRST = 20


@dataclass(frozen=True)
class LanguageLoop:
    """The stages for a model, prompts and a verifier; ``held_out`` are those of the test."""

    options: LoopOptions
    prompter: Prompter
    verifier: Verifier
    prompts: Sequence[Prompt]
    held_out: Sequence[Prompt] = ()

    def stages(self) -> Stages:
        """The five stages."""
        return Stages(self.generate, self.score, self.curate, self.fine_tune, self.evaluate)

    # ---- generate and score, also of the test ----

    def generate(self, one: Round) -> dict[str, Any]:
        """Sample answers to all prompts."""
        keys = _keys(self.prompts, self.options.samples_per_prompt)
        return self._generate(one.folder, one.policy, self.prompts, keys, one.number)

    def score(self, one: Round) -> dict[str, Any]:
        """Verify the answers; one that has no end has no score."""
        keys = _keys(self.prompts, self.options.samples_per_prompt)
        verdicts, code = self._score(one.folder, self.prompts, keys), self.verifier.code
        for before in one.earlier(1):
            if before.facts("score").get("verifier_code") != code:
                way_out = "their rates do not compare; start anew with another --out if they must"
                tell(f"round {one.number}: other code scored the round before: {way_out}")
        shares = self._right(verdicts, self.options.samples_per_prompt)
        answers = [[each["answer"] for each in group] for group in _groups(verdicts)]
        unread = sum(answer is None for own in answers for answer in own)
        if 2 * unread > len(verdicts):
            tell(
                f"round {one.number}: {unread} of {len(verdicts)} answers have no final answer "
                "(\\boxed{...}, Answer: ..., ####), or no end: ask for one by --instruction, or "
                "raise --max-tokens"
            )
        distinct = [len({answer for answer in own if answer is not None}) for own in answers]
        return {
            "pass_rate": float(shares.mean()),
            "solved": float((shares > 0).mean()),
            "distinct": float(np.mean(distinct)),
            "verifier_failed": sum("problem" in each for each in verdicts),
            "verifier_code": code,
        }

    def evaluate(self, one: Round) -> dict[str, Any]:
        """Answer the held-out prompts, and score them; the luck is the same in all rounds."""
        if not self.held_out:
            return {}
        folder, samples = one.folder / EVALUATION, self.options.eval_samples
        folder.mkdir(exist_ok=True)
        keys = _keys(self.held_out, samples)
        facts = self._generate(folder, one.trained, self.held_out, keys, EVALUATION)
        shares = self._right(self._score(folder, self.held_out, keys), samples)
        return {
            "score": float(shares.mean()),
            "interval": [float(end) for end in interval_over_questions(shares, samples)],
            "tested": len(shares),
            "test_length": facts["length"],
        }

    def _generate(
        self,
        folder: Path,
        model: str,
        prompts: Sequence[Prompt],
        keys: Sequence[Key],
        purpose: object,
    ) -> dict[str, Any]:
        """Generate what is missing; ``purpose`` makes seeds differ, a round or the test."""
        path = folder / GENERATIONS
        generations = read_generations(path, keys)
        if len(generations) < len(keys):
            tokens = {prompt.id: prompt.tokens(self.prompter) for prompt in prompts}
            with self._generator(model) as generator:
                generate_missing(
                    path,
                    keys,
                    generations,
                    lambda names: self._answer(generator, tokens, names, purpose),
                    batch=self.options.batch,
                    title=f"{folder.name}: samples",
                )
        return {
            "samples": len(generations),
            "length": float(np.mean([each["tokens"] for each in generations])),
            "unfinished": sum(not each["stopped"] for each in generations),
        }

    def _answer(
        self,
        generator: Generator,
        tokens: Mapping[str, Sequence[int]],
        names: Sequence[Key],
        purpose: object,
    ) -> list[Generation]:
        """Answers of a batch; those of a test with one answer are the likeliest."""
        options = self.options
        greedy = purpose == EVALUATION and options.eval_samples == 1
        requests = requests_of(tokens, names, options.max_tokens, options.seed, purpose)
        completions = generator.generate(
            requests,
            stop=self.prompter.stop,
            temperature=0.0 if greedy else options.sampling_temperature,
            top_p=1.0 if greedy else options.top_p,
        )
        answers, tokenizer = zip(requests, completions, strict=True), self.prompter.tokenizer
        return [as_generation(tokenizer, own, each.tokens, each.stop) for own, each in answers]

    @contextmanager
    def _generator(self, model: str) -> Iterator[Generator]:
        """The engine, whose memory is free again after the block."""
        options = self.options
        # A model that is trained in shards may be larger than a GPU.
        device: str = options.job.own_device
        if options.deepspeed is not None and device == "cuda":
            device = "auto"
        # The format of what is trained: the answers of a first model in another one would differ.
        half = options.deepspeed is not None and options.job.settings.precision == "bfloat16"
        generator = load_generator(
            model,
            dtype="bfloat16" if half else "float32",
            backend=options.backend,
            batch=options.batch,
            device=device,
            trust_remote_code=options.trust_remote_code,
        )
        try:
            yield generator
        finally:
            generator.close()
            del generator
            clear_device_cache(garbage_collection=True)

    def _score(
        self, folder: Path, prompts: Sequence[Prompt], keys: Sequence[Key]
    ) -> list[Generation]:
        """Verdicts on all answers: ``score``, ``answer``, and ``problem`` where a call failed.

        Those of other code, from before a kill, are made again, so that all are of one verifier.
        """
        texts = dict(zip(keys, read_generations(folder / GENERATIONS, keys), strict=True))
        verdicts, code = read_generations(folder / SCORES, keys), self.verifier.code
        if any(each.get("verifier_code") != code for each in verdicts):
            (folder / SCORES).unlink()
            verdicts = []
        by_id = {prompt.id: prompt for prompt in prompts}

        def verify(names: Sequence[Key]) -> list[dict[str, Any]]:
            entries = []
            for name in names:
                generation = texts[name]
                verdict = self.verifier.verify(by_id[name[0]], generation["text"])
                score = verdict.score if generation["stopped"] else None
                problem = {} if verdict.problem is None else {"problem": verdict.problem}
                about = {"verifier_code": code, **problem}
                entries.append({"score": score, "answer": verdict.answer, **about})
            broken = _broken([*verdicts, *entries], len(keys))
            if broken is not None:
                # A verifier that is mended scores all answers again.
                (folder / SCORES).unlink(missing_ok=True)
                raise ValueError(broken)
            return entries

        title = f"{folder.name}: scores"
        generate_missing(folder / SCORES, keys, verdicts, verify, batch=_BATCH, title=title)
        return verdicts

    def _right(self, verdicts: Sequence[Generation], samples: int) -> Any:
        """Share of right answers to each prompt."""
        right = np.array([self.options.is_right(each["score"]) for each in verdicts])
        return right.reshape(-1, samples).mean(1)

    # ---- curate ----

    def curate(self, one: Round) -> dict[str, Any]:
        """Keep the answers to train on, as rows, and count what is left out and why."""
        keys = _keys(self.prompts, self.options.samples_per_prompt)
        generations = read_generations(one.folder / GENERATIONS, keys)
        verdicts = read_generations(one.folder / SCORES, keys)
        tokenizer, left_out = self.prompter.tokenizer, Counter[str]()
        chat = tokenizer.chat_template is not None
        rows: list[dict[str, Any]] = []
        pairs = zip(self.prompts, _groups(generations), _groups(verdicts), strict=True)
        for prompt, texts, scores in pairs:
            rows += select_answers(self.options, prompt, texts, scores, left_out, chat=chat)
        rows = trainable(rows, tokenizer, self.options.job.settings.max_length, left_out)
        facts = {
            "rows": len(rows),
            "kept": len(rows) / len(generations),
            "left_out": dict(sorted(left_out.items())),
        }
        cut = sum(not each["stopped"] for each in generations)
        kept = f"{len(rows)} of {len(generations)} answers kept"
        without = f" ({cut} reached --max-tokens, which leaves no score)" if cut else ""
        tell(f"round {one.number}: {kept}{without}{_listed(facts)}")
        if reason := unusable(self.options, rows, self._replayed(one)):
            write_json_lines(one.folder / CURATED, [])
            return {**facts, "stop": f"{reason}, so the model stays as it is"}
        if self.options.needs_reference:
            annotate(self.options, rows, one.policy, tokenizer)
        write_json_lines(one.folder / CURATED, rows)
        return facts

    def _replayed(self, one: Round) -> list[dict[str, Any]]:
        """The rows of earlier rounds that are trained on again."""
        rounds = one.earlier(self.options.keep_rounds)
        return [row for before in rounds for row in _read_rows(before.folder / CURATED)]

    # ---- fine-tune ----

    def fine_tune(self, one: Round) -> dict[str, Any]:
        """Train on the rows of this round and of the last ones, by the job of ``finetune``."""
        options = self.options
        rows = _read_rows(one.folder / CURATED)
        if options.start_from == "last":
            # Training computes it in its own batches, so that the first weights are exactly 1.
            for row in rows:
                row.pop("ref_log_probs", None)
        earlier = self._replayed(one)
        write_json_lines(one.folder / TRAINED_ON, [*rows, *earlier])
        model = one.policy if options.start_from == "last" else one.start
        job = replace(
            options.job,
            model=model,
            data=str(one.folder / TRAINED_ON),
            out=one.folder / TRAINING,
            resume=True,
        )
        run = fine_tune(job)
        result = json.loads((run.folder / RESULT).read_text())
        if note := result.get("q", {}).get("note"):
            tell(f"round {one.number}: {note}")
        trained = run.folder / checkpoint.FOLDER
        if options.job.settings.lora_rank is not None and options.start_from == "last":
            trained = self._merge(one, trained)
        policy = trained.relative_to(one.root)
        names = ("steps", "ESS", "ESS_min", "weight_max")
        return {
            "policy": str(policy),
            "replayed": len(earlier),
            **{name: result[name] for name in names if name in result},
        }

    def _merge(self, one: Round, adapters: Path) -> Path:
        """The whole model, so that the next round puts new adapters on weights without any."""
        merge = partial(merge_adapters, one.policy, str(adapters))
        code = self.options.trust_remote_code
        folder = make_once(one.folder / MODEL, partial(merge, trust_remote_code=code))
        clear_device_cache(garbage_collection=True)
        return folder


def _keys(prompts: Iterable[Prompt], samples: int) -> list[Key]:
    return [(prompt.id, sample) for prompt in prompts for sample in range(samples)]


def _groups(entries: Sequence[Generation]) -> list[list[Generation]]:
    """The entries of each prompt, which are back to back."""
    return [[*group] for _, group in groupby(entries, key=lambda entry: entry["id"])]


def _broken(verdicts: Sequence[Mapping[str, Any]], total: int) -> str | None:
    """What to tell where the verifier is broken, rather than the answers wrong."""
    problems = [each["problem"] for each in verdicts if "problem" in each]
    if 2 * len(problems) <= total and (len(problems) < len(verdicts) or len(verdicts) < _FIRST):
        return None
    return (
        f"the verifier failed on {len(problems)} of {len(verdicts)} answers, lately: "
        f"{problems[-1]}; mend it, and --resume continues"
    )


def _listed(facts: Mapping[str, Any]) -> str:
    """What was left out, in words."""
    parts = [f"{count} {reason}" for reason, count in facts["left_out"].items()]
    return f"; left out: {', '.join(parts)}" if parts else ""


def _read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
