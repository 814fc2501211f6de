"""Likelihood of texts under a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

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

    Each process runs all rows, in forward passes of ``token_budget`` tokens at the most, padding
    included; a longer row has one of its own. A completion's end token counts among its tokens.
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
