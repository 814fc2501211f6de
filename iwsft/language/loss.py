"""The loss over token trajectories, and the means of its terms over whole updates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from iwsft.objective import ImportanceWeightedMLE, Terms
from iwsft.policies.causal_lm import CausalLMPolicy
from iwsft.policies.causal_lm_families import check_own_loss, decoder_of
from iwsft.trajectory import ASSISTANT_MASK, TOKENS

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


class Measures:
    """Sums over the trajectories of each update; no value is read before :meth:`collect`.

    Means count a trajectory by its multiplicity and give its tokens equal shares, as the
    diagnostics of :class:`~iwsft.ImportanceWeightedMLE` do, but over whole updates: all
    micro-batches that were accumulated, on all processes.
    """

    def __init__(self) -> None:
        self._updates: list[Tensor] = []
        # What the scores have chosen for the window of the update.
        self.choice: dict[str, float] = {}

    def begin(self) -> None:
        """A new update begins."""
        self._updates.append(torch.zeros(_NUMBERS, dtype=torch.float64))

    @torch.no_grad()
    def add(self, terms: Terms, clip_fraction: float) -> None:
        """Add a micro-batch; the terms of cached weights do not know the share of clipped ones."""
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

    def collect(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over the updates since the last call; empty if there was none.

        They are ``ESS`` (effective over drawn trajectories), ``weight_mean``, ``weight_max``,
        ``log_prob`` (mean over tokens), ``kl_approx`` (mean of log pi_ref - log p) and
        ``clip_fraction``; those that are not known are left out, and ``choice`` is added.
        ``gather`` makes ``[processes * n, numbers]`` of all from ``[n, numbers]`` of this process.
        """
        if not self._updates:
            return {}
        mine = torch.stack(self._updates)
        self._updates = []
        everyone = gather(mine).reshape(-1, *mine.shape)
        draws, weight, square, log_prob, kl, clipped = everyone[..., :-1].sum(0).unbind(1)
        by_update = {
            "ESS": weight**2 / (draws * square),
            "weight_mean": weight / draws,
            "weight_max": everyone[..., -1].amax(0),
            "log_prob": log_prob / draws,
            "kl_approx": kl / draws,
            "clip_fraction": clipped / draws,
        }
        means = {name: float(value.mean()) for name, value in by_update.items()}
        known = {name: value for name, value in means.items() if not math.isnan(value)}
        return known | self.choice
