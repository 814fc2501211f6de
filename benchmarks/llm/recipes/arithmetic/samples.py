"""Samples of the arithmetic recipe: drawn from a model, judged, read as rows, and tested on."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.llm.models import load
from benchmarks.llm.recipes import Evaluation
from benchmarks.llm.recipes.arithmetic.base import CONTEXT, VOCABULARY
from benchmarks.llm.recipes.arithmetic.task import (
    STRATEGIES,
    Problem,
    Verdict,
    check,
    parse,
    problems,
    split_of,
)
from benchmarks.statistics import wilson_interval
from iwsft.datasets.text.rows import Row, read
from iwsft.files import write_json_lines
from iwsft.fingerprint import fingerprint
from iwsft.language.generation import Request, TransformersGenerator

# Settings are chosen on the held-out problems of one seed; the test is on others.
VALIDATION_SEED, TEST_SEED = 0, 1
# The KV cache of so many rows is a few MB.
_BATCH = 512


def drawn(
    model: str, folder: Path, *, seed: int, number: int, trust_remote_code: bool
) -> list[Row]:
    """Let a model solve problems of the training once each, or find its solutions in the cache."""
    decoder, tokenizer = load(model, trust_remote_code=trust_remote_code)
    if tokenizer.get_vocab() != {token: index for index, token in enumerate(VOCABULARY)}:
        raise ValueError(f"the tokenizer of {model} is not that of the arithmetic recipe")
    decoder.eval()
    key = fingerprint(
        {
            **decoder.state_dict(),
            "config": decoder.config.to_json_string(),
            "drawn": (seed, number),
        }
    )
    path = Path(folder) / f"arithmetic-rows-{key[:16]}.jsonl"
    if not path.exists():
        # The base model's texts are drawn with small seeds.
        examples = problems(number, 1_000_000 + seed, "train")
        columns = ("prompt", "completion", "score", "correct")
        rows = to_rows(sample(decoder, tokenizer, examples, seed=seed))
        write_json_lines(path, ({name: getattr(row, name) for name in columns} for row in rows))
    return read(path)


def solve_held_out(model: Any, tokenizer: Any, number: int, *, seed: int) -> Evaluation:
    """Let a model solve held-out problems, see ``ArithmeticRecipe.evaluate``."""
    held_out = problems(number, TEST_SEED, "held-out")
    sampled = sample(model, tokenizer, held_out, seed=seed)
    greedy = sample(model, tokenizer, held_out, seed=seed, temperature=0.0)
    chances = strategy_probabilities(model, tokenizer, held_out).mean(0).tolist()
    success = rates([solution.verdict for solution in sampled])[1]
    asked = set(held_out)
    others = [each for each in problems(number, VALIDATION_SEED, "held-out") if each not in asked]
    validated = sample(model, tokenizer, others, seed=seed)
    n = len(held_out)
    right = sum(solution.verdict.score for solution in sampled)
    right_greedy = sum(solution.verdict.score for solution in greedy)
    return {
        "score": right / n,
        "interval": wilson_interval(right / n, n),
        "n": n,
        "validation": sum(each.verdict.score for each in validated) / len(validated),
        "greedy": right_greedy / n,
        "greedy_interval": wilson_interval(right_greedy / n, n),
        **{f"share_{name}": share for name, share in zip(STRATEGIES, chances, strict=True)},
        **{f"success_{name}": share for name, share in success.items()},
        "tokens": sum(solution.tokens for solution in sampled) / n,
    }


@dataclass(frozen=True)
class Sample:
    """A solution of a model; a text that did not end is wrong."""

    problem: Problem
    completion: str
    tokens: int
    verdict: Verdict


def sample(
    model: Any,
    tokenizer: Any,
    problems: Sequence[Problem],
    *,
    seed: int,
    temperature: float = 1.0,
) -> list[Sample]:
    """Let a model solve each problem once, with a generator of its own; temperature 0 is greedy."""
    prompts = tokenizer([problem.prompt for problem in problems])["input_ids"]
    seeds = np.random.default_rng(seed).integers(2**62, size=len(problems)).tolist()
    requests = [
        Request(prompt, CONTEXT - len(prompt), seed=own)
        for prompt, own in zip(prompts, seeds, strict=True)
    ]
    completions = TransformersGenerator(model, batch_size=_BATCH).generate(
        requests, stop=frozenset({tokenizer.eos_token_id}), temperature=temperature
    )
    texts = tokenizer.batch_decode([completion.tokens for completion in completions])
    samples = []
    for problem, text, completion in zip(problems, texts, completions, strict=True):
        verdict = check(problem, text)
        ended = completion.stop is not None
        if not ended:
            verdict = Verdict(0, verdict.strategy, verdict.shown)
        samples.append(Sample(problem, text, len(completion.tokens) + ended, verdict))
    return samples


def to_rows(samples: Sequence[Sample]) -> list[Row]:
    """Make rows with ``score`` = quality, for the bins of D_Q+, and ``correct`` = right, for D+.

    Empty completions are left out, as there is nothing to train on.
    """
    return [
        Row(
            where=f"sample {number}",
            prompt=solution.problem.prompt,
            completion=solution.completion,
            score=solution.verdict.quality,
            correct=bool(solution.verdict.score),
        )
        for number, solution in enumerate(samples)
        if solution.completion
    ]


def rates(verdicts: Sequence[Verdict]) -> tuple[dict[str, float], dict[str, float]]:
    """Compute the share of each strategy, and that of right answers within it (0 if unused)."""
    shares, success = {}, {}
    for name in STRATEGIES:
        scores = [verdict.score for verdict in verdicts if verdict.strategy == name]
        shares[name] = len(scores) / len(verdicts)
        success[name] = sum(scores) / len(scores) if scores else 0.0
    return shares, success


@torch.no_grad()
def strategy_probabilities(model: Any, tokenizer: Any, problems: Sequence[Problem]) -> Tensor:
    """Compute the exact chance of each strategy, ``[problems, strategies]``, for equal lengths."""
    markers = [tokenizer.convert_tokens_to_ids(way.marker) for way in STRATEGIES.values()]
    prompts = torch.tensor(tokenizer([problem.prompt for problem in problems])["input_ids"])
    logits = [
        model(input_ids=batch.to(model.device), logits_to_keep=1).logits[:, -1].float()
        for batch in prompts.split(_BATCH)
    ]
    return torch.cat(logits).softmax(-1)[:, markers].cpu()


def facts(rows: Sequence[Row]) -> Mapping[str, Any]:
    """Compute what the rows say of their policy, and what theory predicts of tuning on them.

    ``predicted`` is the mean score of SFT in the limit and of the best strategy alone.
    """
    shares, success = rates([check(parse(row.prompt), row.completion or "") for row in rows])
    notes: dict[str, Any] = {
        "rows": len(rows),
        "right": sum(bool(row.correct) for row in rows) / len(rows),
        "shares": shares,
        "success": success,
    }
    # SFT copies how the strategies share the successes (paper, Section 3.5).
    right = sum(share * success[name] for name, share in shares.items())
    if right > 0:
        squares = sum(share * success[name] ** 2 for name, share in shares.items())
        notes["predicted"] = {"sft": squares / right, "best strategy": max(success.values())}
    return notes


def usable(source: str) -> list[Row]:
    """Read judged rows; those on held-out problems are left out with a warning."""
    rows, usable = read(source), []
    for row in rows:
        if row.completion is None or row.correct is None:
            raise ValueError(f"{row.where}: prompt, completion and correct are needed in each row")
        try:
            problem = parse(row.prompt)
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from error
        if split_of(problem) == "train":
            usable.append(row)
    if not usable:
        raise ValueError(f"all rows are on held-out problems, which the test asks ({len(rows)})")
    if len(usable) < len(rows):
        warnings.warn(
            f"{len(rows) - len(usable)} of {len(rows)} rows are on held-out problems: left out",
            UserWarning,
            stacklevel=3,
        )
    return usable
