"""Speed of language: log-probs of tokens without the full logits, then updates of a decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.speed import measure as speed
from benchmarks.speed.measure import Check, Comparison, compare
from benchmarks.speed.options import Options
from iwsft.policies.token_log_prob import token_log_prob_and_entropy

GRADIENT_LIMIT = 1e-5
PLAIN = "full logits, log_softmax, gather (plain torch)"
# A way computes log-probs, their weighted mean, and its gradients to states and output layer.
Ways = dict[str, Callable[[], tuple[Tensor, Tensor]]]


def measure(options: Options) -> Iterator[Comparison | Check]:
    """Yield agreement, memory and time of the log-probs, then the updates."""
    yield from log_probs(options)
    # Imported here, because a child that measures memory should not load transformers and TRL.
    from benchmarks.speed import language_updates

    yield from language_updates.measure(options)


def shape_of(options: Options) -> dict[str, int]:
    """Return tokens and sizes of the last layer, with Qwen2.5's vocabulary without its padding."""
    return vars(
        speed.scaled(options, tokens=(4096, 1024), vocabulary=(151_669, 16_384), hidden=(512, 32))
    )


def log_probs(options: Options) -> Iterator[Comparison | Check]:
    """Agreement and time on fewer tokens, then peak memory of loss and gradient."""
    shape = shape_of(options)
    tokens = shape["tokens"] // 4
    ours, plain, _ = ways(options.seed, shape | {"tokens": tokens}).values()
    name = "gradient of log-probs against that of full logits, relative difference"
    yield Check(name, speed.relative_difference(ours(), plain()), GRADIENT_LIMIT)
    what = "log-prob and gradient, {:,} tokens x {vocabulary:,} vocabulary, hidden {hidden}"
    name, unit = what.format(tokens, **shape), "ms per batch"
    yield compare(name, ours, plain, PLAIN, unit, options.repeats)
    yield speed.compare_peaks(what.format(shape["tokens"], **shape), PLAIN, __name__, options)


def ways(
    seed: int, shape: dict[str, int], device: str = "cpu", dtype: torch.dtype = torch.float32
) -> Ways:
    """Return three ways on the same random tokens: ours, from full logits, TRL's fused head."""
    tokens, vocabulary, hidden = (shape[name] for name in ("tokens", "vocabulary", "hidden"))
    draw = torch.Generator().manual_seed(seed)
    states = torch.randn(tokens, hidden, generator=draw).to(device, dtype).requires_grad_()
    # In place: the memory of a copy here would hide some of what the job takes later.
    weight = torch.randn(vocabulary, hidden, generator=draw).div_(hidden**0.5)
    weight = weight.to(device, dtype).requires_grad_()
    target = torch.randint(vocabulary, (tokens,), generator=draw).to(device)
    # Importance weights: every token counts differently.
    upstream = torch.rand(tokens, generator=draw).to(device)

    def ours() -> Tensor:
        return token_log_prob_and_entropy(states, weight, target)[0]

    def plain() -> Tensor:
        log_prob = torch.nn.functional.linear(states, weight).log_softmax(-1)
        return log_prob.gather(1, target[:, None]).squeeze(1)

    def fused() -> Tensor:
        from trl.kernels import ChunkedLogProbFunction

        settings = (1.0, 32_768, None, 1.0, ("log_probs",))
        return ChunkedLogProbFunction.apply(states, weight, None, target, *settings)[0]

    def gradients(log_prob: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        states.grad = weight.grad = None
        (upstream * log_prob()).mean().backward()
        assert states.grad is not None and weight.grad is not None
        return states.grad, weight.grad

    return {way.__name__: partial(gradients, way) for way in (ours, plain, fused)}


def job(options: Options, *, ours: bool) -> Callable[[], object]:
    """Return loss and gradient, whose memory is measured, our way or the plain way."""
    return ways(options.seed, shape_of(options))["ours" if ours else "plain"]
