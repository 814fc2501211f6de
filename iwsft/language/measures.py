"""What the updates between two log lines came to, over all of their micro-batches and processes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from iwsft.objective import Terms

_NUMBERS = 7


class Measures:
    """Sums over draws, an entry an update; nothing is looked at until :meth:`collect`.

    Means count a trajectory by its draws and give its tokens equal shares, as the diagnostics of
    :class:`~iwsft.ImportanceWeightedMLE` do, but over whole updates: all micro-batches that were
    accumulated, on all processes.
    """

    def __init__(self) -> None:
        self._updates: list[Tensor] = []

    def begin(self) -> None:
        """A new update begins."""
        self._updates.append(torch.zeros(_NUMBERS, dtype=torch.float64))

    @torch.no_grad()
    def add(self, terms: Terms, clip_fraction: float) -> None:
        """Add a micro-batch.

        Args:
            terms: of the loss.
            clip_fraction: share of clipped weights, where the terms do not know (cached weights).
        """
        share = terms.share.double()

        def total(x: Tensor) -> Tensor:
            return torch.where(share > 0, share * x, 0.0).sum()

        weight = terms.log_weight.double().exp()
        draws = share.sum()
        clipped = draws * clip_fraction if terms.clipped is None else total(terms.clipped.double())
        kl = torch.full_like(draws, math.nan)
        if terms.reference is not None:
            kl = total((terms.reference - terms.log_prob).double())
        sums = torch.stack(
            [draws, total(weight), total(weight**2), total(terms.log_prob.double()), kl, clipped]
        )
        top = torch.where(share > 0, weight, 0.0).amax()
        held = self._updates[-1].to(share.device)
        self._updates[-1] = torch.cat([held[:-1] + sums, torch.maximum(held[-1], top)[None]])

    def collect(self, gather: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Means over the updates since the last call; empty where there was none.

        Args:
            gather: ``[n, numbers]`` of this process -> ``[processes * n, numbers]``, of all.

        Returns:
            ``ESS`` (effective over drawn trajectories), ``weight_mean``, ``weight_max``,
            ``log_prob`` (mean over tokens), ``kl_approx`` (mean of log pi_ref - log p) and
            ``clip_fraction``; those that are not known are left out.
        """
        if not self._updates:
            return {}
        mine = torch.stack(self._updates)
        self._updates = []
        everyone = gather(mine).reshape(-1, *mine.shape)
        draws, weight, square, log_prob, kl, clipped = everyone[..., :-1].sum(0).unbind(-1)
        found = {
            "ESS": weight**2 / (draws * square),
            "weight_mean": weight / draws,
            "weight_max": everyone[..., -1].amax(0),
            "log_prob": log_prob / draws,
            "kl_approx": kl / draws,
            "clip_fraction": clipped / draws,
        }
        means = {name: float(value.mean()) for name, value in found.items()}
        return {name: value for name, value in means.items() if not math.isnan(value)}
