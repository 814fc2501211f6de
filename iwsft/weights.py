"""Importance weights: small transforms, chained from per-step log-ratios to one weight each.

With rho_i = log q(a_i|s_i) - log pi_ref(a_i|s_i) the weight of a trajectory is
w = exp(sum_i g(rho_i)) (paper, Eq. 11). A chain has three places: on the step (g), the reduction
along the trajectory, on the trajectory. Everything stays in log space; the loss takes the one
exponential at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from iwsft.trajectory import Segments

LOG_MAX = math.log(torch.finfo(torch.float32).max)


@dataclass(frozen=True)
class Temperature:
    """Step: g(x) = k x (paper, Section 3.4). k = 0 turns the weights off, a large k sharpens."""

    k: float

    def __post_init__(self) -> None:
        _require(self.k >= 0, f"Temperature(k={self.k}): k must not be negative")

    def __call__(self, log_ratio: Tensor) -> Tensor:
        return self.k * log_ratio


@dataclass(frozen=True)
class Scale:
    """Step: g(x) = c x, the constant before a clip in the paper's g(x) = 0.1 clip(x, 0.2, 1.8)."""

    c: float

    def __post_init__(self) -> None:
        _require(self.c > 0, f"Scale(c={self.c}): c must be positive, g has to increase")

    def __call__(self, log_ratio: Tensor) -> Tensor:
        return self.c * log_ratio


@dataclass(frozen=True)
class ClipLogRatio:
    """Step: clip the log-ratio to [min, max] (paper, Appendix C)."""

    min: float = -math.inf
    max: float = math.inf

    def __post_init__(self) -> None:
        _require(self.min <= self.max, f"ClipLogRatio: min {self.min} is above max {self.max}")

    def __call__(self, log_ratio: Tensor) -> Tensor:
        return log_ratio.clamp(self.min, self.max)


@dataclass(frozen=True)
class ClipRatio:
    """Step: clip the ratio q/pi_ref itself to [min, max] (paper, Section 3.4)."""

    min: float = 0.0
    max: float = math.inf

    def __post_init__(self) -> None:
        _require(
            0 <= self.min <= self.max,
            f"ClipRatio: 0 <= min <= max must hold, got [{self.min}, {self.max}]",
        )

    def __call__(self, log_ratio: Tensor) -> Tensor:
        return log_ratio.clamp(_log(self.min), _log(self.max))


@dataclass(frozen=True)
class TemperWeight:
    """Trajectory: w <- w^alpha."""

    alpha: float

    def __post_init__(self) -> None:
        _require(self.alpha >= 0, f"TemperWeight(alpha={self.alpha}) must not be negative")

    def __call__(self, log_weight: Tensor, count: Tensor) -> Tensor:
        return self.alpha * log_weight


@dataclass(frozen=True)
class ClipWeight:
    """Trajectory: clip the weight to [min, max] (paper, Section 3.4: beta_min, beta_max)."""

    min: float = 0.0
    max: float = math.inf

    def __post_init__(self) -> None:
        _require(
            0 <= self.min <= self.max,
            f"ClipWeight: 0 <= min <= max must hold, got [{self.min}, {self.max}]",
        )

    def __call__(self, log_weight: Tensor, count: Tensor) -> Tensor:
        return log_weight.clamp(_log(self.min), _log(self.max))


@dataclass(frozen=True)
class SelfNormalize:
    """Trajectory: divide by the mean weight of the batch, so that the mean weight is 1."""

    def __call__(self, log_weight: Tensor, count: Tensor) -> Tensor:
        return log_weight - log_mean_exp(log_weight, count)


@dataclass(frozen=True)
class TargetESS:
    """Trajectory: w <- w^alpha with alpha >= 0 such that the batch keeps a share of its samples.

    alpha solves ESS(w^alpha) = fraction, ESS = (sum m w)^2 / (sum m sum m w^2), by bisection in
    log alpha to a relative 1e-6. Where even ``max_alpha`` leaves the ESS above the fraction (all
    weights nearly equal, as just after the start) alpha is ``max_alpha``: rounding errors are not
    blown up into weights. Weights that are all 1 stay 1.

    Args:
        fraction: effective sample size over sample size, in (0, 1].
        max_alpha: the largest exponent.
    """

    fraction: float
    max_alpha: float = 1000.0
    _min_alpha: float = field(default=1e-6, repr=False)

    def __post_init__(self) -> None:
        _require(0 < self.fraction <= 1, f"TargetESS(fraction={self.fraction}) must be in (0, 1]")
        _require(self.max_alpha > 0, f"TargetESS(max_alpha={self.max_alpha}) must be positive")

    def __call__(self, log_weight: Tensor, count: Tensor) -> Tensor:
        # Shifting first keeps the products finite; a common factor leaves the ESS alone.
        top = torch.where(count > 0, log_weight, -math.inf).amax()
        shifted = torch.where(count > 0, log_weight - top, 0.0).double()
        count = count.double()
        low = torch.full((), math.log(self._min_alpha), dtype=torch.float64, device=count.device)
        high = torch.full((), math.log(self.max_alpha), dtype=torch.float64, device=count.device)
        for _ in range(25):
            middle = (low + high) / 2
            enough = log_ess(middle.exp() * shifted, count) > math.log(self.fraction)
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        return (high.exp() * log_weight.double()).to(log_weight.dtype)


StepTransform = Callable[[Tensor], Tensor]
TrajectoryTransform = Callable[[Tensor, Tensor], Tensor]
_CLIPS = (ClipLogRatio, ClipRatio, ClipWeight)


@dataclass(frozen=True)
class ImportanceWeights:
    """A chain from per-step log-ratios to log-weights.

    Args:
        step: transforms g of a step's log-ratio, applied in order; increasing functions.
        reduce: along the trajectory: ``"sum"`` (Eq. 11), ``"mean"`` (Eq. 11 with k / length), or
            None: no reduction, each step weighs its own loss (the paper's per-step variant).
        trajectory: transforms of the log-weight of a trajectory (of a step with reduce=None).

    Raises:
        ValueError: an unknown reduction, or a transform in the wrong place.
    """

    step: Sequence[StepTransform] = ()
    reduce: Literal["sum", "mean"] | None = "mean"
    trajectory: Sequence[TrajectoryTransform] = ()

    def __post_init__(self) -> None:
        _require(
            self.reduce in ("sum", "mean", None),
            f"reduce must be 'sum', 'mean' or None, not {self.reduce!r}",
        )
        late = (TemperWeight, ClipWeight, SelfNormalize, TargetESS)
        early = (Temperature, Scale, ClipLogRatio, ClipRatio)
        for g in self.step:
            _require(not isinstance(g, late), f"{g} belongs to trajectory=[...]")
        for transform in self.trajectory:
            _require(not isinstance(transform, early), f"{transform} belongs to step=[...]")

    def __call__(
        self, log_ratio: Tensor, segments: Segments, count: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Weigh a batch.

        Args:
            log_ratio: log q - log pi_ref of each step, in the layout of the batch.
            segments: the trajectories of the batch.
            count: how much each step counts, in the layout of the batch: the draws of its
                trajectory over its length (so a trajectory's steps add up to its draws), 0 where
                masked.

        Returns:
            Log-weight of each step (its trajectory's, unless reduce=None), and whether a clip
            changed the step or its trajectory; both in the layout of the batch.
        """
        clipped = torch.zeros_like(log_ratio, dtype=torch.bool)
        for g in self.step:
            before, log_ratio = log_ratio, g(log_ratio)
            if isinstance(g, _CLIPS):
                clipped = clipped | (before != log_ratio)
        if self.reduce is None:
            log_weight = log_ratio
        else:
            log_weight = (
                segments.sum(log_ratio) if self.reduce == "sum" else segments.mean(log_ratio)
            )
            count = segments.sum(count)
        changed = torch.zeros_like(log_weight, dtype=torch.bool)
        for transform in self.trajectory:
            before, log_weight = log_weight, transform(log_weight, count)
            if isinstance(transform, _CLIPS):
                changed = changed | (before != log_weight)
        if self.reduce is not None:
            log_weight, changed = segments.spread(log_weight), segments.spread(changed)
        return log_weight, clipped | changed

    def check_overflow(self, longest: int) -> None:
        """Refuse a chain whose least possible weight overflows float32 on a long trajectory.

        The literal g of the paper does: 0.1 clip(x, 0.2, 1.8) is at least 0.02 a step, so the
        weight is at least e^(0.02 T), beyond float32 for T > 4,436.

        Args:
            longest: steps of the longest trajectory.

        Raises:
            OverflowError: naming the chain, the length and what to do.
        """
        least = torch.full((longest,), -math.inf)
        segments = Segments(least.shape, torch.zeros(longest, dtype=torch.int64), None, 1)
        one = torch.full((longest,), 1.0 / longest)
        # Normalisation would hide the overflow of a lone trajectory, so it is left out.
        rest = [t for t in self.trajectory if isinstance(t, TemperWeight | ClipWeight)]
        chain = ImportanceWeights(self.step, self.reduce, rest)
        floor = float(chain(least, segments, one)[0][0])
        if floor > LOG_MAX:
            raise OverflowError(
                f"{self} gives a trajectory of {longest} steps a weight of at least "
                f"exp({floor:.4g}), beyond float32; use reduce='mean', shorter trajectories, or "
                "trajectory=[ClipWeight(max=...)]"
            )

    @classmethod
    def paper_control(cls, k: float) -> ImportanceWeights:
        """g(x) = k x over the length, no clip (paper, Eq. 11 and Table 4, column k / |tau|)."""
        return cls(step=(Temperature(k),), reduce="mean")

    @classmethod
    def paper_llm(cls) -> ImportanceWeights:
        """g(x) = 0.1 clip(x, 0.2, 1.8), summed (paper, Appendix C); see :meth:`check_overflow`.

        g(0) = 0.02, so weights do not start at 1.
        """
        return cls(step=(ClipLogRatio(0.2, 1.8), Scale(0.1)), reduce="sum")

    @classmethod
    def authors_control(cls, k: float, normalize: bool) -> ImportanceWeights:
        """exp(k mean log-ratio), clipped to [0, 1000], as in the authors' control code.

        With ``normalize`` their code divides by the sum over the batch and takes a mean again;
        :class:`SelfNormalize` differs from that by the constant 1/B, which Adam undoes.
        """
        last: tuple[TrajectoryTransform, ...] = (SelfNormalize(),) if normalize else ()
        return cls(
            step=(Temperature(k),), reduce="mean", trajectory=(ClipWeight(0.0, 1000.0), *last)
        )

    @classmethod
    def authors_llm(cls) -> ImportanceWeights:
        """exp(mean log-ratio) clipped to [0, 16], as in the authors' language-model code."""
        return cls(reduce="mean", trajectory=(ClipWeight(0.0, 16.0),))


def log_mean_exp(log_weight: Tensor, count: Tensor) -> Tensor:
    """log(sum m w / sum m) over all elements, in float64 inside; elements of count 0 are out."""
    held = torch.where(count > 0, log_weight.double() + count.double().log(), -math.inf)
    total = torch.logsumexp(held.reshape(-1), 0) - count.sum(dtype=torch.float64).log()
    return total.to(log_weight.dtype)


def log_ess(log_weight: Tensor, count: Tensor) -> Tensor:
    """log of ESS / sample size = 2 log E[w] - log E[w^2], E over elements by their count."""
    return 2 * log_mean_exp(log_weight, count) - log_mean_exp(2 * log_weight, count)


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
