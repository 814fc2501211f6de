"""Importance weights: small transforms, chained from per-step log-ratios to one weight each.

With rho_i = log q(a_i|s_i) - log pi_ref(a_i|s_i) the weight of a trajectory is
w = exp(sum_i g(rho_i)) (paper, Eq. 11). A chain (:class:`~iwsft.chain.Chain`) has three places: on
the step (g), the reduction along the trajectory, on the trajectory. Everything stays in log space
until the one exponential at the end (:func:`exponential`).

A transform is a callable, :data:`StepTransform` or :data:`TrajectoryTransform`. It declares what it
is by class attributes, all of them optional:

- ``place``: ``"step"`` or ``"trajectory"``; a chain refuses it in the other place.
- ``clips``: if its output differs from its input, the weight counts as clipped.
- ``compares``: it compares all weights of a batch, so it needs the whole batch at once.
- ``of``: ``"ratio"`` if it means something for q / pi_ref alone, ``"probability"`` if for q alone.
- ``reads``: a further quantity that it takes as its last argument: ``"entropy"`` of q, an entry of
  the batch such as ``"success_rate"``, or ``"standard_score"`` (such a transform returns a
  :class:`~iwsft.lower_bound.Choice` as well).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from iwsft.trajectory import on_host

_MIN_ALPHA = 1e-6
Place = Literal["step", "trajectory"]
Quantity = Literal["ratio", "probability"]
StepTransform = Callable[..., Tensor]
# Log-weights and how much each counts -> log-weights.
TrajectoryTransform = Callable[..., Any]


class _Transform:
    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_number(f"{type(self).__name__}({name}={value!r})", value)
        self._check()

    def _check(self) -> None:
        """Check the values of numbers."""


class _OfStep(_Transform):
    place: ClassVar[Place] = "step"


class _OfTrajectory(_Transform):
    place: ClassVar[Place] = "trajectory"


@dataclass(frozen=True)
class Temperature(_OfStep):
    """Step: g(x) = k x (paper, Section 3.4). k = 0 turns the weights off, a large k sharpens."""

    k: float

    def _check(self) -> None:
        _require(0 <= self.k < math.inf, f"Temperature(k={self.k}): k must be finite, at least 0")

    def __call__(self, log_ratio: Tensor) -> Tensor:
        return self.k * log_ratio


@dataclass(frozen=True)
class Scale(_OfStep):
    """Step: g(x) = c x, the constant before a clip in the paper's g(x) = 0.1 clip(x, 0.2, 1.8)."""

    c: float

    def _check(self) -> None:
        _require(0 < self.c < math.inf, f"Scale(c={self.c}): c must be positive and finite")

    def __call__(self, log_ratio: Tensor) -> Tensor:
        return self.c * log_ratio


@dataclass(frozen=True)
class ClipLogRatio(_OfStep):
    """Step: clip the log-ratio to [min, max] (paper, Appendix C)."""

    clips: ClassVar[bool] = True
    of: ClassVar[Quantity] = "ratio"

    min: float = -math.inf
    max: float = math.inf

    def _check(self) -> None:
        inside = self.min <= self.max and self.min < math.inf and self.max > -math.inf
        _require(inside, f"ClipLogRatio: [{self.min}, {self.max}] holds no finite log-ratio")

    def __call__(self, log_ratio: Tensor) -> Tensor:
        return log_ratio.clamp(self.min, self.max)


@dataclass(frozen=True)
class _Range:
    clips: ClassVar[bool] = True

    min: float = 0.0
    max: float = math.inf

    def _check(self) -> None:
        inside = 0 <= self.min <= self.max and self.min < math.inf and self.max > 0
        name = type(self).__name__
        _require(inside, f"{name}: [{self.min}, {self.max}] holds no positive, finite number")

    def _clip(self, log: Tensor) -> Tensor:
        low, high = (math.log(x) if x > 0 else -math.inf for x in (self.min, self.max))
        return log.clamp(low, high)


@dataclass(frozen=True)
class ClipRatio(_Range, _OfStep):
    """Step: clip the ratio q/pi_ref itself to [min, max] (paper, Section 3.4)."""

    of: ClassVar[Quantity] = "ratio"

    def __call__(self, log_ratio: Tensor) -> Tensor:
        return self._clip(log_ratio)


@dataclass(frozen=True)
class MaskRatio(_Range, _OfStep):
    """Step: weight 0 where the ratio is outside [min, max], as the gradient of PPO's clip has."""

    of: ClassVar[Quantity] = "ratio"

    def __call__(self, log_ratio: Tensor) -> Tensor:
        return torch.where(self._clip(log_ratio) == log_ratio, log_ratio, -math.inf)


@dataclass(frozen=True)
class Uncertainty(_OfStep):
    """Step: p(1 - p), where q gives the action the probability p; not for densities."""

    of: ClassVar[Quantity] = "probability"

    def __call__(self, log_prob: Tensor) -> Tensor:
        return log_prob + torch.log(-torch.expm1(log_prob))


@dataclass(frozen=True)
class EntropyGate(_OfStep):
    """Step: H^alpha, H the entropy of q's ``top_k`` likeliest actions over its maximum log top_k.

    It takes the place of the log-ratio, which it does not read.
    """

    reads: ClassVar[str] = "entropy"

    alpha: float = 1.0
    top_k: int = 20

    def _check(self) -> None:
        inside = 0 < self.alpha < math.inf
        _require(inside, f"EntropyGate(alpha={self.alpha}) must be positive and finite")
        whole = self.top_k >= 2 and self.top_k % 1 == 0
        _require(whole, f"EntropyGate(top_k={self.top_k}) must be a whole number from 2 on")

    def __call__(self, log_ratio: Tensor, entropy: Tensor) -> Tensor:
        return self.alpha * entropy.log().to(log_ratio.dtype)


@dataclass(frozen=True)
class RefuteRatio(_OfStep):
    """Step: c r / max(1 - c r, epsilon (1 - c)), r the ratio, c the success rate of the prompt.

    It is what the gradient of -log max((1 - c r) / (1 - c), epsilon), the likelihood of a wrong
    answer, gives log q (arXiv 2505.18116). c is clipped to [0.02, 0.98], as in its authors' code.
    """

    of: ClassVar[Quantity] = "ratio"
    reads: ClassVar[str] = "success_rate"

    epsilon: float

    def _check(self) -> None:
        inside = 0 < self.epsilon <= 1
        _require(inside, f"RefuteRatio(epsilon={self.epsilon}) must be in (0, 1]")

    def __call__(self, log_ratio: Tensor, success_rate: Tensor) -> Tensor:
        c = success_rate.clamp(0.02, 0.98).to(log_ratio.dtype)
        rest = torch.maximum(1 - c * log_ratio.exp(), self.epsilon * (1 - c))
        return c.log() + log_ratio - rest.log()


@dataclass(frozen=True)
class TemperWeight(_OfTrajectory):
    """Trajectory: w <- w^alpha."""

    alpha: float

    def _check(self) -> None:
        inside = 0 <= self.alpha < math.inf
        _require(inside, f"TemperWeight(alpha={self.alpha}) must be finite, at least 0")

    def __call__(self, log_weight: Tensor, share: Tensor) -> Tensor:
        return self.alpha * log_weight


@dataclass(frozen=True)
class Sigmoid(_OfTrajectory):
    """Trajectory: w <- 2 / (1 + w^beta): 1 at first, less where q prefers the trajectory."""

    of: ClassVar[Quantity] = "ratio"

    beta: float

    def _check(self) -> None:
        _require(0 < self.beta < math.inf, f"Sigmoid(beta={self.beta}) must be positive and finite")

    def __call__(self, log_weight: Tensor, share: Tensor) -> Tensor:
        return math.log(2.0) + torch.nn.functional.logsigmoid(-self.beta * log_weight)


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
    in log alpha to a relative 1e-6, up to ``max_alpha``, so that rounding errors of nearly equal
    weights are not amplified. The mean weight is 1, so equal weights, and a lone one, become 1.

    Args:
        fraction: Effective sample size over sample size, in (0, 1].
        max_alpha: Largest exponent.
    """

    compares: ClassVar[bool] = True

    fraction: float
    max_alpha: float = 1000.0

    def _check(self) -> None:
        _require(0 < self.fraction <= 1, f"TargetESS(fraction={self.fraction}) must be in (0, 1]")
        inside = 0 < self.max_alpha < math.inf
        _require(inside, f"TargetESS(max_alpha={self.max_alpha}) must be positive and finite")

    def __call__(self, log_weight: Tensor, share: Tensor) -> Tensor:
        tempered = self.exponent(log_weight, share) * _shifted(log_weight, share)
        return (tempered - log_mean_exp(tempered, share.double())).to(log_weight.dtype)

    def exponent(self, log_weight: Tensor, share: Tensor) -> Tensor:
        """alpha, a float64 scalar."""
        shifted, share = _shifted(log_weight, share), share.double()
        low = torch.full((), math.log(_MIN_ALPHA), dtype=torch.float64, device=share.device)
        high = torch.full((), math.log(self.max_alpha), dtype=torch.float64, device=share.device)
        for _ in range(25):
            middle = (low + high) / 2
            enough = log_ess(middle.exp() * shifted, share) > math.log(self.fraction)
            low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
        return high.exp()


def exponential(log_weight: Tensor) -> Tensor:
    """The weights themselves.

    Raises:
        OverflowError: A weight is beyond float32.
        FloatingPointError: A weight is NaN, as where an observation is. On an accelerator, where
            looking would cost a wait, both are a device-side assertion. Within ``torch.vmap``,
            which has neither, the weights, and then the loss, are infinite or NaN.
    """
    weight = log_weight.exp()
    if torch._C._are_functorch_transforms_active():
        return weight
    # NaN where one is NaN.
    finite = weight.amax() < math.inf
    if not on_host(weight):
        torch._assert_async(finite, "importance weights overflow float32 or are NaN")
    elif not bool(finite):
        if len(wrong := weight.isnan().nonzero()):
            problem = f"importance weights are NaN, first at {wrong[0].tolist()}"
            data = "look for NaN in the data (iwsft.validation.validate)"
            raise FloatingPointError(f"{problem}: {data}, and for a batch with all weights 0")
        raise OverflowError(
            f"importance weights overflow float32 (log-weights reach "
            f"{float(log_weight.max()):.4g}); use reduce='mean', a lower Temperature or ClipWeight"
        )
    return weight


def log_mean_exp(log_weight: Tensor, share: Tensor) -> Tensor:
    """log(sum m w / sum m), m the shares, in float64; elements of share 0 do not count."""
    top = torch.where(share > 0, log_weight, -math.inf).amax()
    share = torch.where(share > 0, share.double(), 0.0)
    # Equal weights make the same sum twice, so their mean is exact.
    mean = (share * _shifted(log_weight, share).exp()).sum() / share.sum()
    return (top.double() + mean.log()).to(log_weight.dtype)


def log_ess(log_weight: Tensor, share: Tensor) -> Tensor:
    """log of ESS / sample size = 2 log E[w] - log E[w^2], E over elements by their share."""
    return 2 * log_mean_exp(log_weight, share) - log_mean_exp(2 * log_weight, share)


def _shifted(log: Tensor, share: Tensor) -> Tensor:
    """Log-weights over the largest that counts, float64: their powers stay finite."""
    top = torch.where(share > 0, log, -math.inf).amax().double()
    return torch.where(share > 0, log.double() - top, 0.0)


def check_number(name: str, value: object) -> None:
    """Refuse an argument that is not a number, such as a text."""
    if not isinstance(value, Real | Tensor):
        raise TypeError(f"{name} must be a number")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
