"""What the weights do: how far they are from 1, whom they favour, how tight the bound is.

A weight is the importance weight of the loss, after its transforms and without data weights.
Weights and shares have the same shape, whichever it is: the weight of a step (or trajectory), and
how much it counts (the multiplicity of a trajectory, spread evenly over its steps). The effective
sample size is :func:`iwsft.weights.log_ess`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from tensordict import TensorDictBase
from torch import Tensor

from iwsft.objective import ImportanceWeightedMLE, Terms

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def weight_quantiles(
    weight: Tensor, share: Tensor, probabilities: tuple[float, ...] = QUANTILES
) -> Tensor:
    """Quantiles of the weights: the smallest at which the shares add up to p times their total."""
    weight, share = weight.reshape(-1), share.reshape(-1).double()
    ordered, order = weight.sort()
    total = share[order].cumsum(0)
    # Half a rounding error lower, so that a total of exactly p counts as reached.
    wanted = torch.tensor(probabilities, dtype=torch.float64, device=weight.device) * total[-1]
    place = torch.searchsorted(total, wanted * (1 - 1e-12))
    return ordered[place]


def pareto_k(weight: Tensor) -> float:
    """Shape k of a generalised Pareto distribution fitted to the largest weights ``[n]``.

    Below 0.5 the variance of the weights is finite, over 0.7 an importance-sampling estimate is
    not to be trusted (Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance
    sampling", arXiv:1507.02646). The tail is the min(n / 5, 3 sqrt n) largest, without those that
    equal the next lower weight; the fit is that of Zhang and Stephens (2009) with the prior of the
    paper's Appendix C. NaN if the tail has fewer than 5 weights.
    """
    n = weight.numel()
    tail = int(min(0.2 * n, 3 * n**0.5))
    if tail < 5:
        return float("nan")
    largest = weight.detach().reshape(-1).topk(tail + 1).values.double().flip(0)
    cut = largest[0]
    excess = largest[1:] - cut
    # Equal up to the rounding of the float32 weights.
    excess = excess[excess > 1e-6 * cut]
    tail = len(excess)
    if tail < 5:
        return float("nan")
    grid = 30 + int(tail**0.5)
    quartile = excess[int(tail / 4 + 0.5) - 1]
    j = torch.arange(1, grid + 1, dtype=torch.float64, device=weight.device)
    b = (1 - (grid / (j - 0.5)).sqrt()) / (3 * quartile) + 1 / excess[-1]
    k = torch.log1p(-b[:, None] * excess).mean(1)
    likelihood = tail * ((-b / k).log() - k - 1)
    b_hat = (torch.softmax(likelihood, 0) * b).sum()
    k_hat = torch.log1p(-b_hat * excess).mean()
    return float((tail * k_hat + 10 * 0.5) / (tail + 10))


def bound_gap(log_weight_p: Tensor, log_weight_q: Tensor, share: Tensor) -> dict[str, Tensor]:
    """How loose the bound is: Eq. 18's surrogate against the importance-sampled return.

    w_p and w_q are the weights of the policy and of q against pi_ref. The data carry the reward in
    their multiplicities (a curated trajectory has reward m), so the return is J = E[m w_p] and its
    bound S = E[m w_q (1 + log w_p - log w_q)]. J - S >= 0, and it is 0 if q = p. Both weights are
    transformed in the same way, so for reductions other than ``"sum"`` it is the gap of the
    smoothed objective. The results, float64, are over the mean weight of q: 0.1 reads as 10 %.
    """
    m = share.double()
    # What does not count has weight 0, however large it is.
    p, q = (torch.where(m > 0, x.double(), -torch.inf) for x in (log_weight_p, log_weight_q))
    # A common factor keeps exp finite; dividing by the mean weight cancels it.
    top = torch.maximum(p, q).amax()
    w_p, w_q = (p - top).exp(), (q - top).exp()
    # Where q = 0 the summand is 0: x log x goes to 0.
    log_ratio = torch.where(w_q > 0, p - q, 0.0)
    total = (m * w_q).sum()
    value = (m * w_p).sum() / total
    surrogate = (m * w_q * (1 + log_ratio)).sum() / total
    return {
        "importance_sampled_return": value,
        "surrogate": surrogate,
        "bound_gap": value - surrogate,
    }


def weighted_mean(value: Tensor, weight: Tensor, share: Tensor) -> Tensor:
    """Mean of ``value`` under the weights, sum m w v / sum m w, in float64.

    With returns as values it is the return of the data as the loss weighs them.
    """
    factor = share.double() * weight
    return (factor * value).sum() / factor.sum()


def top_share(weight: Tensor, share: Tensor, fraction: float = 0.01) -> Tensor:
    """Share of the total weight that the heaviest trajectories have, float64.

    They are ``fraction`` of the draws, rounded up to a whole number, at least one. With equal
    weights it is their share of the draws.
    """
    ordered, order = weight.double().sort(descending=True)
    count = share.double()[order]
    # The shares of the steps of a trajectory add up to its multiplicity but for rounding.
    heaviest = math.ceil(fraction * float(count.sum()) - 1e-6)
    before = count.cumsum(0) - count
    taken = torch.minimum((max(1, heaviest) - before).clamp(min=0), count)
    return (taken * ordered).sum() / (count * ordered).sum()


def rank_correlation(x: Tensor, y: Tensor, share: Tensor) -> Tensor:
    """Spearman's rank correlation of two quantities of trajectories, float64.

    Equal values share their mean rank. NaN where all values of a quantity are equal, or one is
    NaN.
    """
    # The variance of equal ranks would be a rounding error.
    if any(bool(each.isnan().any() or (each == each[0]).all()) for each in (x, y)):
        return torch.full((), torch.nan, dtype=torch.float64)
    share = share.double()
    a, b = (_ranks(each, share) for each in (x, y))
    a, b = (each - (share * each).sum() / share.sum() for each in (a, b))
    return (share * a * b).sum() / ((share * a * a).sum() * (share * b * b).sum()).sqrt()


def _ranks(x: Tensor, share: Tensor) -> Tensor:
    """Mean rank of each value among values that are counted by their share, up to a constant."""
    _, place = x.unique(return_inverse=True)
    count = torch.zeros_like(share).index_add_(0, place, share)
    return (count.cumsum(0) - count / 2)[place]


class Weighed(NamedTuple):
    """The trajectories of a batch that count, ``[n]``, on the CPU.

    Attributes:
        log_weight: Log-weight; where steps have their own, of their mean weight.
        draws: Multiplicity.
        score: Standard score, see :func:`iwsft.curate`; NaN where the batch has none.
        units: Weights of what has one: the trajectories, or the steps.
        unit_share: How much each of them counts.
    """

    log_weight: Tensor
    draws: Tensor
    length: Tensor
    score: Tensor
    units: Tensor
    unit_share: Tensor


@torch.no_grad()
def weighed(loss: ImportanceWeightedMLE, terms: Terms, score: Tensor | None = None) -> Weighed:
    """The trajectories of ``loss.terms(batch)``.

    ``score`` is the standard score of each step's trajectory, in the layout of the batch.
    """
    segments, share = terms.segments, terms.share.reshape(-1)
    counts = (share > 0).nonzero().squeeze(-1)
    slot, size = segments.index[counts].unique_consecutive(return_counts=True)
    first = counts[size.cumsum(0) - size]
    draws, log_weight = segments.sum(terms.share)[slot], terms.log_weight.reshape(-1)
    if loss.importance_weights.per_step:
        units, unit_share = log_weight[counts].exp(), share[counts]
        of_trajectory = (segments.sum(terms.share * terms.log_weight.exp())[slot] / draws).log()
    else:
        of_trajectory = log_weight[first]
        units, unit_share = of_trajectory.exp(), draws
    unknown = torch.full_like(draws, torch.nan)
    score = unknown if score is None else score.reshape(-1)[first]
    entries = of_trajectory, draws, size, score, units, unit_share
    return Weighed(*(entry.cpu() for entry in entries))


def describe(*batches: Weighed) -> dict[str, float]:
    """What the weights of some batches' trajectories do; what is NaN is left out.

    It has ``weight_top1`` (:func:`top_share` of the heaviest 1 %), ``weight_length_corr`` and
    ``weight_score_corr`` (:func:`rank_correlation` of the weight with length and score, where the
    weights are not all equal), and ``pareto_k`` of the distinct trajectories (with ``reduce=None``,
    steps). It is empty without a batch.
    """
    if not batches:
        return {}
    log_weight, draws, length, score, units, _ = map(torch.cat, zip(*batches, strict=True))
    top = log_weight.amax()
    numbers = {"weight_top1": float(top_share((log_weight - top).exp(), draws))}
    # Equal up to the rounding of float32.
    if float(top - log_weight.amin()) > 1e-6:
        for name, other in (("length", length), ("score", score)):
            corr = rank_correlation(log_weight, other, draws)
            numbers[f"weight_{name}_corr"] = float(corr)
    numbers["pareto_k"] = pareto_k(units)
    return {name: number for name, number in numbers.items() if not math.isnan(number)}


def unweighted_loss(loss: ImportanceWeightedMLE, terms: Terms) -> Tensor:
    """The loss if all importance weights were 1; data weights stay."""
    return loss.value(terms, torch.ones_like(terms.log_prob)).detach().sum()


@torch.no_grad()
def diagnose(
    loss: ImportanceWeightedMLE, batch: TensorDictBase, terms: Terms | None = None
) -> dict[str, float]:
    """Describe the weights of a batch of whole trajectories in more detail than the loss does.

    Args:
        loss: Loss whose policy, q and transforms are used.
        batch: Whole trajectories. The bound needs ``ref_log_prob``, the correlation with the score
            ``standard_score``.
        terms: ``loss.terms(batch)``, if known already.

    Returns:
        ``unweighted_loss``, the numbers of :func:`describe`, ``weight_q05`` to ``weight_q95``
        (quantiles, counted by multiplicity) and, with ``ref_log_prob``, those of :func:`bound_gap`.
        Where the scores choose an exponent, :class:`iwsft.lower_bound.Choice` for the policy now.
    """
    terms = loss.terms(batch) if terms is None else terms
    trajectories = weighed(loss, terms, batch.get(loss.tensor_keys.standard_score, None))
    quantiles = weight_quantiles(trajectories.units, trajectories.unit_share).tolist()
    names = [f"weight_q{round(100 * p):02d}" for p in QUANTILES]
    out = {"unweighted_loss": float(unweighted_loss(loss, terms)), **describe(trajectories)}
    out |= dict(zip(names, quantiles, strict=True))
    if terms.reference is not None:
        of_policy = loss.weigh(
            batch,
            terms.log_prob,
            reference=terms.reference,
            segments=terms.segments,
            share=terms.share,
        )
        gap = bound_gap(of_policy.log_weight, terms.log_weight, terms.share)
        choice = {} if of_policy.choice is None else of_policy.choice._asdict()
        out |= {name: float(x) for name, x in (gap | choice).items()}
    return out
