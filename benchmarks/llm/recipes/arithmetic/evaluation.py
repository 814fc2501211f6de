"""Held-out exact match of a model, with intervals, and what it does to get there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.llm.evaluation.statistics import wilson
from benchmarks.llm.recipes.arithmetic.samples import (
    Sample,
    rates,
    sample,
    strategy_probabilities,
)
from benchmarks.llm.recipes.arithmetic.strategies import STRATEGIES
from benchmarks.llm.recipes.arithmetic.task import Problem


@dataclass(frozen=True)
class ExactMatch:
    """Share of right answers, one answer a problem.

    Attributes:
        right: how many.
        problems: of how many.
        interval: Wilson's, 95 %.
    """

    right: int
    problems: int
    interval: tuple[float, float]

    @property
    def share(self) -> float:
        """``right / problems``."""
        return self.right / self.problems


@dataclass(frozen=True)
class Outcome:
    """A model on problems that it was not trained on.

    Attributes:
        sampled: one answer a problem at temperature 1: the policy's expected score, as the
            objective has it and the closed forms of ``theory.py`` predict it.
        greedy: the likeliest tokens.
        shares: chance of each strategy, exact, mean over the problems.
        success: share of right answers within each strategy, of the sampled ones.
        parses: share of the sampled texts that have their strategy's form.
        tokens: mean length of the sampled completions.
    """

    sampled: ExactMatch
    greedy: ExactMatch
    shares: dict[str, float]
    success: dict[str, float]
    parses: float
    tokens: float


def evaluate(model: Any, tokenizer: Any, problems: Sequence[Problem], *, seed: int) -> Outcome:
    """Solve each problem once sampled and once greedily.

    Args:
        model: a transformers decoder.
        tokenizer: of the model.
        problems: held out, of the same number of terms.
        seed: of the sampled answers; the same for all models, so that they share their luck.

    Raises:
        ValueError: no problem.
    """
    if not problems:
        raise ValueError("there is not a single problem to evaluate on")
    sampled = sample(model, tokenizer, problems, seed=seed)
    greedy = sample(model, tokenizer, problems, seed=seed, temperature=0.0)
    chances = strategy_probabilities(model, tokenizer, problems).mean(0).tolist()
    return Outcome(
        sampled=exact_match(sampled),
        greedy=exact_match(greedy),
        shares=dict(zip(STRATEGIES, chances, strict=True)),
        success=rates(sampled)[1],
        parses=sum(each.verdict.parses for each in sampled) / len(sampled),
        tokens=sum(each.tokens for each in sampled) / len(sampled),
    )


def exact_match(samples: Sequence[Sample]) -> ExactMatch:
    """Right answers of one sample a problem; several of one problem are not independent.

    Raises:
        ValueError: a problem that was answered more than once, or none at all.
    """
    if len({each.problem for each in samples}) < len(samples):
        raise ValueError("Wilson's interval is for one answer a problem; pass one sample of each")
    right = sum(each.verdict.score for each in samples)
    return ExactMatch(right, len(samples), wilson(right, len(samples)))
