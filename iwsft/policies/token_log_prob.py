"""log p of given tokens from hidden states, without the logits of all tokens in memory."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from iwsft.policies.linear import matmul, suit_onednn

# Logits at a time. Measured on the CPU, where both products run at full speed from 256 x 1024 on
# and larger blocks only leave the cache; accelerators want more work per launch.
_CPU_BLOCK = (1024, 1024)
_ACCELERATOR_BLOCK = (4096, 16384)


def token_log_prob_and_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    top_k: int = 0,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """log softmax(logits)[target], and the entropy of the likeliest tokens.

    ``logits = scale * (hidden @ weight.T + bias)``, then ``softcap * tanh(logits / softcap)`` where
    there is a cap, computed block by block, and again in backward (one product more than the plain
    way), so that one number per token is stored. Sums, log-probs and intermediate gradients are
    float32, or float64 for float64 inputs; under autocast the products take its dtype.

    Args:
        hidden: States that predict the targets, ``[n, d]``; n may be 0.
        weight: Weight of the output layer, ``[V, d]``.
        target: Target tokens, int64 ``[n]``, in ``[0, V)`` (not checked).
        top_k: Number of tokens of the entropy, 2 to V; 0 for no entropy.
        bias: Bias of the output layer, ``[V]``.
        scale: Factor on the logits.
        softcap: Bound of the capped logits, above 0.

    Returns:
        Both ``[n]``, float32 (float64 for float64 inputs). The first is differentiable once in
        hidden, weight and bias. The entropy is that of the ``top_k`` largest probabilities,
        divided by their sum, over its maximum log ``top_k``; without gradient.
    """
    if top_k and not 2 <= top_k <= len(weight):
        raise ValueError(f"top_k={top_k}: an entropy of 2 to {len(weight)} tokens, the vocabulary")
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    return _TokenLogProb.apply(top_k, hidden, weight, bias, target, scale, softcap, dtype)


class _TokenLogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, top_k: int, *inputs: Any) -> tuple[Tensor, Tensor]:
        blocks = _Blocks(*inputs)
        hidden, weight, bias, target, *ctx.settings = inputs
        chosen = torch.zeros(len(target), dtype=blocks.wide, device=hidden.device)
        # Not -inf: a first block may be -inf throughout, and the difference of the two is NaN.
        most = torch.full_like(chosen, torch.finfo(blocks.wide).min)
        total = torch.zeros_like(chosen)
        top = chosen.new_full((len(target), top_k), -torch.inf)
        fold_ = blocks.fused(_fold_)
        with torch.autocast(hidden.device.type, enabled=False):
            for columns in blocks.columns:
                part = blocks.weight(columns)
                for rows in blocks.rows:
                    logits = blocks.logits(rows, columns, part)
                    if top_k:
                        candidates = torch.cat([top[rows], _largest(logits, top_k)], 1)
                        top[rows] = _largest(candidates, top_k)
                    place = target[rows] - columns.start
                    fold_(logits, place, chosen[rows], most[rows], total[rows])
        # In this order: for a token of probability near 1 the first difference is exact.
        log_total = total.log_()
        log_prob = (chosen - most) - log_total
        ctx.save_for_backward(hidden, weight, bias, target, most + log_total, log_prob)
        entropy = torch.special.entr(top.softmax(1)).sum(1) / math.log(max(top_k, 2))
        ctx.mark_non_differentiable(entropy)
        return log_prob, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, total, log_prob = ctx.saved_tensors
        blocks = _Blocks(hidden, weight, bias, target, *ctx.settings)
        with torch.autocast(hidden.device.type, enabled=False):
            gradients = _gradients(
                blocks, total, log_prob, grads[0].to(blocks.wide), ctx.needs_input_grad[1:3]
            )
        return None, *gradients, None, None, None, None


def _gradients(
    blocks: _Blocks,
    total: Tensor,
    log_prob: Tensor,
    upstream: Tensor,
    needed: tuple[bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients to hidden, weight and bias; None where not needed, or where there is no bias."""
    for_hidden, for_weight = needed
    wide, device = blocks.wide, upstream.device
    # d log p / d logits = onehot - softmax; the factor contains the sign and the scale.
    factor = -blocks.scale * upstream
    to_hidden = torch.zeros(blocks.hidden.shape, dtype=wide, device=device) if for_hidden else None
    to_weight = torch.empty_like(blocks.full_weight) if for_weight else None
    to_bias = torch.empty_like(blocks.bias) if blocks.bias is not None else None
    slopes = blocks.fused(_slopes)
    for columns in blocks.columns:
        part = blocks.weight(columns)
        for_part = torch.zeros(part.shape, dtype=wide, device=device)
        summed = torch.zeros(len(part), dtype=wide, device=device)
        for rows in blocks.rows:
            logits = blocks.logits(rows, columns, part)
            place = blocks.target[rows] - columns.start
            known = total[rows], log_prob[rows], factor[rows]
            grad = slopes(logits, place, *known, blocks.softcap, blocks.dtype)
            if to_bias is not None:
                summed += grad.sum(0, dtype=wide)
            if to_hidden is not None:
                accumulate_(to_hidden[rows], grad, part)
            if to_weight is not None:
                accumulate_(for_part, grad.t(), blocks.hidden[rows])
        if to_weight is not None:
            to_weight[columns] = for_part
        if to_bias is not None:
            to_bias[columns] = summed
    if to_hidden is not None:
        to_hidden = to_hidden.to(blocks.hidden_dtype)
    return to_hidden, to_weight, to_bias


class _Blocks:
    """The logits, a block of tokens by a block of the vocabulary at a time."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        scale: float,
        softcap: float | None,
        dtype: torch.dtype,
    ) -> None:
        # Types of logits and sums, and of the factors of a product.
        self.wide = torch.promote_types(dtype, torch.float32)
        on_cuda = hidden.device.type == "cuda" and torch.version.hip is None
        # Only CUDA multiplies half-precision factors into float32. Elsewhere the factors are
        # rounded in the same way.
        self.dtype = dtype if on_cuda else self.wide
        self.hidden_dtype = hidden.dtype
        self.hidden = hidden.to(dtype).to(self.dtype)
        self.full_weight, self.bias, self.target = weight, bias, target
        self.scale, self.softcap = scale, softcap
        self._factor_dtype = dtype
        tokens, vocabulary = _ACCELERATOR_BLOCK if hidden.device.type != "cpu" else _CPU_BLOCK
        self.rows, self.columns = _slices(len(hidden), tokens), _slices(len(weight), vocabulary)
        # For a small vocabulary the compiler takes longer than it saves.
        large = len(weight) > vocabulary
        self._compiles = on_cuda and large and not torch.compiler.is_compiling()

    def weight(self, columns: slice) -> Tensor:
        """A block of the weight in the dtype of products."""
        return self.full_weight[columns].to(self._factor_dtype).to(self.dtype)

    def logits(self, rows: slice, columns: slice, part: Tensor) -> Tensor:
        """The block, scaled and capped, in ``wide``."""
        logits = product(self.hidden[rows], part.t())
        if self.bias is not None:
            logits += self.bias[columns]
        if self.scale != 1.0:
            logits *= self.scale
        if self.softcap is not None:
            logits.div_(self.softcap).tanh_().mul_(self.softcap)
        return logits

    def fused(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, as one kernel where that is faster."""
        return _compiled(function) if self._compiles else function


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, which its first call compiles for all sizes; as it is without Triton."""
    return torch.compile(function, dynamic=True) if find_spec("triton") else function


def _fold_(logits: Tensor, place: Tensor, chosen: Tensor, most: Tensor, total: Tensor) -> None:
    """Take a block into the target's logit, the largest, and the sum of exp(logit - largest)."""
    position, inside = _locate(place, logits.shape[1])
    here = logits.gather(1, position)
    largest = torch.maximum(most, logits.amax(1))
    new = (logits - largest.unsqueeze(1)).exp_().sum(1)
    chosen += torch.where(inside, here, 0.0).squeeze(1)
    total.mul_((most - largest).exp_()).add_(new)
    most.copy_(largest)


def _slopes(
    logits: Tensor,
    place: Tensor,
    total: Tensor,
    log_prob: Tensor,
    factor: Tensor,
    softcap: float | None,
    dtype: torch.dtype,
) -> Tensor:
    """Gradient to a block of the products, in ``dtype``."""
    position, inside = _locate(place, logits.shape[1])
    grad = (logits - total.unsqueeze(1)).exp_()
    # p - 1 at the target, exact to the last digits where p is near 1.
    at_target = torch.expm1(log_prob).unsqueeze(1)
    if softcap is not None:
        grad *= _cap_slope(logits, softcap)
        at_target *= _cap_slope(logits.gather(1, position), softcap)
    grad = grad.mul_(factor.unsqueeze(1)).to(dtype)
    at_target = (at_target * factor.unsqueeze(1)).to(dtype)
    return grad.scatter_(1, position, torch.where(inside, at_target, grad.gather(1, position)))


def _cap_slope(capped: Tensor, softcap: float) -> Tensor:
    """Derivative of the cap where it gave these logits."""
    return 1 - (capped / softcap).square()


def _locate(place: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Column of each target in a block, ``[rows, 1]``, or 0; and whether it is in it."""
    inside = (place >= 0) & (place < size)
    return torch.where(inside, place, 0).unsqueeze(1), inside.unsqueeze(1)


def _largest(x: Tensor, number: int) -> Tensor:
    """The largest entries of each row, in any order; all of a row that has fewer."""
    number = min(number, x.shape[1])
    if x.device.type == "cpu":
        # A seventh of the time of topk there.
        return torch.from_numpy(np.partition(x.numpy(), -number, axis=1)[:, -number:])
    return x.topk(number, dim=1, sorted=False).values


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32 or wider."""
    if a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32)
    return matmul(a, b)


def accumulate_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, total in float32 or wider."""
    if a.dtype in (torch.bfloat16, torch.float16):
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    elif a.dtype == total.dtype and not suit_onednn(a, b):
        total.addmm_(a, b)
    else:
        total += product(a, b)
