"""Problems, strategies, checker and tokenizer of the arithmetic recipe."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from scipy import stats
from transformers import AutoTokenizer

from benchmarks.llm.recipes.arithmetic.base import CONTEXT, VOCABULARY, tokenizer
from benchmarks.llm.recipes.arithmetic.task import (
    ANSWERS,
    STRATEGIES,
    TERMS,
    Problem,
    check,
    mixture,
    parse,
    problems,
    split_of,
)

PROBLEM = Problem((7, 8, -9, 6))


def wilson(count: int, of: int) -> tuple[float, float]:
    """99.99 % interval of a share."""
    interval = stats.binomtest(count, of).proportion_ci(0.9999, method="wilson")
    return interval.low, interval.high


def test_problems_are_what_python_computes() -> None:
    asked = problems(500, 0, "train")
    for problem in asked:
        # An independent evaluator of the text.
        assert eval(problem.prompt.rstrip("=")) == problem.answer == problem.values[-1]
        assert parse(problem.prompt) == problem
        assert len(problem.terms) == TERMS and problem.answer in ANSWERS
        assert min(problem.values) >= 0
    low, high = wilson(sum(problem.answer >= 20 for problem in asked), len(asked))
    assert low < 0.5 < high


def test_same_seed_same_problems_and_fewer_are_the_first() -> None:
    assert problems(50, 3, "train") == problems(80, 3, "train")[:50]
    assert problems(50, 3, "train") != problems(50, 4, "train")
    assert len(set(problems(2000, 3, "train"))) == 2000


def test_no_seed_puts_a_held_out_problem_into_training() -> None:
    held_out = set(problems(300, 0, "held-out"))
    assert all(split_of(problem) == "held-out" for problem in held_out)
    for seed in (0, 1, 2):
        assert held_out.isdisjoint(problems(3000, seed, "train"))


def test_other_prompts_are_named() -> None:
    for prompt in ("7+8", "7+0=", "-7+8=", "7*8=", ""):
        with pytest.raises(ValueError, match="not a problem of this task"):
            parse(prompt)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_strategy_succeeds_as_often_as_it_says(name: str) -> None:
    rng = np.random.default_rng(0)
    asked = problems(3000, 5, "train")
    verdicts = [check(problem, STRATEGIES[name].write(problem, rng)) for problem in asked]
    assert all(verdict.strategy == name for verdict in verdicts)
    low, high = wilson(sum(verdict.score for verdict in verdicts), len(verdicts))
    assert low < STRATEGIES[name].success < high


def test_the_mixture_has_its_shares() -> None:
    asked = problems(3000, 6, "train")
    texts = mixture(asked, 0)
    assert texts == mixture(asked, 0) != mixture(asked, 1)
    pairs = zip(asked, texts, strict=True)
    counts = Counter(check(problem, text).strategy for problem, text in pairs)
    for name, strategy in STRATEGIES.items():
        low, high = wilson(counts[name], len(asked))
        assert low < strategy.share < high
    assert sum(strategy.share for strategy in STRATEGIES.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "score", "strategy", "quality"),
    [
        ("Step by step: 7+8=15-9=6+6=12 Answer: 12", 1, "careful", 1.0),
        ("Step by step: 7+8=5-9=6+6=12 Answer: 12", 1, "careful", 5 / 6),
        ("Step by step: 7+8=15-9=6+6=12 Answer: 13", 0, "careful", 0.0),
        ("Step by step: 7+8=15-9=6 Answer: 12", 1, "careful", 5 / 6),
        ("Last digits: 7+8=5-9=6+6=2 Answer: 12", 1, "hasty", 2 / 3),
        ("Last digits: 7+8=15-9=6+6=2 Answer: 12", 1, "hasty", 5 / 6),
        ("Guess: Answer: 12", 1, "guess", 0.5),
        ("Guess: Answer: 012", 0, "guess", 0.0),
        ("Guess: Answer: 12 Answer: 13", 0, "guess", 0.0),
        ("Guess: Answer: 12.", 0, "guess", 0.0),
        (" Answer: 12", 1, None, 0.5),
        ("", 0, None, 0.0),
    ],
)
def test_verdicts(text: str, score: int, strategy: str | None, quality: float) -> None:
    verdict = check(PROBLEM, text)
    assert (verdict.score, verdict.strategy) == (score, strategy)
    assert verdict.quality == pytest.approx(quality)


def test_tokens_do_not_merge_across_prompt_and_completion() -> None:
    tokens = tokenizer()
    asked = problems(300, 0, "train")
    for problem, text in zip(asked, mixture(asked, 0), strict=True):
        both = tokens(problem.prompt + text)["input_ids"]
        assert both == tokens(problem.prompt)["input_ids"] + tokens(text)["input_ids"]
        assert tokens.decode(both) == problem.prompt + text
        assert len(both) < CONTEXT
        assert len(tokens(problem.prompt)["input_ids"]) == TERMS + 1
    for strategy in STRATEGIES.values():
        assert len(tokens(strategy.marker)["input_ids"]) == 1


def test_the_tokenizer_is_the_same_from_disk(tmp_path: Path) -> None:
    tokens = tokenizer()
    tokens.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == {token: index for index, token in enumerate(VOCABULARY)}
    random.seed(0)
    for _ in range(50):
        text = "".join(random.choices(VOCABULARY[2:], k=20))
        assert again(text)["input_ids"] == tokens(text)["input_ids"]
    assert (again.pad_token_id, again.eos_token_id) == (0, 1)


def test_the_chat_template_trains_the_answer_and_its_end() -> None:
    tokens = tokenizer()
    encoded = tokens.apply_chat_template(
        [
            {"role": "user", "content": "7+8="},
            {"role": "assistant", "content": "Guess: Answer: 15"},
        ],
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    trained = [
        t for t, m in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if m
    ]
    assert tokens.decode(trained) == "Guess: Answer: 15<eos>"
