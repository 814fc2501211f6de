"""The linear layer of oneDNN is torch's linear layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from iwsft.policies import linear
from iwsft.policies.linear import Linear, onednn_layers

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="torch was built without oneDNN"
)


@pytest.fixture(autouse=True)
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most processors take torch's products; test oneDNN's there, too."""
    monkeypatch.setattr(linear, "_prefers_onednn", lambda _: True)


def gradients(layer: nn.Linear, x: Tensor, along: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    # In place, as in the policies.
    out = layer(x).relu_()
    return [out.detach(), *torch.autograd.grad(out, (x, *layer.parameters()), along)]


@pytest.mark.parametrize("rows", [0, 1, 5, 1024, 2500])
@pytest.mark.parametrize("sizes", [(17, 256), (256, 6), (1, 1)])
def test_values_and_gradients_are_those_of_float64(rows: int, sizes: tuple[int, int]) -> None:
    torch.manual_seed(rows)
    layer, truth = Linear(*sizes), nn.Linear(*sizes).double()
    truth.load_state_dict(layer.state_dict())
    x, along = torch.randn(rows, sizes[0]), torch.randn(rows, sizes[1])
    # Away from the kink of the ReLU, where rounding would decide.
    near = (truth(x.double()).abs() < 1e-5).any(1)
    x, along = x[~near], along[~near]
    expected = gradients(truth, x.double(), along.double())
    for ours, exact in zip(gradients(layer, x, along), expected, strict=True):
        assert ours.dtype == torch.float32
        scale = max(1.0, float(exact.abs().max())) if exact.numel() else 1.0
        torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("sizes", [(11, 256), (17, 1), (256, 1), (17, 11), (17, 12), (256, 3)])
@pytest.mark.parametrize("here", [False, True])
def test_a_row_has_the_same_bits_in_every_batch(
    sizes: tuple[int, int], here: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So log-probs of a step agree, in whichever batch it is, and first weights are exactly 1."""
    if here:
        # Products of this processor's choice.
        monkeypatch.undo()
    torch.manual_seed(0)
    layer, x = Linear(*sizes), torch.randn(3000, sizes[0])
    whole = layer(x)
    least = torch.arange(16)
    for rows in (least, least + 1, torch.randperm(3000)[:257], slice(5, 2053), slice(2999)):
        assert torch.equal(layer(x[rows]), whole[rows])
    if not here:
        assert torch.equal(layer(x[:2]), whole[:2])


def test_second_derivatives() -> None:
    torch.manual_seed(0)
    layer, twin = Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(4, 3, requires_grad=True)

    def second(of: nn.Linear) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(of(x).tanh().sum(), (x, of.weight), create_graph=True)
        total = sum(g.square().sum() for g in first)
        return torch.autograd.grad(total, (x, *of.parameters()))

    for ours, truth in zip(second(layer), second(twin), strict=True):
        torch.testing.assert_close(ours, truth)


def _mapped(layer: nn.Linear, x: Tensor) -> Any:
    return torch.func.vmap(torch.func.jacrev(layer))(x)


def _traced(layer: nn.Linear, x: Tensor) -> Any:
    return torch.jit.trace(layer, x)(x)


def _forward_mode(layer: nn.Linear, x: Tensor) -> Any:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(layer(forward_ad.make_dual(x, torch.ones_like(x)))).tangent


def _lower_precision(layer: nn.Linear, x: Tensor) -> Any:
    with torch.autocast("cpu"):
        return layer(x)


@pytest.mark.parametrize("way", [_mapped, _traced, _forward_mode, _lower_precision])
def test_what_needs_the_layer_of_torch_gets_it(way: Callable[..., Any]) -> None:
    layer, twin = Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(5, 3)
    ours, truth = way(layer, x), way(twin, x)
    assert torch.equal(ours, truth) and ours.dtype == truth.dtype


def test_other_inputs_and_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, twin = Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(layer.state_dict())
    x = torch.randn(3)
    assert torch.equal(layer(x), twin(x))
    deep = torch.randn(2, 5, 3)
    assert torch.equal(layer(deep), layer(deep.flatten(0, 1)).unflatten(0, (2, 5)))
    with pytest.raises(RuntimeError, match="7x4 and 3x2"):
        layer(torch.randn(7, 4))
    x = torch.randn(7, 3)
    assert layer(x).grad_fn.name() != twin(x).grad_fn.name()
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
    assert layer(x).grad_fn.name() == twin(x).grad_fn.name()
    assert torch.equal(layer(x), twin(x))
    assert Linear(3, 2, bias=False)(x).shape == (7, 2)


@pytest.mark.parametrize(
    ("maker", "capability", "outputs", "onednn"),
    [
        ("AuthenticAMD", "AVX512", 256, True),
        ("AuthenticAMD", "AVX512", 1, True),
        ("AuthenticAMD", "AVX2", 256, False),
        ("AuthenticAMD", "AVX2", 6, True),
        ("AuthenticAMD", "AVX2", 1, True),
        ("GenuineIntel", "AVX512", 256, False),
        ("GenuineIntel", "AVX512", 1, True),
        ("GenuineIntel", "AVX2", 256, False),
        ("GenuineIntel", "AVX2", 6, True),
    ],
)
def test_the_processor_and_the_width_decide(
    maker: str, capability: str, outputs: int, onednn: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(Path, "read_text", lambda _: f"vendor_id : {maker}")
    monkeypatch.setattr(Path, "exists", lambda _: True)
    linear._prefers_onednn.cache_clear()
    layer, x = Linear(3, outputs), torch.randn(7, 3)
    try:
        is_torchs = layer(x).grad_fn.name() == nn.Linear(3, outputs)(x).grad_fn.name()
    finally:
        linear._prefers_onednn.cache_clear()
    assert is_torchs != onednn


def test_elsewhere_all_products_are_those_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_prefers_onednn", lambda _: False)
    layer, model = Linear(3, 2), nn.Sequential(nn.Linear(3, 2))
    x = torch.randn(7, 3)
    assert layer(x).grad_fn.name() == nn.Linear(3, 2)(x).grad_fn.name()
    with onednn_layers(model):
        assert "forward" not in vars(model[0])


def _checkpointed(model: nn.Module) -> nn.Module:
    model.gradient_checkpointing = True
    return model


def _compiled(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


def _own_forward(model: nn.Sequential) -> nn.Module:
    model[0].forward = torch.neg
    return nn.Sequential(model[0])


@pytest.mark.parametrize(
    ("change", "layers"),
    [
        (lambda model: model, 2),
        (lambda model: model.double(), 0),
        (_checkpointed, 0),
        (checkpoint_wrapper, 0),
        (_compiled, 0),
        (torch.compile, 0),
        (_own_forward, 0),
        (lambda model: torch.nn.utils.parametrizations.weight_norm(model[0]), 1),
    ],
)
def test_layers_of_a_model_multiply_with_onednn(
    change: Callable[[nn.Module], nn.Module], layers: int
) -> None:
    model = change(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2, bias=False)))
    before = [dict(vars(module)) for module in model.modules()]
    with onednn_layers(model):
        ours = [getattr(m.forward, "func", None) is Linear.forward for m in model.modules()]
    assert sum(ours) == layers
    assert [vars(module) for module in model.modules()] == before


def test_values_and_gradients_of_a_model_are_those_of_float64() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False))
    x, along = torch.randn(2, 5, 3), torch.randn(2, 5, 2)
    with onednn_layers(model):
        ours = torch.autograd.grad(model(x), [*model.parameters()], along)
    truth = torch.autograd.grad(model.double()(x.double()), [*model.parameters()], along.double())
    for a, b in zip(ours, truth, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=1e-6)
