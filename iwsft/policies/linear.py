"""A linear layer that takes oneDNN's matrix products on a CPU.

Torch multiplies float32 matrices on a CPU with MKL, which leaves AVX-512 unused on AMD processors.
oneDNN uses it and is twice as fast there. Its rows also have the same bits in batches of any size
from 2 rows on, while MKL's last bits depend on the size and the alignment of a batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F


class Linear(nn.Linear):
    """``torch.nn.Linear`` whose product is :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias``."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias``, as ``torch.nn.functional.linear`` up to float32's rounding.

    Inputs that are not ``[N, in_features]``, other devices and dtypes, compilers, tracers and
    function transforms get torch's own function, as does everything after
    ``torch.backends.mkldnn.enabled = False``.
    """
    # Others would give a view, which can't be changed in place, or need torch's error.
    fits = x.ndim == 2 and x.shape[1] == weight.shape[-1]
    if bias is None or not (fits and suit_onednn(x, weight)):
        return F.linear(x, weight, bias)
    multiply = _Product.apply if torch.is_grad_enabled() else _multiply
    return multiply(x, weight, bias)


def suit_onednn(*tensors: Tensor) -> bool:
    """Return whether oneDNN may multiply these tensors: in float32, on the host, step by step."""
    return _is_eager() and all(
        tensor.dtype is torch.float32
        and tensor.device.type == "cpu"
        and tensor.layout is torch.strided
        and tensor.numel() > 0
        for tensor in tensors
    )


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        # A second derivative needs operations that have one.
        multiply = F.linear if torch.is_grad_enabled() else _multiply
        of_x, of_weight, of_bias = ctx.needs_input_grad
        along_x = multiply(gradient, weight.t()) if of_x else None
        along_weight = None
        if of_weight and x.shape[1] < gradient.shape[1]:
            # oneDNN copies the first matrix where it is transposed: here the narrower one.
            along_weight = multiply(x.t(), gradient.t()).t()
        elif of_weight:
            along_weight = multiply(gradient.t(), x.t())
        return along_x, along_weight, gradient.sum(0) if of_bias else None


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias`` by oneDNN, without a derivative."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product


def _is_eager() -> bool:
    """Whether operations run one by one as they are, and torch may use oneDNN."""
    if torch.compiler.is_compiling():
        return False
    return (
        torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and not torch._C._is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
    )
