"""A chain of transforms, from the log-ratios of steps to importance weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, NamedTuple, get_args

import torch
from tensordict import NestedKey
from torch import Tensor

from iwsft.lower_bound import Choice, LowerBound
from iwsft.trajectory import Segments
from iwsft.weights import Place, StepTransform, TrajectoryTransform, check_number

LOG_MAX = math.log(torch.finfo(torch.float32).max)
Reference = Literal["fixed", "synced", "none"]
# Entries of a batch that transforms of the library read, and the function that writes them.
_WRITTEN_BY = {"standard_score": "iwsft.curate", "success_rate": "iwsft.language.weigh_correct"}


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


@dataclass(frozen=True)
class Chain:
    """A chain from per-step log-ratios to log-weights.

    Args:
        step: Transforms g of a step's log-ratio, applied in order; increasing functions.
        reduce: Reduction along the trajectory: ``"sum"`` (Eq. 11), ``"mean"`` (Eq. 11 with
            k / length), or None: each step weighs its own loss (the paper's per-step variant).
        trajectory: Transforms of the log-weight of a trajectory (of a step with ``reduce=None``),
            applied in order.
        reference: What q is divided by. ``"fixed"``: pi_ref, as ``annotate_reference`` wrote it.
            ``"synced"``: the policy at the last sync (:class:`~iwsft.HardSync`). ``"none"``:
            nothing, so the log-ratio of a step is log q, and its weight a function of its
            probability.
        negative: Chain of the steps whose data weight is negative; by default this one. Its weights
            must be bounded.
        kl: Coefficient of a KL divergence from log pi_ref of the data, which the loss adds.

    Raises:
        ValueError: An argument is unknown or out of range, a transform is in the wrong place or
            means nothing with this reference, or ``negative`` is unbounded.
    """

    step: Sequence[StepTransform] = ()
    reduce: Literal["sum", "mean"] | None = "mean"
    trajectory: Sequence[TrajectoryTransform] = ()
    reference: Reference = "fixed"
    negative: Chain | None = None
    kl: float = 0.0

    def __post_init__(self) -> None:
        for name, known in (("reduce", ("sum", "mean", None)), ("reference", get_args(Reference))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {known}, not {getattr(self, name)!r}")
        for here in get_args(Place):
            given = getattr(self, here)
            if not isinstance(given, Sequence):
                raise TypeError(f"{here}={given!r} must be a list: {here}=[{given!r}]")
            for transform in given:
                if not callable(transform) or isinstance(transform, type):
                    raise TypeError(f"{here}=[{transform!r}]: a transform is a function of weights")
                place = getattr(transform, "place", here)
                if place != here:
                    raise ValueError(f"{transform} belongs to {place}=[...]")
        if self.scored and not self.reduce:
            raise ValueError("steps have no scores: set reduce")
        check_number(f"kl={self.kl!r}", self.kl)
        if not 0 <= self.kl < math.inf:
            raise ValueError(f"kl={self.kl} must be finite, at least 0")
        self._check_reference()
        check_chain("negative", self.negative)
        if self.negative is not None:
            if self.negative.reference != self.reference:
                other = replace(self.negative, reference=self.reference)
                object.__setattr__(self, "negative", other)
            if self.negative.compares or self.negative._ends[1] > LOG_MAX:
                raise ValueError(
                    f"negative={self.negative} has no bound, so this loss has none below: clip it, "
                    "as trajectory=[ClipWeight(max=1.0)] does"
                )

    def _check_reference(self) -> None:
        """Refuse what means nothing with this reference."""
        none = self.reference == "none"
        if none and self.reduce == "sum":
            raise ValueError(
                "reference='none' and reduce='sum' weigh by the probability of whole trajectories, "
                "which underflows; use reduce=None or 'mean'"
            )
        for transform in (*self.step, *self.trajectory):
            of = getattr(transform, "of", None)
            if none and of == "ratio":
                raise ValueError(
                    f"{transform} is for q / pi_ref, and reference='none' has no ratio"
                )
            if not none and of == "probability":
                raise ValueError(f"{transform} is for probabilities: it needs reference='none'")

    def check_proposal(self, proposal: str, policy: object) -> None:
        """Refuse a q that does not go with what it is divided by, or gives no entropy."""
        if self.reference == "none" and proposal == "reference":
            raise ValueError("reference='none' has no pi_ref for proposal='reference' (SFT)")
        for name, needs in (
            ("reference='synced'", self.reference == "synced"),
            ("the entropy of q", self.top_k is not None),
        ):
            if needs and proposal != "current":
                raise ValueError(f"{name} needs proposal='current', not {proposal!r}")
        if self.top_k and not hasattr(policy, "log_prob_and_entropy"):
            raise TypeError(f"{type(policy).__name__} gives no entropy, which {self} needs")

    def check_data_weights(
        self, weight: Tensor, name: str, proposal: str, share: Tensor | None = None
    ) -> None:
        """Refuse data weights with which a loss of these importance weights can't be minimised.

        ``share`` says how much each step of a whole dataset counts.

        Raises:
            ValueError: One is NaN or infinite, or one is negative and log p falls without end:
                unless q follows the policy, and its weights are bounded and vanish with it. With a
                chain of their own that does not vanish, their mean must be above 0.
        """
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{name} is NaN or infinite at a step that counts; correct it")
        if not bool((weight < 0).any()):
            return
        low, high = (self.negative or self)._ends
        vanishes = low < -LOG_MAX and high <= LOG_MAX
        if self.negative is None:
            if proposal == "reference" or not vanishes or self.compares:
                raise ValueError(
                    f"{name} is negative, and this loss then has no lower bound: take a proposal "
                    "other than 'reference' and weights that are bounded and can vanish, such as "
                    "trajectory=[ClipWeight(max=1.0)] alone, or drop these steps"
                )
        elif vanishes and proposal == "reference":
            raise ValueError(f"proposal='reference' does not compute {self.negative}: take another")
        elif not vanishes and share is not None and float((share * weight).sum()) <= 0:
            raise ValueError(
                f"{name} has a mean of at most 0, and these weights of negative data do not "
                "vanish: subtract a baseline below the mean score, or take ImportanceWeights.topr()"
            )

    def check_signs(self, data_weight: Tensor | None) -> None:
        """Refuse the data weights of a whole dataset if ``negative`` would change nothing."""
        changes = data_weight is not None and bool((data_weight < 0).any())
        if self.negative is not None and not changes:
            raise ValueError(
                "these importance weights have a chain for negative data weights, and no row has "
                "one: pass trajectories that weigh_correct has weighed, wrong answers included"
            )

    def __repr__(self) -> str:
        # Fields with a default that the first three had not: what is recorded stays comparable.
        later = [f for f in fields(self)[3:] if getattr(self, f.name) != f.default]
        shown = [f"{f.name}={getattr(self, f.name)!r}" for f in (*fields(self)[:3], *later)]
        return f"{type(self).__name__}({', '.join(shown)})"

    @property
    def _transforms(self) -> tuple[Callable[..., Any], ...]:
        own = (*self.step, *self.trajectory)
        return own if self.negative is None else (*own, *self.negative._transforms)

    @property
    def reads(self) -> frozenset[NestedKey]:
        """Names of the further quantities that transforms read."""
        named = (getattr(transform, "reads", None) for transform in self._transforms)
        return frozenset(name for name in named if name is not None)

    @property
    def from_batch(self) -> list[Any]:
        """Those of :attr:`reads` that are entries of the batch."""
        return sorted(self.reads - {"entropy"}, key=str)

    @property
    def scored(self) -> bool:
        """Whether a transform reads the scores of the trajectories."""
        return "standard_score" in self.reads

    @property
    def per_step(self) -> bool:
        """Whether steps of a trajectory may have weights of their own."""
        return None in (self.reduce, (self.negative or self).reduce)

    @property
    def top_k(self) -> int | None:
        """Number of actions of the entropy that a transform reads; None if none does."""
        read = (t for t in self._transforms if getattr(t, "reads", None) == "entropy")
        return next((getattr(transform, "top_k", None) for transform in read), None)

    @property
    def compares(self) -> bool:
        """Whether a transform compares all weights of a batch."""
        return any(_compares(transform) for transform in self._transforms)

    def __call__(
        self,
        log_ratio: Tensor,
        segments: Segments,
        share: Tensor,
        read: Mapping[Any, Tensor] | None = None,
        negative: Tensor | None = None,
    ) -> Weights:
        """Weigh a batch; on masked steps the weights have no meaning.

        Args:
            log_ratio: log q - log pi_ref of each step, in the layout of the batch.
            segments: Trajectories of the batch.
            share: How much each step counts, see :meth:`ImportanceWeightedMLE.share`.
            read: The quantities of :attr:`reads`, in the layout of the batch.
            negative: Steps whose data weight is negative, if there are some.
        """
        read = read or {}
        if self.negative is None or negative is None:
            return self._weigh(log_ratio, segments, share, read)
        # Weights are compared with those of their own sign.
        ours = self._weigh(log_ratio, segments, torch.where(negative, 0.0, share), read)
        others = self.negative._weigh(log_ratio, segments, share, read)
        return Weights(
            torch.where(negative, others.log_weight, ours.log_weight),
            torch.where(negative, others.clipped, ours.clipped),
            ours.choice,
        )

    def _weigh(
        self, log_ratio: Tensor, segments: Segments, share: Tensor, read: Mapping[Any, Tensor]
    ) -> Weights:
        log_ratio, clips, _ = _chained(self.step, log_ratio, read=read)
        if self.reduce is None:
            log_weight, changed, _ = _chained(self.trajectory, log_ratio, share, read=read)
            return Weights(log_weight, _any([*clips, *changed], log_weight))
        along = segments.sum if self.reduce == "sum" else segments.mean
        read = {name: segments.mean(value) for name, value in read.items()}
        x, share = along(log_ratio), segments.sum(share)
        log_weight, changed, choice = _chained(self.trajectory, x, share, read=read)
        log_weight = segments.spread(log_weight)
        clipped = _any([*clips, *map(segments.spread, changed)], log_weight)
        return Weights(log_weight, clipped, choice)

    def judge(self, log_ratio: Tensor, segments: Segments, share: Tensor, score: Tensor) -> Chain:
        """Return the chain whose exponent other trajectories choose, which it does not weigh.

        ``score`` is the standard score of each step's trajectory; the other arguments are those of
        a call.
        """
        (place, transform), *_ = (
            (i, x) for i, x in enumerate(self.trajectory) if isinstance(x, LowerBound)
        )
        before, after = self.trajectory[:place], self.trajectory[place + 1 :]
        log_ratio, *_ = _chained(self.step, log_ratio, read={})
        x = (segments.sum if self.reduce == "sum" else segments.mean)(log_ratio)
        share = segments.sum(share)
        x, *_ = _chained(before, x, share, read={})
        judged = transform.judge(x, share, segments.mean(score))
        return replace(self, trajectory=(*before, judged, *after))

    @property
    def _ends(self) -> tuple[float, float]:
        """Log-weights of a lone step that q leaves, and of one that it prefers without end."""
        # log p of a token is at most 0.
        ends = torch.tensor([-1e30, 0.0 if self.reference == "none" else 1e30])
        one = Segments(ends.shape, torch.arange(2), None, 2)
        read = dict.fromkeys(self.reads, torch.ones(2))
        # A comparison brings a common factor back, so it promises nothing.
        alone = [t for t in self.trajectory if not _compares(t)]
        chain = replace(self, trajectory=alone, negative=None)
        low, high = chain(ends, one, torch.ones(2), read)[0].tolist()
        return low, high

    def anchor(self, log_ratio: Tensor) -> Tensor:
        """kl (r - 1 - log r), log r = log pi_ref - log p: an estimator of KL(p, pi_ref)."""
        return self.kl * (torch.expm1(log_ratio) - log_ratio)

    def check_overflow(self, longest: int) -> None:
        """Refuse a chain whose least weight overflows float32 on a trajectory of ``longest`` steps.

        The literal g of the paper does: 0.1 clip(x, 0.2, 1.8) is at least 0.02 per step, so the
        weight is at least e^(0.02 T), beyond float32 for T > 4,436.
        """
        least = torch.full((longest,), -math.inf)
        segments = Segments(least.shape, torch.zeros(longest, dtype=torch.int64), None, 1)
        one = torch.full((longest,), 1.0 / longest)
        # A comparison would hide the overflow of a lone trajectory, so it is left out.
        alone = replace(self, trajectory=[t for t in self.trajectory if not _compares(t)])
        read = dict.fromkeys(alone.reads, torch.ones(longest))
        floor = float(alone(least, segments, one, read)[0][0])
        if floor > LOG_MAX:
            raise OverflowError(
                f"{self} gives a trajectory of {longest} steps a weight of at least "
                f"exp({floor:.4g}), beyond float32; use reduce='mean' or ClipWeight(max=...)"
            )


def written_by(name: Any) -> str:
    """Say what writes an entry of the batch that a transform reads."""
    return f"{_WRITTEN_BY.get(name, 'your own code')} writes it"


def check_chain(name: str, value: object) -> None:
    """Refuse what is neither a chain nor None, such as a lone transform."""
    if not isinstance(value, Chain | None):
        raise TypeError(f"{name}={value!r} must be a chain: ImportanceWeights(trajectory=[...])")


def _chained(
    transforms: Sequence[Callable[..., Any]], x: Tensor, *share: Tensor, read: Mapping[Any, Tensor]
) -> tuple[Tensor, list[Tensor], Choice | None]:
    """Apply transforms in their order; also what each clip changed, and the choice."""
    clips, choice = [], None
    for transform in transforms:
        name = getattr(transform, "reads", None)
        given = (x, *share, *(() if name is None else (read[name],)))
        # Copies: one that works in place would change what it is compared with, and the batch.
        before, x = x, transform(*(each.clone() for each in given))
        if isinstance(x, tuple):
            x, choice = x
        if not isinstance(x, Tensor) or x.shape != before.shape:
            gave = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            needed = f"a tensor of the shape that it takes, {list(before.shape)}"
            raise ValueError(f"{transform} gave {gave}; it must give {needed}")
        if getattr(transform, "clips", False):
            clips.append(before != x)
    return x, clips, choice


def _any(marks: Sequence[Tensor], like: Tensor) -> Tensor:
    """Where one of some marks is true, bool in the shape of ``like``."""
    marked = torch.zeros_like(like, dtype=torch.bool)
    for mark in marks:
        marked = marked | mark
    return marked


def _compares(transform: Callable[..., Any]) -> bool:
    return bool(getattr(transform, "compares", False))
