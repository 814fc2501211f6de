"""Likelihood of texts under a model: right solutions against wrong ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.llm.recipes.recipe import Evaluation
from benchmarks.llm.recipes.solutions import Question
from benchmarks.statistics import bootstrap_interval
from iwsft.datasets.text.rows import Row
from iwsft.datasets.text.tokens import tokenize
from iwsft.forward_pass import ForwardPass
from iwsft.language.batches import collate
from iwsft.policies.causal_lm import CausalLMPolicy
from iwsft.trajectory import ASSISTANT_MASK, Segments


def mean_log_probs(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    max_length: int | None = None,
    token_budget: int = 4096,
) -> NDArray[np.float64]:
    """Mean of log p over the trained tokens of each row, in nats, ``[len(rows)]``.

    Each process runs all rows.

    Args:
        model: A causal language model on its device.
        tokenizer: Tokenizer of the model.
        rows: Texts; a completion's end token counts among its tokens.
        max_length: Largest number of tokens of a row, see :func:`iwsft.language.tokenize`.
        token_budget: Largest number of tokens of a forward pass, padding included; a longer row has
            one of its own.

    Raises:
        ValueError: See :func:`iwsft.language.tokenize`, or a log-probability is not finite.
    """
    trajectories = tokenize(rows, tokenizer, max_length=max_length).trajectories
    log_prob = ForwardPass(
        CausalLMPolicy(model), trajectories, (), collate=collate, rows=token_budget, complete=True
    ).log_prob()
    segments = Segments.of(trajectories, mask=trajectories.get(ASSISTANT_MASK))
    means: NDArray[np.float64] = segments.mean(log_prob.double())[: len(rows)].numpy()
    if not np.isfinite(means).all():
        where = rows[int(np.flatnonzero(~np.isfinite(means))[0])].where
        raise ValueError(
            f"{where}: the log-probability of this row is not finite; did training diverge?"
        )
    return means


def right_against_wrong(
    questions: Sequence[Question], log_probs: NDArray[np.float64], *, seed: int
) -> Evaluation:
    """How much more likely right solutions are than wrong ones, question by question.

    Args:
        questions: Questions with solutions of both kinds.
        log_probs: Mean log p of a token for each row of the questions, in their order.
        seed: Seed of the bootstrap over questions.

    Returns:
        ``score``: probability that the right one of a right and a wrong solution of a question has
        the higher log-prob a token (AUC within the question, 1/2 for equal ones), mean over
        questions; ``interval``, ``n``; ``right_likelier``: share of questions where the mean of the
        right ones is higher; ``margin``: right minus wrong, nats a token, mean over questions, and
        ``margin_interval``; ``right_log_prob`` and ``wrong_log_prob``, also means over questions.
    """
    wins, means = [], []
    start = 0
    for question in questions:
        stop = start + len(question.rows)
        right = np.array([bool(row.correct) for row in question.rows])
        good, bad = log_probs[start:stop][right], log_probs[start:stop][~right]
        ahead = good[:, None] - bad[None, :]
        wins.append(((ahead > 0) + (ahead == 0) / 2).mean())
        means.append((good.mean(), bad.mean()))
        start = stop
    good, bad = np.array(means).T
    margins = good - bad
    return {
        "score": float(np.mean(wins)),
        "interval": bootstrap_interval(wins, seed=seed),
        "n": len(questions),
        "right_likelier": float(((margins > 0) + (margins == 0) / 2).mean()),
        "margin": float(margins.mean()),
        "margin_interval": bootstrap_interval(margins, seed=seed),
        "right_log_prob": float(good.mean()),
        "wrong_log_prob": float(bad.mean()),
    }
