"""log p of tokens block by block against the full logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from iwsft.policies import token_log_prob as module
from iwsft.policies.token_log_prob import token_log_prob_and_entropy

TRANSFORMS: list[dict[str, Any]] = [{}, {"scale": 0.3}, {"softcap": 0.9, "scale": 2.0}]


@pytest.fixture(params=[(4, 5), (3, 64), (64, 7), (64, 64)], ids=str)
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Blocks that cut tokens and vocabulary in all ways, remainders included."""
    monkeypatch.setattr(module, "_CPU_BLOCK", request.param)
    yield


def naive(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1)


def inputs(
    n: int = 10, d: int = 6, v: int = 23, *, dtype: torch.dtype = torch.float64, size: float = 1.0
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(n * v + d)
    hidden = size * torch.randn(n, d, generator=draw, dtype=torch.float64)
    weight = torch.randn(v, d, generator=draw, dtype=torch.float64)
    bias = torch.randn(v, generator=draw, dtype=torch.float64)
    target = torch.randint(v, (n,), generator=draw)
    made = (x.to(dtype).requires_grad_() for x in (hidden, weight, bias))
    return (*made, target)  # type: ignore[return-value]


def log_probs(*inputs: Any, **settings: Any) -> Tensor:
    return token_log_prob_and_entropy(*inputs, **settings)[0]


def gradients(out: Tensor, upstream: Tensor, to: list[Tensor]) -> list[Tensor]:
    return list(torch.autograd.grad(out, to, upstream.to(out.dtype)))


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
def test_values_and_gradients_are_those_of_full_logits(
    block: None, transform: dict[str, Any]
) -> None:
    hidden, weight, bias, target = inputs()
    upstream = torch.randn(len(target), dtype=torch.float64)
    ours = log_probs(hidden, weight, target, bias=bias, **transform)
    truth = naive(hidden, weight, target, bias=bias, **transform)
    torch.testing.assert_close(ours, truth, rtol=1e-13, atol=1e-13)
    to = [hidden, weight, bias]
    for mine, true in zip(
        gradients(ours, upstream, to), gradients(truth, upstream, to), strict=True
    ):
        torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("top_k", [2, 7, 23])
def test_entropy_of_the_likeliest_is_that_of_full_logits(
    block: None, transform: dict[str, Any], top_k: int
) -> None:
    hidden, weight, bias, target = inputs()
    inner = {"bias": bias, **transform}
    log_prob, entropy = token_log_prob_and_entropy(hidden, weight, target, top_k=top_k, **inner)
    logits = torch.stack(
        [naive(hidden, weight, torch.full_like(target, v), **inner) for v in range(len(weight))], 1
    )
    top = logits.topk(top_k).values.softmax(1)
    truth = -(top * top.log()).sum(1) / torch.tensor(top_k).double().log()
    torch.testing.assert_close(entropy, truth.detach(), rtol=1e-12, atol=1e-12)
    assert torch.equal(log_prob, log_probs(hidden, weight, target, **inner))
    assert not entropy.requires_grad and float(entropy.max()) <= 1


def test_tokens_that_are_ruled_out_fill_blocks(block: None) -> None:
    """Logits of -inf: the first blocks of the vocabulary, or all but the last token."""
    hidden, weight, bias, target = inputs()
    upstream = torch.ones(len(target), dtype=torch.float64)
    for first in (7, 22):
        out = bias.detach().masked_fill(torch.arange(23) < first, -torch.inf).requires_grad_()
        inside = target.clamp(min=first)
        ours = log_probs(hidden, weight, inside, bias=out)
        truth = naive(hidden, weight, inside, bias=out)
        torch.testing.assert_close(ours, truth, rtol=1e-13, atol=1e-13)
        to = [hidden, weight, out]
        for mine, true in zip(
            gradients(ours, upstream, to), gradients(truth, upstream, to), strict=True
        ):
            torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)
    assert bool((log_probs(hidden, weight, target * 0, bias=out) == -torch.inf).all())


@pytest.mark.parametrize("top_k", [1, 24, -1])
def test_an_entropy_of_more_tokens_than_there_are_is_refused(top_k: int) -> None:
    hidden, weight, _, target = inputs()
    with pytest.raises(ValueError, match=f"top_k={top_k}: an entropy of 2 to 23 tokens"):
        token_log_prob_and_entropy(hidden, weight, target, top_k=top_k)


@pytest.mark.parametrize(("n", "d", "v"), [(0, 4, 9), (1, 1, 1), (1, 5, 2), (7, 1, 30), (33, 8, 6)])
def test_all_shapes(block: None, n: int, d: int, v: int) -> None:
    hidden, weight, _, target = inputs(n, d, v)
    ours = log_probs(hidden, weight, target)
    assert ours.shape == (n,)
    torch.testing.assert_close(ours, naive(hidden, weight, target), rtol=1e-12, atol=1e-12)
    mine = gradients(ours, torch.ones(n), [hidden, weight])
    true = gradients(naive(hidden, weight, target), torch.ones(n), [hidden, weight])
    torch.testing.assert_close(mine, true, rtol=1e-12, atol=1e-12)


def test_float32_gradients_agree_at_a_real_vocabulary() -> None:
    hidden, weight, _, target = inputs(64, 32, 20_000, dtype=torch.float32)
    upstream = torch.rand(64) * 100
    ours, truth = log_probs(hidden, weight, target), naive(hidden, weight, target)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, truth, rtol=1e-5, atol=1e-5)
    mine = gradients(ours, upstream, [hidden, weight])
    true = gradients(truth, upstream, [hidden, weight])
    for a, b in zip(mine, true, strict=True):
        assert float((a - b).norm() / b.norm()) < 1e-5


def test_large_logits_do_not_overflow(block: None) -> None:
    hidden, weight, _, target = inputs(dtype=torch.float32, size=1e4)
    ours = log_probs(hidden, weight, target)
    torch.testing.assert_close(ours, naive(hidden, weight, target))
    for grad in gradients(ours, torch.ones(10), [hidden, weight]):
        assert bool(grad.isfinite().all())


def test_log_probs_of_confident_tokens_are_accurate() -> None:
    # 1 - p = 2e-6 at logit 30: a log-normaliser of 30, rounded, would be off by as much.
    hidden = torch.tensor([[30.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.563], [0.0]], requires_grad=True)
    target = torch.tensor([0])
    exact = naive(hidden.double(), weight.double(), target)
    ours = log_probs(hidden, weight, target)
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=6e-8)
    (mine,) = gradients(ours, torch.ones(1), [hidden])
    (true,) = gradients(exact, torch.ones(1), [hidden])
    torch.testing.assert_close(mine, true, rtol=0.03, atol=0)


def test_bfloat16_accumulates_in_float32(block: None) -> None:
    hidden, weight, bias, target = inputs(40, 16, 300, dtype=torch.bfloat16)
    wide = [x.detach().double().requires_grad_() for x in (hidden, weight, bias)]
    ours = log_probs(hidden, weight, target, bias=bias)
    assert ours.dtype == torch.float32
    truth = naive(wide[0], wide[1], target, bias=wide[2])
    # Float32's accuracy, though bfloat16 keeps 3 digits: nothing on the way is rounded to it.
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)
    mine = gradients(ours, torch.ones(40), [hidden, weight, bias])
    true = gradients(truth, torch.ones(40), wide)
    for a, b in zip(mine, true, strict=True):
        assert a.dtype == torch.bfloat16
        # Rounded once, at the end: half a unit of its 8 bits.
        torch.testing.assert_close(a.double(), b, rtol=2**-8, atol=1e-5)


def test_autocast_takes_its_dtype_for_products_alone() -> None:
    hidden, weight, _, target = inputs(40, 16, 300, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = log_probs(hidden, weight, target)
        options = {"grad_outputs": torch.ones(40), "retain_graph": True}
        within = torch.autograd.grad(ours, [hidden, weight], **options)
    rounded = [x.detach().bfloat16().double() for x in (hidden, weight)]
    assert ours.dtype == torch.float32
    truth = naive(*rounded, target)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)
    grad_hidden, grad_weight = gradients(ours, torch.ones(40), [hidden, weight])
    assert grad_hidden.dtype == grad_weight.dtype == torch.float32
    # Wherever backward is called.
    assert torch.equal(within[0], grad_hidden) and torch.equal(within[1], grad_weight)


def test_frozen_inputs_get_no_gradient(block: None) -> None:
    hidden, weight, bias, target = inputs()
    full = gradients(log_probs(hidden, weight, target), torch.ones(10), [hidden, weight])
    log_probs(hidden, weight.detach(), target).sum().backward()
    assert hidden.grad is not None and weight.grad is None
    assert torch.equal(hidden.grad, full[0])
    hidden.grad = None
    log_probs(hidden.detach(), weight, target, bias=bias.detach()).sum().backward()
    assert hidden.grad is None and bias.grad is None and weight.grad is not None


def test_backward_twice_adds_up_and_a_second_derivative_is_refused() -> None:
    hidden, weight, _, target = inputs()
    out = log_probs(hidden, weight, target)
    out.sum().backward(retain_graph=True)
    assert hidden.grad is not None
    once = hidden.grad.clone()
    out.sum().backward()
    torch.testing.assert_close(hidden.grad, 2 * once, rtol=1e-14, atol=0)
    (first,) = torch.autograd.grad(
        log_probs(hidden, weight, target).sum(), hidden, create_graph=True
    )
    with pytest.raises(RuntimeError, match="does not require grad"):
        first.sum().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_a_large_vocabulary_in_bfloat16_on_a_gpu(softcap: float | None) -> None:
    made = [x.detach().to("cuda", torch.bfloat16) for x in inputs(4099, 64, 40_003)[:3]]
    target = inputs(4099, 64, 40_003)[3].cuda()
    ours = [x.clone().requires_grad_() for x in made]
    exact = [x.double().requires_grad_() for x in made]
    out = log_probs(*ours[:2], target, bias=ours[2], softcap=softcap)
    expected = naive(*exact[:2], target, bias=exact[2], softcap=softcap)
    # The products of bfloat16 are exact in float32, and so are the sums to its rounding.
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-4)
    upstream = torch.randn(len(target), dtype=torch.float64, device="cuda")
    found, wanted = gradients(out, upstream, ours), gradients(expected, upstream, exact)
    for one, other in zip(found, wanted, strict=True):
        # Gradients are rounded to bfloat16 on the way, and at their end.
        assert (one.double() - other).norm() < 4e-3 * other.norm()
