"""How far the weights are from 1, and how tight the bound is.

Weights and shares have the same shape, whichever it is: the weight of a step (or trajectory), and
how much it counts (the multiplicity of a trajectory, spread evenly over its steps). The effective
sample size is :func:`iwsft.weights.log_ess`.
"""

from __future__ import annotations

import math

import torch
from tensordict import TensorDictBase
from torch import Tensor

from iwsft.objective import ImportanceWeightedMLE, Terms

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def weight_quantiles(
    weight: Tensor, share: Tensor, probabilities: tuple[float, ...] = QUANTILES
) -> Tensor:
    """Quantiles of the weights, each counted by its share.

    The p-quantile is the smallest weight at which the shares add up to p times their total.

    Returns:
        One number per probability, in the dtype of ``weight``.
    """
    weight, share = weight.reshape(-1), share.reshape(-1).double()
    ordered, order = weight.sort()
    total = share[order].cumsum(0)
    # Half a rounding error lower, so that a total of exactly p counts as reached.
    wanted = torch.tensor(probabilities, dtype=torch.float64, device=weight.device) * total[-1]
    place = torch.searchsorted(total, wanted * (1 - 1e-12))
    return ordered[place]


def pareto_k(weight: Tensor) -> float:
    """Shape k of a generalised Pareto distribution fitted to the largest weights.

    Below 0.5 the variance of the weights is finite, over 0.7 an importance-sampling estimate is
    not to be trusted (Vehtari, Simpson, Gelman, Yao and Gabry, "Pareto smoothed importance
    sampling", arXiv:1507.02646). The tail is the min(n / 5, 3 sqrt n) largest, without those that
    equal the next lower weight; the fit is that of Zhang and Stephens (2009) with the prior of the
    paper's Appendix C.

    Args:
        weight: Weights of the distinct trajectories, ``[n]``.

    Returns:
        k-hat. NaN if the tail has fewer than 5 weights.
    """
    ordered = weight.detach().double().reshape(-1).sort().values
    n = len(ordered)
    tail = int(min(0.2 * n, 3 * n**0.5))
    if tail < 5:
        return float("nan")
    cut = ordered[-tail - 1]
    excess = ordered[-tail:] - cut
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
    smoothed objective, and with self-normalised weights the KL divergence of q's weighting from the
    policy's.

    Returns:
        Float64 scalars ``importance_sampled_return``, ``surrogate`` and ``bound_gap``, each over
        the mean weight of q, so that 0.1 reads as 10 %.
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

    With returns as values it is the return of the data as the loss weighs them. It shows how far
    the weights sharpen what curation has chosen.
    """
    factor = share.double() * weight
    return (factor * value).sum() / factor.sum()


@torch.no_grad()
def diagnose(
    loss: ImportanceWeightedMLE, batch: TensorDictBase, terms: Terms | None = None
) -> dict[str, float]:
    """Describe the weights of a batch of whole trajectories in more detail than the loss does.

    Args:
        loss: Loss whose policy, q and transforms are used.
        batch: Whole trajectories. The bound needs ``ref_log_prob``.
        terms: ``loss.terms(batch)``, if known already.

    Returns:
        ``weight_q05`` to ``weight_q95`` (quantiles, counted by multiplicity), ``pareto_k`` over the
        distinct trajectories (left out if it is NaN), and, with ``ref_log_prob``,
        ``importance_sampled_return``, ``surrogate`` and ``bound_gap``. Where the scores choose an
        exponent, what they choose for the policy as it is (:class:`iwsft.lower_bound.Choice`): a
        sync at this moment takes it.
    """
    terms = loss.terms(batch) if terms is None else terms
    weight = terms.log_weight.exp()
    names = [f"weight_q{round(100 * p):02d}" for p in QUANTILES]
    out = dict(zip(names, weight_quantiles(weight, terms.share).tolist(), strict=True))
    segments = terms.segments
    if loss.importance_weights.reduce is None:
        distinct = weight[terms.share > 0]
    else:
        distinct = segments.mean(weight)[segments.sum(terms.share) > 0]
    k = pareto_k(distinct)
    if not math.isnan(k):
        out["pareto_k"] = k
    if terms.reference is not None:
        of_policy = loss.weigh(
            batch, terms.log_prob, reference=terms.reference, segments=segments, share=terms.share
        )
        gap = bound_gap(of_policy.log_weight, terms.log_weight, terms.share)
        choice = {} if of_policy.choice is None else of_policy.choice._asdict()
        out |= {name: float(x) for name, x in (gap | choice).items()}
    return out
