"""Linear layers that take oneDNN's matrix products where MKL's are slow or inexact.

Torch multiplies float32 matrices on a CPU with MKL, which leaves AVX-512 unused on AMD processors.
oneDNN uses it and is twice as fast there. On Intel's processors, and on AMD's without AVX-512, MKL
is as fast or faster, and a call of it costs less.

Log-probs of a step must not depend on its batch, so that first weights are exactly 1. oneDNN's rows
have the same bits in batches of any size from 2 rows on. MKL's have them from 16 rows on, but not
in all narrow layers, which take oneDNN's products on every processor.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torchrl.modules import MLP

# Attributes of modules with activation checkpointing (transformers, torch) or a compiled call.
_RUN_OUTSIDE = (
    "gradient_checkpointing",
    "_checkpoint_wrapped_module",
    "_compiled_call_impl",
    "_orig_mod",
)


class Linear(nn.Linear):
    """``torch.nn.Linear`` whose product is :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return ``input @ weight.T + bias``."""
        return linear(input, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return ``x @ weight.T + bias``, as ``torch.nn.functional.linear`` up to float32's rounding.

    Vectors, other devices and dtypes, compilers, tracers and function transforms get torch's own
    function, as does everything after ``torch.backends.mkldnn.enabled = False``.
    """
    # Sizes that do not fit get torch's error.
    fits = x.ndim >= 2 and x.shape[-1] == weight.shape[-1]
    if not fits or not suit_onednn(x, weight, narrow=_is_narrow(*weight.shape)):
        return F.linear(x, weight, bias)
    multiply = _Product.apply if torch.is_grad_enabled() else _multiply
    rows = x if x.ndim == 2 else x.reshape(-1, x.shape[-1])
    product: Tensor = multiply(rows, weight, bias)
    return product if x.ndim == 2 else product.reshape(*x.shape[:-1], -1)


def mlp(inputs: int, outputs: int, hidden: Sequence[int], layer: type[nn.Linear] = Linear) -> MLP:
    """Return linear layers with ReLU between them."""
    return MLP(
        in_features=inputs,
        out_features=outputs,
        num_cells=list(hidden),
        layer_class=layer,
        activation_class=nn.ReLU,
        # Half the activation memory, and a sixth of the time of a step on long batches.
        activation_kwargs={"inplace": True},
    )


@contextmanager
def onednn_layers(model: nn.Module) -> Iterator[None]:
    """Within, the linear layers of a model, float32 on a CPU, multiply with :func:`linear`.

    Torch multiplies sharded and quantized weights, and all layers where a backward pass may run
    them again, which happens outside of this (activation checkpointing), or a compiler has them.
    """
    first = next(model.parameters(), None)
    modules = list(model.modules()) if first is not None and suit_onednn(first) else []
    if any(getattr(module, name, None) for module in modules for name in _RUN_OUTSIDE):
        modules = []
    plain = [
        m for m in modules if type(m).forward is nn.Linear.forward and "forward" not in vars(m)
    ]
    layers = [layer for layer in plain if not _is_sharded(layer.weight)]
    with replaced_forward(layers, Linear.forward):
        yield


@contextmanager
def replaced_forward(layers: Sequence[nn.Module], forward: Callable[..., Tensor]) -> Iterator[None]:
    """Within, ``forward`` is that of the layers; it gets the layer and its input."""
    for layer in layers:
        # On the instance, so that hooks around a call stay.
        layer.forward = partial(forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _is_sharded(weight: Any) -> bool:
    """Whether a weight is a part, or a view at any address, on which oneDNN's bits depend."""
    return is_traceable_wrapper_subclass(weight) or hasattr(weight, "ds_id")


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a @ b`` of two matrices, by oneDNN where it may, without a derivative."""
    return _multiply(a, b.t()) if suit_onednn(a, b) else torch.mm(a, b)


def suit_onednn(*tensors: Tensor, narrow: bool = False) -> bool:
    """Return whether oneDNN should multiply these tensors: in float32, on the host, step by step.

    ``narrow`` says that bits of MKL's product may depend on the batch.
    """
    if torch.compiler.is_compiling() or not _prefers_onednn(narrow) or not _is_eager():
        return False
    return all(
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
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _is_narrow(outputs: int, inputs: int) -> bool:
    """Whether bits of MKL's rows depend on the batch, as measured.

    They do with one output on Zen 3 and on Intel, and with fewer than 12 on Zen 3.
    """
    return outputs == 1 or (outputs < 12 and inputs % 4 != 0)


@cache
def _prefers_onednn(narrow: bool) -> bool:
    """Whether oneDNN is faster than MKL on this processor, or more exact for ``narrow`` layers."""
    listed = Path("/proc/cpuinfo")
    name = listed.read_text() if listed.exists() else platform.processor()
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    return narrow or (has_avx512 and "GenuineIntel" not in name)


def _is_eager() -> bool:
    """Whether operations run one by one as they are, and torch may use oneDNN."""
    return (
        torch.backends.mkldnn.is_available()
        and bool(torch.backends.mkldnn.enabled)
        and not torch._C._is_tracing()
        and not torch._C._are_functorch_transforms_active()
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
    )
