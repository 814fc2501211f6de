"""Losses of the papers that reweight SFT, as they print them, on log p of the data.

Each takes log p ``[T]`` of the steps of one trajectory, with its gradient, and gives the loss of
each step ``[T]``, or of the trajectory divided by T. Gradients pass where the paper lets them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def dft(log_p: Tensor) -> Tensor:
    """arXiv 2508.05629, Eq. 9: -sg(p) log p."""
    return -log_p.exp().detach() * log_p


def power(log_p: Tensor, k: float) -> Tensor:
    """arXiv 2510.00526: (1 - p^k) / k."""
    return (1 - log_p.exp() ** k) / k


def chord_phi(log_p: Tensor) -> Tensor:
    """arXiv 2508.11408: -sg(p (1 - p)) log p."""
    p = log_p.exp().detach()
    return -p * (1 - p) * log_p


def psft(log_p: Tensor, old: Tensor, epsilon: float) -> Tensor:
    """arXiv 2508.17784: -min(r, clip(r, 1 - epsilon, 1 + epsilon)), r = p / p_old."""
    ratio = (log_p - old).exp()
    return -torch.minimum(ratio, ratio.clamp(1 - epsilon, 1 + epsilon))


def minor_sft(log_p: Tensor, reference: Tensor, beta: float) -> Tensor:
    """arXiv 2408.10642: the gradient of -log p times 2 sigmoid(-beta log(p / pi_ref)) / length."""
    return -2 * logsigmoid(beta * (log_p - reference).sum()) / beta / len(log_p)


def eaft(logits: Tensor, target: Tensor, alpha: float, top_k: int) -> Tensor:
    """arXiv 2601.02151: -sg(H / log K)^alpha log p, on all logits ``[T, V]``.

    H is the entropy of the K largest probabilities, normalised to sum to 1.
    """
    p = logits.softmax(1).topk(top_k).values.detach()
    p = p / p.sum(1, keepdim=True)
    entropy = -(p * p.log()).sum(1) / math.log(top_k)
    log_p = logits.log_softmax(1).gather(1, target[:, None]).squeeze(1)
    return -(entropy**alpha) * log_p


def asft(log_p: Tensor, reference: Tensor, alpha: float) -> Tensor:
    """arXiv 2509.23753: DFT + alpha KL, estimated from the tokens of the data as NeMo-RL does."""
    ratio = (reference - log_p).exp()
    return dft(log_p) + alpha * (ratio - 1 - ratio.log())


def topr(log_p: Tensor, behaviour: Tensor, reward: float) -> Tensor:
    """arXiv 2503.14286: -R sg(rho) log p of the answer; rho = 1, if R < 0 clip(p / mu, 0, 1)."""
    ratio = (log_p - behaviour).sum().exp().clamp(0, 1).detach() if reward < 0 else 1.0
    return -reward * ratio * log_p.sum()


def asymre(log_p: Tensor, reward: float, baseline: float) -> Tensor:
    """arXiv 2506.20520: -(R - V) log p of the whole answer."""
    return -(reward - baseline) * log_p.sum()


def nft(log_p: Tensor, old: Tensor, right: bool, success: float, epsilon: float) -> Tensor:
    """arXiv 2505.18116, Eq. 10: -log r, or -log max_v((1 - c r) / (1 - c), epsilon) if wrong.

    max_v has the value of the maximum, and the gradient of its first argument.
    """
    ratio = (log_p - old).exp()
    if right:
        return -ratio.log()
    wrong = (1 - success * ratio) / (1 - success)
    return -(wrong + (wrong.clamp(min=epsilon) - wrong).detach()).log()
