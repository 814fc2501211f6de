"""Solutions that a model writes, judged; and the rows to fine-tune on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.llm.recipes.arithmetic.base import CONTEXT
from benchmarks.llm.recipes.arithmetic.strategies import STRATEGIES, Verdict, check
from benchmarks.llm.recipes.arithmetic.task import Problem
from iwsft.datasets.text.rows import Row
from iwsft.language.generation import Request, TransformersGenerator

# The KV cache of so many rows is a few MB.
_BATCH = 512


@dataclass(frozen=True)
class Sample:
    """A solution of a model.

    Attributes:
        problem: The problem that the model was given.
        completion: The model's text, without the end-of-text token.
        tokens: Number of tokens of the text, its end among them.
        verdict: The checker's verdict; a text that did not end is wrong and does not parse.
    """

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
    """Let a model solve each problem once.

    Args:
        model: A transformers decoder.
        tokenizer: The model's tokenizer.
        problems: Problems to solve; one may occur several times.
        seed: Seed of the generators; each solution has one of its own, so it does not depend on
            the others in its batch, except for rounding.
        temperature: 1 draws from the model as it is, 0 takes the likeliest token.
    """
    prompts = tokenizer([problem.prompt for problem in problems])["input_ids"]
    seeds = np.random.default_rng(seed).integers(2**62, size=len(problems)).tolist()
    completions = TransformersGenerator(model, batch_size=_BATCH).generate(
        [
            Request(prompt, CONTEXT - len(prompt), seed=own)
            for prompt, own in zip(prompts, seeds, strict=True)
        ],
        stop=frozenset({tokenizer.eos_token_id}),
        temperature=temperature,
    )
    texts = tokenizer.batch_decode([completion.tokens for completion in completions])
    samples = []
    for problem, text, completion in zip(problems, texts, completions, strict=True):
        verdict = check(problem, text)
        ended = completion.stop is not None
        if not ended:
            verdict = Verdict(0, verdict.strategy, False, verdict.shown)
        samples.append(Sample(problem, text, len(completion.tokens) + ended, verdict))
    return samples


def to_rows(samples: Sequence[Sample]) -> list[Row]:
    """Make rows with ``score`` = quality and ``correct`` = right.

    ``correct`` cuts D+ out of them. Of D+ the score makes the quality bins of D_Q+: see
    ``Verdict.quality``; wrong rows have 0, right ones 1/2 to 1. Empty completions are left out, as
    there is nothing to train on.
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


def rates(samples: Sequence[Sample]) -> tuple[dict[str, float], dict[str, float]]:
    """Compute the share of each strategy, and the share of right answers within it.

    The shares sum to less than 1 where texts begin otherwise. A strategy that was never used has
    success 0.
    """
    shares, success = {}, {}
    for name in STRATEGIES:
        scores = [one.verdict.score for one in samples if one.verdict.strategy == name]
        shares[name] = len(scores) / len(samples)
        success[name] = sum(scores) / len(scores) if scores else 0.0
    return shares, success


@torch.no_grad()
def strategy_probabilities(model: Any, tokenizer: Any, problems: Sequence[Problem]) -> Tensor:
    """Compute the exact chance that a model begins with each strategy's words.

    Args:
        model: A transformers decoder.
        tokenizer: The model's tokenizer.
        problems: Problems of the same number of terms.

    Returns:
        ``[problems, strategies]`` float32, in the order of ``STRATEGIES``.
    """
    markers = [tokenizer.convert_tokens_to_ids(way.marker) for way in STRATEGIES.values()]
    prompts = torch.tensor(tokenizer([problem.prompt for problem in problems])["input_ids"])
    was_training = model.training
    model.eval()
    logits = [
        model(input_ids=batch.to(model.device), logits_to_keep=1).logits[:, -1].float()
        for batch in prompts.split(_BATCH)
    ]
    model.train(was_training)
    return torch.cat(logits).softmax(-1)[:, markers].cpu()
