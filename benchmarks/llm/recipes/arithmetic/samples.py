"""Solutions that a model writes, judged; and the rows to fine-tune on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.llm.recipes.arithmetic.checker import Verdict, check
from benchmarks.llm.recipes.arithmetic.strategies import STRATEGIES
from benchmarks.llm.recipes.arithmetic.task import Problem
from benchmarks.llm.recipes.arithmetic.tokenizer import CONTEXT
from iwsft.datasets.text.rows import Row
from iwsft.language.generation import Request, TransformersGenerator

# The KV cache of so many rows is a few MB.
_BATCH = 512


@dataclass(frozen=True)
class Sample:
    """A solution of a model.

    Attributes:
        problem: what was asked.
        completion: what was written, without the end-of-text token.
        tokens: how many were written, the end among them.
        verdict: of the checker; a text that did not end is wrong and does not parse.
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
    n: int = 1,
    temperature: float = 1.0,
) -> list[Sample]:
    """Let a model solve problems.

    Args:
        model: a transformers decoder.
        tokenizer: of the model.
        problems: what to solve.
        seed: of the draws; each solution has draws of its own, so it does not depend on the others
            it is batched with, but for rounding.
        n: solutions of each problem; they follow each other.
        temperature: 1 draws from the model as it is, 0 takes the likeliest token.

    Raises:
        ValueError: n below 1, or a negative temperature.
    """
    if n < 1:
        raise ValueError(f"n={n} solutions of each problem; at least 1 is needed")
    asked = [problem for problem in problems for _ in range(n)]
    prompts = tokenizer([problem.prompt for problem in asked])["input_ids"]
    seeds = np.random.default_rng(seed).integers(2**62, size=len(asked)).tolist()
    completions = TransformersGenerator(model, batch_size=_BATCH).generate(
        [
            Request(prompt, CONTEXT - len(prompt), seed=own)
            for prompt, own in zip(prompts, seeds, strict=True)
        ],
        stop=frozenset({tokenizer.eos_token_id}),
        temperature=temperature,
    )
    texts = tokenizer.batch_decode([each.tokens for each in completions])
    samples = []
    for problem, text, completion in zip(asked, texts, completions, strict=True):
        verdict = check(problem, text)
        if completion.stop is None:
            verdict = Verdict(0, verdict.strategy, False, verdict.shown)
        samples.append(
            Sample(problem, text, len(completion.tokens) + (completion.stop is not None), verdict)
        )
    return samples


def to_rows(samples: Sequence[Sample]) -> list[Row]:
    """Rows of ``iwsft.language``: prompt, completion, ``score`` = quality, ``correct`` = right.

    ``correct`` cuts D+ out of them. Of D+ the score makes the quality bins of D_Q+: see
    ``Verdict.quality``; wrong rows have 0, right ones 1/2 to 1. Empty completions are left out, as
    there is nothing to train on.
    """
    return [
        Row(
            where=f"sample {number}",
            prompt=each.problem.prompt,
            completion=each.completion,
            score=each.verdict.quality,
            correct=bool(each.verdict.score),
        )
        for number, each in enumerate(samples)
        if each.completion
    ]


def rates(samples: Sequence[Sample]) -> tuple[dict[str, float], dict[str, float]]:
    """Share of each strategy among the samples, and share of right answers within it.

    The shares sum to less than 1 where texts begin otherwise. A strategy that was never used has
    success 0.
    """
    shares, success = {}, {}
    for name in STRATEGIES:
        scores = [each.verdict.score for each in samples if each.verdict.strategy == name]
        shares[name] = len(scores) / len(samples)
        success[name] = sum(scores) / len(scores) if scores else 0.0
    return shares, success


@torch.no_grad()
def strategy_probabilities(model: Any, tokenizer: Any, problems: Sequence[Problem]) -> Tensor:
    """Chance that a model begins with each strategy's words, exact: the bandit's policy.

    Args:
        model: a transformers decoder.
        tokenizer: of the model.
        problems: of the same number of terms.

    Returns:
        ``[problems, strategies]`` float32, in the order of ``STRATEGIES``.
    """
    markers = [tokenizer.convert_tokens_to_ids(each.marker) for each in STRATEGIES.values()]
    prompts = torch.tensor(tokenizer([problem.prompt for problem in problems])["input_ids"])
    was_training = model.training
    model.eval()
    logits = [
        model(input_ids=batch.to(model.device), logits_to_keep=1).logits[:, -1].float()
        for batch in prompts.split(_BATCH)
    ]
    model.train(was_training)
    return torch.cat(logits).softmax(-1)[:, markers].cpu()
