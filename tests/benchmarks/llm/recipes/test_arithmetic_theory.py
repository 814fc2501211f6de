"""The closed forms against the paper and against simulated filtering."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks.llm.recipes.arithmetic.task import STRATEGIES, after_rounds, mean_score

HALF = {"careful": 0.5, "hasty": 0.5, "guess": 0.0}
ARMS = {"careful": 1.0, "hasty": 0.5, "guess": 0.0}


def test_the_papers_bandit() -> None:
    # Section 3.5: a uniform policy, arms that succeed half of the time and always.
    assert mean_score(after_rounds(HALF, ARMS, 1), ARMS) == pytest.approx(5 / 6)
    assert mean_score(after_rounds(HALF, ARMS, 50), ARMS) == pytest.approx(1)
    assert after_rounds(HALF, ARMS, 0) == pytest.approx(HALF)


def test_rounds_are_repeated_filtering() -> None:
    shares = {name: strategy.share for name, strategy in STRATEGIES.items()}
    success = {name: strategy.success for name, strategy in STRATEGIES.items()}
    rng = np.random.default_rng(0)
    names, p = list(shares), np.array(list(shares.values()))
    s = np.array([success[name] for name in names])
    for rounds in (1, 2, 3):
        pulls = rng.choice(len(names), 200_000, p=p)
        kept = pulls[rng.random(len(pulls)) < s[pulls]]
        p = np.bincount(kept, minlength=len(names)) / len(kept)
        predicted = after_rounds(shares, success, rounds)
        assert [predicted[name] for name in names] == pytest.approx(p.tolist(), abs=0.01)


def test_an_empty_d_plus_is_an_error() -> None:
    never = dict.fromkeys(ARMS, 0.0)
    with pytest.raises(ValueError, match="D\\+ is empty"):
        after_rounds(HALF, never, 1)
