"""Speed of language: log-probs of tokens without the full logits, then updates of a decoder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from benchmarks.speed.measure import Check, Comparison, paired, peak_mb_of_child
from benchmarks.speed.options import Options
from iwsft.policies.token_log_prob import token_log_prob_and_entropy

GRADIENT_LIMIT = 1e-5


@dataclass(frozen=True)
class Sizes:
    """Tokens whose log-prob is taken, and sizes of the last layer."""

    tokens: int = 4096
    timed_tokens: int = 1024
    # Qwen2.5's without its padding.
    vocabulary: int = 151_669
    hidden: int = 512


SIZES = {"paper": Sizes(), "small": Sizes(256, 128, vocabulary=16_384, hidden=32)}


def measure(options: Options) -> Iterator[Comparison | Check]:
    """Yield agreement, memory and time of the log-probs, then the updates."""
    if options.dataset is not None:
        raise ValueError("language is measured on random tokens; leave --dataset out")
    # Imported here, because a child that measures memory should not load transformers and TRL.
    from benchmarks.speed import language_updates

    yield from log_probs(options, SIZES[options.scale])
    yield from language_updates.measure(options, language_updates.SIZES[options.scale])


def log_probs(options: Options, sizes: Sizes) -> Iterator[Comparison | Check]:
    """Agreement and time on fewer tokens, then peak memory of loss and gradient."""
    size = f"{sizes.vocabulary:,} vocabulary, hidden {sizes.hidden}"
    peer_name = "full logits, log_softmax, gather (plain torch)"
    shape = asdict(sizes) | {"seed": options.seed}
    tokens = shape.pop("timed_tokens")
    pair = LogProbs(**shape | {"tokens": tokens})
    name = "gradient of log-probs against that of full logits, relative difference"
    yield Check(name, pair.disagreement(), GRADIENT_LIMIT)
    times = paired(pair.ours, pair.plain, options.repeats)
    what = "log-prob and gradient"
    yield times.row(f"{what}, {tokens:,} tokens x {size}", peer_name, "ms", "per batch")
    ours, plain = (peak_mb_of_child(__name__, ours=ours, **shape) for ours in (True, False))
    name = f"peak memory of {what}, {sizes.tokens:,} tokens x {size}"
    yield Comparison(name, ours, plain, "MB", peer_name)


class LogProbs:
    """Log-probs of random tokens and their gradients, ours and the plain way."""

    def __init__(self, tokens: int, vocabulary: int, hidden: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(tokens, hidden, generator=draw).requires_grad_()
        # In place: the memory of a copy here would hide some of what the job takes later.
        weight = torch.randn(vocabulary, hidden, generator=draw).div_(hidden**0.5)
        self.weight = weight.requires_grad_()
        self.target = torch.randint(vocabulary, (tokens,), generator=draw)
        # Importance weights: every token counts differently.
        self.upstream = torch.rand(tokens, generator=draw)

    def ours(self) -> None:
        """Compute loss and gradient with the fused log-probs."""
        self._backward(token_log_prob_and_entropy(self.hidden, self.weight, self.target)[0])

    def plain(self) -> None:
        """Compute the same from full logits."""
        log_prob = torch.nn.functional.linear(self.hidden, self.weight).log_softmax(-1)
        self._backward(log_prob.gather(1, self.target[:, None]).squeeze(1))

    def _backward(self, log_prob: Tensor) -> None:
        self.hidden.grad = self.weight.grad = None
        (self.upstream * log_prob).mean().backward()

    def disagreement(self) -> float:
        """Return the largest relative difference of a gradient, in the 2-norm."""
        gradients = []
        for way in (self.ours, self.plain):
            way()
            assert self.hidden.grad is not None and self.weight.grad is not None
            gradients.append((self.hidden.grad, self.weight.grad))
        pairs = zip(*gradients, strict=True)
        return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def job(*, ours: bool, **shape: int) -> Callable[[], object]:
    """Return loss and gradient, whose memory is measured, our way or the plain way."""
    pair = LogProbs(**shape)
    return pair.ours if ours else pair.plain
