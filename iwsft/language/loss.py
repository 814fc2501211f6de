"""The loss over token trajectories, and the means of its terms over whole updates."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from iwsft.diagnostics import Weighed, describe, unweighted_loss, weighed
from iwsft.objective import ImportanceWeightedMLE, Terms
from iwsft.policies.causal_lm import CausalLMPolicy
from iwsft.policies.causal_lm_families import check_own_loss, decoder_of
from iwsft.trajectory import ASSISTANT_MASK, DATA_WEIGHT, STANDARD_SCORE, TOKENS
from iwsft.validation import check_data_weights

_NUMBERS = 7


def token_loss(policy: nn.Module, **settings: Any) -> ImportanceWeightedMLE:
    """:class:`~iwsft.ImportanceWeightedMLE` that reads tokens and the assistant mask.

    It holds the model of the policy itself (``functional=False``), as engines that shard it need. A
    model with a loss of its own, which this loss would leave out, is refused.
    """
    if isinstance(policy, CausalLMPolicy):
        check_own_loss(decoder_of(policy.model))
    loss = ImportanceWeightedMLE(policy, **{"functional": False, **settings})
    loss.loss_mask_key = ASSISTANT_MASK
    loss.set_keys(action=TOKENS)
    return loss


def negative_log_likelihood(
    loss: ImportanceWeightedMLE, trajectories: TensorDictBase, log_prob: Tensor
) -> tuple[float, float]:
    """Mean of -log p over trajectories (each divided by its length), and over tokens.

    Trajectories count by their multiplicity; ``log_prob`` is in their layout.
    """
    segments = loss.segments(trajectories)
    share = loss.share(trajectories, segments)
    tokens = share * segments.spread(segments.lengths)
    by_trajectory, by_token = ((m * log_prob).sum() / m.sum() for m in (share, tokens))
    return -float(by_trajectory), -float(by_token)


def check_weights(
    loss: ImportanceWeightedMLE, trajectories: TensorDictBase, name: str = repr(DATA_WEIGHT)
) -> None:
    """Refuse data weights, called ``name`` in the error, with which a loss can't be minimised."""
    weight = trajectories.get(DATA_WEIGHT, default=None)
    loss.importance_weights.check_signs(weight)
    if weight is not None:
        check_data_weights(weight, name)
        share = loss.share(trajectories, loss.segments(trajectories))
        loss.check_data_weights(weight, share)


def check_judges(judges: TensorDictBase) -> None:
    """Refuse trajectories whose scores can't choose an exponent."""
    scores = judges.get(STANDARD_SCORE, default=None)
    if scores is None or bool((scores == scores[0]).all()):
        raise ValueError(
            "these weights choose by the scores of the trajectories, which are missing or all "
            "equal, as those of right answers alone are: curate by graded scores, add right and "
            "wrong answers of multiplicity 0, or set a Temperature"
        )


def judge(loss: ImportanceWeightedMLE, judges: TensorDictBase, log_q: Tensor) -> None:
    """Let trajectories that are not trained on choose the exponent of the weights."""
    segments = loss.segments(judges)
    log_ratio = segments.where_valid(log_q - loss.reference(judges, segments))
    share, score = loss.share(judges, segments), judges.get(STANDARD_SCORE)
    loss.importance_weights = loss.importance_weights.judge(log_ratio, segments, share, score)


class Measures:
    """Sums over the trajectories of each update; no value is read before :meth:`collect`.

    Means count a trajectory by its multiplicity and give its tokens equal shares, as the
    diagnostics of :class:`~iwsft.ImportanceWeightedMLE` do, but over whole updates: all
    micro-batches that were accumulated, on all processes.
    """

    def __init__(self) -> None:
        self._updates: list[Tensor] = []
        # Micro-batches of the last update, with the scores of their trajectories.
        self._last: list[tuple[Terms, Tensor | None]] = []
        # What the scores have chosen for the window of the update.
        self.choice: dict[str, float] = {}

    def begin(self) -> None:
        """A new update begins."""
        self._updates.append(torch.zeros(_NUMBERS, dtype=torch.float64))
        self._last = []

    @torch.no_grad()
    def add(self, terms: Terms, clip_fraction: float, score: Tensor | None = None) -> None:
        """Add a micro-batch; the terms of cached weights do not know the share of clipped ones.

        ``score`` is the standard score of each token's trajectory.
        """
        share = terms.share

        def total(x: Tensor) -> Tensor:
            return torch.where(share > 0, share * x, 0.0).sum()

        weight = terms.log_weight.double().exp()
        draws = share.sum()
        clipped = draws * clip_fraction if terms.clipped is None else total(terms.clipped)
        kl = torch.full_like(draws, math.nan)
        if terms.reference is not None:
            kl = total(terms.reference - terms.log_prob)
        sums = torch.stack(
            [draws, total(weight), total(weight**2), total(terms.log_prob), kl, clipped]
        )
        top = torch.where(share > 0, weight, 0.0).amax()
        before = self._updates[-1].to(share.device)
        self._updates[-1] = torch.cat([before[:-1] + sums, torch.maximum(before[-1], top)[None]])
        # Without the graph, which holds the activations.
        self._last.append((terms._replace(log_prob=terms.log_prob.detach()), score))

    def collect(
        self, loss: ImportanceWeightedMLE, gather: Callable[[Any], list[Any]]
    ) -> dict[str, float]:
        """Means over the updates since the last call; empty if there was none.

        They are ``ESS`` (effective over drawn trajectories), ``weight_mean``, ``log_prob`` (mean
        over tokens), ``kl_approx`` (mean of log pi_ref - log p) and ``clip_fraction``. Two
        are not means: ``weight_max`` is the largest weight of all these updates, and ``ESS_min``
        the least ESS of one. Of the last update alone come the numbers of
        :func:`~iwsft.diagnostics.describe` and ``unweighted_loss``. Those that are not known are
        left out, and ``choice`` is added. ``gather`` lists the values of all processes.
        """
        if not self._updates:
            return {}
        mine = torch.stack(self._updates).cpu(), *_last_update(loss, self._last)
        self._updates, self._last = [], []
        sums, unweighted, parts = zip(*gather(mine), strict=True)
        everyone = torch.stack(sums)
        draws, weight, square, log_prob, kl, clipped = everyone[..., :-1].sum(0).unbind(1)
        by_update = {
            "ESS": weight**2 / (draws * square),
            "weight_mean": weight / draws,
            "log_prob": log_prob / draws,
            "kl_approx": kl / draws,
            "clip_fraction": clipped / draws,
        }
        means = {name: float(value.mean()) for name, value in by_update.items()}
        means["weight_max"] = float(everyone[..., -1].max())
        means["ESS_min"] = float(by_update["ESS"].min())
        total, divisor = torch.stack(unweighted).sum(0)
        means["unweighted_loss"] = float(total / divisor)
        known = {name: value for name, value in means.items() if not math.isnan(value)}
        return known | describe(*chain.from_iterable(parts)) | self.choice


def _last_update(
    loss: ImportanceWeightedMLE, parts: list[tuple[Terms, Tensor | None]]
) -> tuple[Tensor, list[Weighed]]:
    """The unweighted loss of micro-batches before its division, its divisor; the trajectories."""
    unweighted = torch.zeros(2, dtype=torch.float64)
    for terms, _ in parts:
        divisor = loss.divisor(terms.share, terms.data_weight)
        unweighted += torch.stack([unweighted_loss(loss, terms).double(), divisor]).cpu()
    return unweighted, [weighed(loss, *part) for part in parts]
