"""Importance weights: small transforms, chained from per-step log-ratios to one weight each.

With rho_i = log q(a_i|s_i) - log pi_ref(a_i|s_i) the weight of a trajectory is
w = exp(sum_i g(rho_i)) (paper, Eq. 11). A chain has three places: on the step (g), the reduction
along the trajectory, on the trajectory. Everything stays in log space until the one exponential at
the end (:func:`exponential`).

A transform is a callable, :data:`StepTransform` or :data:`TrajectoryTransform`. It declares what it
is by class attributes, all of them optional:

- ``place``: ``"step"`` or ``"trajectory"``; a chain refuses it in the other place.
- ``clips``: if its output differs from its input, the weight counts as clipped.
- ``compares``: it compares all weights of a batch, so it needs the whole batch at once.
- ``scored``: it takes the trajectories' scores, too, and returns a
  :class:`~iwsft.lower_bound.Choice` as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from iwsft.lower_bound import Choice, LowerBound
from iwsft.trajectory import Segments, on_host

LOG_MAX = math.log(torch.finfo(torch.float32).max)
_MIN_ALPHA = 1e-6
Place = Literal["step", "trajectory"]
StepTransform = Callable[[Tensor], Tensor]
# Log-weights and how much each counts -> log-weights.
TrajectoryTransform = Callable[..., Any]


class Weights(NamedTuple):
    """Weights of the steps of a batch, in its layout.

    Attributes:
        log_weight: Log-weight of the step's trajectory (of the step with ``reduce=None``), 0 where
            masked or not counted.
        clipped: Whether a clip changed the weight.
        choice: What a transform has chosen by the scores, if there is one that does.
    """

    log_weight: Tensor
    clipped: Tensor
    choice: Choice | None = None


class _OfStep:
    place: ClassVar[Place] = "step"


class _OfTrajectory:
    place: ClassVar[Place] = "trajectory"


@dataclass(frozen=True)
class Temperature(_OfStep):
    """Step: g(x) = k x (paper, Section 3.4). k = 0 turns the weights off, a large k sharpens."""

    k: float

    def __post_init__(self) -> None:
        _require(0 <= self.k < math.inf, f"Temperature(k={self.k}): k must be finite, at least 0")

    def __call__(self, log_ratio: Tensor) -> Tensor:
        return self.k * log_ratio


@dataclass(frozen=True)
class Scale(_OfStep):
    """Step: g(x) = c x, the constant before a clip in the paper's g(x) = 0.1 clip(x, 0.2, 1.8)."""

    c: float

    def __post_init__(self) -> None:
        _require(0 < self.c < math.inf, f"Scale(c={self.c}): c must be positive and finite")

    def __call__(self, log_ratio: Tensor) -> Tensor:
        return self.c * log_ratio


@dataclass(frozen=True)
class ClipLogRatio(_OfStep):
    """Step: clip the log-ratio to [min, max] (paper, Appendix C)."""

    clips: ClassVar[bool] = True

    min: float = -math.inf
    max: float = math.inf

    def __post_init__(self) -> None:
        inside = self.min <= self.max and self.min < math.inf and self.max > -math.inf
        _require(inside, f"ClipLogRatio: [{self.min}, {self.max}] holds no finite log-ratio")

    def __call__(self, log_ratio: Tensor) -> Tensor:
        return log_ratio.clamp(self.min, self.max)


@dataclass(frozen=True)
class _Range:
    clips: ClassVar[bool] = True

    min: float = 0.0
    max: float = math.inf

    def __post_init__(self) -> None:
        inside = 0 <= self.min <= self.max and self.min < math.inf and self.max > 0
        name = type(self).__name__
        _require(inside, f"{name}: [{self.min}, {self.max}] holds no positive, finite number")

    def _clip(self, log: Tensor) -> Tensor:
        low, high = (math.log(x) if x > 0 else -math.inf for x in (self.min, self.max))
        return log.clamp(low, high)


@dataclass(frozen=True)
class ClipRatio(_Range, _OfStep):
    """Step: clip the ratio q/pi_ref itself to [min, max] (paper, Section 3.4)."""

    def __call__(self, log_ratio: Tensor) -> Tensor:
        return self._clip(log_ratio)


@dataclass(frozen=True)
class TemperWeight(_OfTrajectory):
    """Trajectory: w <- w^alpha."""

    alpha: float

    def __post_init__(self) -> None:
        inside = 0 <= self.alpha < math.inf
        _require(inside, f"TemperWeight(alpha={self.alpha}) must be finite, at least 0")

    def __call__(self, log_weight: Tensor, share: Tensor) -> Tensor:
        return self.alpha * log_weight


@dataclass(frozen=True)
class ClipWeight(_Range, _OfTrajectory):
    """Trajectory: clip the weight to [min, max] (paper, Section 3.4: beta_min, beta_max)."""

    def __call__(self, log_weight: Tensor, share: Tensor) -> Tensor:
        return self._clip(log_weight)


@dataclass(frozen=True)
class SelfNormalize(_OfTrajectory):
    """Trajectory: divide by the mean weight of the batch, so that the mean weight is 1."""

    compares: ClassVar[bool] = True

    def __call__(self, log_weight: Tensor, share: Tensor) -> Tensor:
        return log_weight - log_mean_exp(log_weight, share)


@dataclass(frozen=True)
class TargetESS(_OfTrajectory):
    """Trajectory: w <- w^alpha / mean w^alpha such that the batch keeps a share of its samples.

    alpha >= 0 solves ESS(w^alpha) = fraction, ESS = (sum m w)^2 / (sum m sum m w^2), by bisection
    in log alpha to a relative 1e-6. If even ``max_alpha`` leaves the ESS above the fraction (all
    weights nearly equal, as just after the start), alpha is ``max_alpha``, so that rounding errors
    are not amplified into weights. The mean weight is 1, whatever factor the weights have in
    common: with a large alpha it would overflow. So equal weights, and a lone one, become 1.

    Args:
        fraction: Effective sample size over sample size, in (0, 1].
        max_alpha: Largest exponent.
    """

    compares: ClassVar[bool] = True

    fraction: float
    max_alpha: float = 1000.0

    def __post_init__(self) -> None:
        _require(0 < self.fraction <= 1, f"TargetESS(fraction={self.fraction}) must be in (0, 1]")
        inside = 0 < self.max_alpha < math.inf
        _require(inside, f"TargetESS(max_alpha={self.max_alpha}) must be positive and finite")

    def __call__(self, log_weight: Tensor, share: Tensor) -> Tensor:
        shifted, share = _shifted(log_weight, share), share.double()
        low = torch.full((), math.log(_MIN_ALPHA), dtype=torch.float64, device=share.device)
        high = torch.full((), math.log(self.max_alpha), dtype=torch.float64, device=share.device)
        for _ in range(25):
            middle = (low + high) / 2
            enough = log_ess(middle.exp() * shifted, share) > math.log(self.fraction)
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        tempered = high.exp() * shifted
        return (tempered - log_mean_exp(tempered, share)).to(log_weight.dtype)


@dataclass(frozen=True)
class ImportanceWeights:
    """A chain from per-step log-ratios to log-weights.

    Args:
        step: Transforms g of a step's log-ratio, applied in order; increasing functions.
        reduce: Reduction along the trajectory: ``"sum"`` (Eq. 11), ``"mean"`` (Eq. 11 with
            k / length), or None: each step weighs its own loss (the paper's per-step variant).
        trajectory: Transforms of the log-weight of a trajectory (of a step with ``reduce=None``),
            applied in order.

    Raises:
        ValueError: The reduction is unknown, or a transform is in the wrong place.
    """

    step: Sequence[StepTransform] = ()
    reduce: Literal["sum", "mean"] | None = "mean"
    trajectory: Sequence[TrajectoryTransform] = ()

    def __post_init__(self) -> None:
        _require(
            self.reduce in ("sum", "mean", None),
            f"reduce must be 'sum', 'mean' or None, not {self.reduce!r}",
        )
        for here in get_args(Place):
            for transform in getattr(self, here):
                place = getattr(transform, "place", here)
                _require(place == here, f"{transform} belongs to {place}=[...]")
        _require(bool(self.reduce) or not self.scored, "steps have no scores: set reduce")

    @property
    def scored(self) -> bool:
        """Whether a transform reads the scores of the trajectories."""
        return any(_declares(t, "scored") for t in self.trajectory)

    @property
    def compares(self) -> bool:
        """Whether a transform compares all weights of a batch."""
        return any(_declares(t, "compares") for t in (*self.step, *self.trajectory))

    def __call__(
        self, log_ratio: Tensor, segments: Segments, share: Tensor, score: Tensor | None = None
    ) -> Weights:
        """Weigh a batch.

        Args:
            log_ratio: log q - log pi_ref of each step, in the layout of the batch.
            segments: Trajectories of the batch.
            share: How much each step counts, in the layout of the batch: the multiplicity of its
                trajectory over its length, 0 where masked.
            score: Standard score of each step's trajectory; needed where a transform reads it.

        Returns:
            The weights. On masked steps they have no meaning.
        """
        log_ratio, clipped, _ = _chained(self.step, log_ratio)
        if self.reduce is None:
            log_weight, changed, _ = _chained(self.trajectory, log_ratio, share)
            return Weights(log_weight, clipped | changed)
        along = segments.sum if self.reduce == "sum" else segments.mean
        score = None if score is None else segments.mean(score)
        x, share = along(log_ratio), segments.sum(share)
        log_weight, changed, choice = _chained(self.trajectory, x, share, score=score)
        return Weights(segments.spread(log_weight), clipped | segments.spread(changed), choice)

    @property
    def bounded(self) -> bool:
        """Whether a weight is bounded, and vanishes where q leaves the trajectory."""
        ends = torch.tensor([-1e30, 1e30])
        one = Segments(ends.shape, torch.arange(2), None, 2)
        # A comparison brings a common factor back.
        low, high = (0.0, 0.0) if self.compares else self(ends, one, torch.ones(2))[0].tolist()
        return low < -LOG_MAX and high <= LOG_MAX

    def check_overflow(self, longest: int) -> None:
        """Refuse a chain whose least weight overflows float32 on a trajectory of ``longest`` steps.

        The literal g of the paper does: 0.1 clip(x, 0.2, 1.8) is at least 0.02 per step, so the
        weight is at least e^(0.02 T), beyond float32 for T > 4,436.

        Raises:
            OverflowError: The chain overflows.
        """
        least = torch.full((longest,), -math.inf)
        segments = Segments(least.shape, torch.zeros(longest, dtype=torch.int64), None, 1)
        one = torch.full((longest,), 1.0 / longest)
        # A comparison would hide the overflow of a lone trajectory, so it is left out.
        alone = [t for t in self.trajectory if not _declares(t, "compares")]
        chain = ImportanceWeights(self.step, self.reduce, alone)
        floor = float(chain(least, segments, one)[0][0])
        if floor > LOG_MAX:
            raise OverflowError(
                f"{self} gives a trajectory of {longest} steps a weight of at least "
                f"exp({floor:.4g}), beyond float32; use reduce='mean' or ClipWeight(max=...)"
            )

    @classmethod
    def auto(cls) -> ImportanceWeights:
        """exp(alpha mean log-ratio), where the scores of the data choose alpha: LowerBound."""
        return cls(trajectory=(LowerBound(),))

    @classmethod
    def paper_control(cls, k: float) -> ImportanceWeights:
        """g(x) = k x over the length, no clip (paper, Eq. 11; ``k / |tau|`` of Table 4)."""
        return cls(step=(Temperature(k),))

    @classmethod
    def paper_llm(cls) -> ImportanceWeights:
        """g(x) = 0.1 clip(x, 0.2, 1.8), summed (paper, Appendix C); see :meth:`check_overflow`.

        g(0) = 0.02, so weights do not start at 1.
        """
        return cls(step=(ClipLogRatio(0.2, 1.8), Scale(0.1)), reduce="sum")

    @classmethod
    def authors_control(cls, k: float, normalize: bool) -> ImportanceWeights:
        """exp(k mean log-ratio), clipped to [0, 1000], as in the authors' control code.

        With ``normalize`` their code divides by the sum over the batch and takes a mean again.
        :class:`SelfNormalize` differs from it by the constant 1/B, which Adam undoes.
        """
        last = (SelfNormalize(),) if normalize else ()
        return cls(step=(Temperature(k),), trajectory=(ClipWeight(0.0, 1000.0), *last))

    @classmethod
    def authors_llm(cls) -> ImportanceWeights:
        """exp(mean log-ratio) clipped to [0, 16], as in the authors' language-model code."""
        return cls(trajectory=(ClipWeight(0.0, 16.0),))


def exponential(log_weight: Tensor) -> Tensor:
    """The weights themselves.

    Raises:
        OverflowError: A weight is beyond float32, or NaN. On an accelerator, where looking would
            cost a wait, this is a device-side assertion.
    """
    weight = log_weight.exp()
    finite = weight.isfinite().all()
    if not on_host(weight):
        torch._assert_async(finite, "importance weights overflow float32 or are NaN")
    elif not bool(finite):
        raise OverflowError(
            f"importance weights overflow float32 or are NaN (log-weights reach "
            f"{float(log_weight.max()):.4g}); use reduce='mean', a lower Temperature or ClipWeight"
        )
    return weight


def log_mean_exp(log_weight: Tensor, share: Tensor) -> Tensor:
    """log(sum m w / sum m), m the shares, in float64; elements of share 0 do not count."""
    log_terms = torch.where(share > 0, log_weight + share.double().log(), -math.inf)
    total = torch.logsumexp(log_terms.reshape(-1), 0) - share.sum(dtype=torch.float64).log()
    return total.to(log_weight.dtype)


def log_ess(log_weight: Tensor, share: Tensor) -> Tensor:
    """log of ESS / sample size = 2 log E[w] - log E[w^2], E over elements by their share."""
    return 2 * log_mean_exp(log_weight, share) - log_mean_exp(2 * log_weight, share)


def _chained(
    transforms: Sequence[Callable[..., Any]], x: Tensor, *share: Tensor, score: Tensor | None = None
) -> tuple[Tensor, Tensor, Choice | None]:
    """Apply transforms in their order; also whether a clip changed the result, and the choice."""
    clipped, choice = torch.zeros_like(x, dtype=torch.bool), None
    for transform in transforms:
        if _declares(transform, "scored"):
            x, choice = transform(x, *share, score)
            continue
        before, x = x, transform(x, *share)
        if _declares(transform, "clips"):
            clipped = clipped | (before != x)
    return x, clipped, choice


def _shifted(log: Tensor, share: Tensor) -> Tensor:
    """Log-weights over the largest that counts, float64: their powers stay finite."""
    top = torch.where(share > 0, log, -math.inf).amax().double()
    return torch.where(share > 0, log.double() - top, 0.0)


def _declares(transform: object, attribute: str) -> bool:
    return bool(getattr(transform, attribute, False))


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
