"""Importance weights whose sharpness the scores of the data choose."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

# Exponents to choose from: none of the weights to the largest one alone.
EXPONENTS = (0.0, *(2 ** (quarter / 4) for quarter in range(-16, 33)))


class Choice(NamedTuple):
    """What :class:`LowerBound` has chosen: alpha, 1 / sum p^2, the bound; float64 scalars."""

    exponent: Tensor
    effective_trajectories: Tensor
    gain_bound: Tensor


class Evidence(NamedTuple):
    """sum_j d_j z_j and sum_j o_j^2 of each exponent, and the largest log-weight; float64."""

    gain: Tensor
    variance: Tensor
    top: Tensor


@dataclass(frozen=True)
class LowerBound:
    """Trajectory: w <- w^alpha / mean w^alpha, where alpha promises the best score.

    alpha is the one of :data:`EXPONENTS` with the largest lower bound of the gain over alpha = 0,
    sum_j d_j z_j - sqrt(sum_j o_j^2). With p_j = m_j w_j^alpha / sum m w^alpha, d is the change of
    p and o that of p / (1 - p) from alpha = 0. z is the standard score, and the root is the
    jackknife's standard error (docs/algorithm.md derives it). With equal scores alpha is 0.

    After :meth:`judge` other trajectories give the gain, and both variances are added. A weight
    above the largest of the others is clipped to it, because they say nothing about it.
    """

    place: ClassVar[Literal["trajectory"]] = "trajectory"
    compares: ClassVar[bool] = True
    reads: ClassVar[str] = "standard_score"

    judged: Evidence | None = field(default=None, repr=False, compare=False)

    def __call__(self, log_weight: Tensor, share: Tensor, score: Tensor) -> tuple[Tensor, Choice]:
        if self.judged is not None:
            log_weight = log_weight.clamp(max=self.judged.top.to(log_weight.dtype))
        log_p = _log_shares(log_weight, share)
        gain, variance = _gain(log_p, share, score), _variance(log_p)
        if self.judged is not None:
            gain, variance = self.judged.gain, self.judged.variance + variance
        bound = gain - variance.sqrt()
        best = torch.where(gain.amax() > 0, bound.argmax(), 0)
        log = torch.where(share > 0, log_p[best] - log_p[0], 0.0).to(log_weight.dtype)
        p = log_p[best].exp()
        exponents = bound.new_tensor(EXPONENTS)
        return log, Choice(exponents[best], 1 / p.square().sum(), bound[best])

    def judge(self, log_weight: Tensor, share: Tensor, score: Tensor) -> LowerBound:
        """Return the transform whose alpha these trajectories choose; they are not weighed."""
        log_p = _log_shares(log_weight, share)
        top = torch.where(share > 0, log_weight, -torch.inf).amax()
        return LowerBound(Evidence(_gain(log_p, share, score), _variance(log_p), top.double()))


def _log_shares(log_weight: Tensor, share: Tensor) -> Tensor:
    """log p_j of each exponent, float64 ``[E, N]``."""
    counts = share > 0
    top = torch.where(counts, log_weight, -torch.inf).amax()
    # Over the largest, so that a common factor changes no bit.
    shifted = torch.where(counts, log_weight.double() - top, 0.0)
    exponents = torch.tensor(EXPONENTS, dtype=torch.float64, device=share.device)
    return torch.log_softmax(exponents[:, None] * shifted + share.double().log(), 1)


def _gain(log_p: Tensor, share: Tensor, score: Tensor) -> Tensor:
    # Over one of them, so that equal scores give no gain at all.
    score = torch.where(share > 0, score.double() - score[share.argmax()].double(), 0.0)
    return ((log_p.exp() - log_p[0].exp()) * score).sum(1)


def _variance(log_p: Tensor) -> Tensor:
    p = log_p.exp()
    odds = p / -torch.expm1(log_p)
    # A lone trajectory has infinite odds, which no exponent changes.
    return torch.where(p == p[0], 0.0, odds - odds[0]).square().sum(1)
