"""Importance weights whose sharpness the scores of the data choose."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class LowerBound:
    """Trajectory: w <- w^alpha / mean w^alpha, where alpha promises the best score.

    alpha is the one of :data:`EXPONENTS` with the largest lower bound of the gain over alpha = 0,
    sum_j d_j z_j - sqrt(sum_j o_j^2). With p_j = m_j w_j^alpha / sum m w^alpha, d is the change of
    p and o that of p / (1 - p) from alpha = 0. z is the standard score, and the root is the
    jackknife's standard error (docs/algorithm.md derives it). With equal scores alpha is 0.
    """

    place: ClassVar[Literal["trajectory"]] = "trajectory"
    compares: ClassVar[bool] = True
    reads: ClassVar[str] = "standard_score"

    def __call__(self, log_weight: Tensor, share: Tensor, score: Tensor) -> tuple[Tensor, Choice]:
        counts = share > 0
        top = torch.where(counts, log_weight, -torch.inf).amax()
        # Over the largest, so that a common factor changes no bit.
        shifted = torch.where(counts, log_weight.double() - top, 0.0)
        score = torch.where(counts, score, score[share.argmax()]).double()
        exponents = torch.tensor(EXPONENTS, dtype=torch.float64, device=share.device)
        log_p = torch.log_softmax(exponents[:, None] * shifted + share.double().log(), 1)
        p = log_p.exp()
        odds = p / -torch.expm1(log_p)
        # A lone trajectory has infinite odds, which no exponent changes.
        error = torch.where(p == p[0], 0.0, odds - odds[0]).square().sum(1).sqrt()
        bound = ((p - p[0]) * score).sum(1) - error
        best = torch.where(score.amax() > score.amin(), bound.argmax(), 0)
        log = torch.where(counts, log_p[best] - log_p[0], 0.0).to(log_weight.dtype)
        return log, Choice(exponents[best], 1 / p[best].square().sum(), bound[best])
