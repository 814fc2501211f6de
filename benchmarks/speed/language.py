"""Language: log-probs of tokens without the full logits, then updates of a small decoder."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.speed.measure import Check, Options, Row, checked, growth_mb, in_child, paired
from iwsft.policies.token_log_prob import token_log_prob

GRADIENT_LIMIT = 1e-5
_FULL = "full logits, log_softmax, gather (plain torch)"


@dataclass(frozen=True)
class Sizes:
    """How much is measured.

    Attributes:
        tokens: whose log-prob is taken.
        vocabulary: tokens there are; by default Qwen2.5's without its padding.
        hidden: width of the states.
    """

    tokens: int = 4096
    vocabulary: int = 151_669
    hidden: int = 512


SIZES = {
    "paper": Sizes(),
    "small": Sizes(tokens=256, vocabulary=16_384, hidden=32),
}


def measure(options: Options) -> Iterator[Row | Check]:
    """Memory, agreement and time of the log-probs, then the updates.

    Raises:
        ValueError: a dataset; tokens are drawn at random.
    """
    if options.dataset is not None:
        raise ValueError("language is measured on random tokens; leave --dataset out")
    # Here, for a child that measures memory should not hold transformers and TRL.
    from benchmarks.speed import language_updates

    sizes = SIZES[options.scale]
    yield memory(options, sizes)
    yield from log_probs(options, sizes)
    yield from language_updates.measure(options, language_updates.SIZES[options.scale])


class LogProbs:
    """Log-probs of random tokens and their gradients, ours and the plain way.

    Args:
        tokens: see :class:`Sizes`, as the others.
        vocabulary: of the weight.
        hidden: width of the states.
        seed: of everything.
    """

    def __init__(self, tokens: int, vocabulary: int, hidden: int, seed: int) -> None:
        draw = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(tokens, hidden, generator=draw).requires_grad_()
        # In place: what a copy would take here would hide what the job takes later.
        weight = torch.randn(vocabulary, hidden, generator=draw).div_(hidden**0.5)
        self.weight = weight.requires_grad_()
        self.target = torch.randint(vocabulary, (tokens,), generator=draw)
        # Importance weights: every token counts differently.
        self.upstream = torch.rand(tokens, generator=draw)

    def ours(self) -> None:
        """Loss and gradient."""
        self._backward(token_log_prob(self.hidden, self.weight, self.target))

    def plain(self) -> None:
        """The same from full logits."""
        log_prob = torch.nn.functional.linear(self.hidden, self.weight).log_softmax(-1)
        self._backward(log_prob.gather(1, self.target[:, None]).squeeze(1))

    def _backward(self, log_prob: Tensor) -> None:
        self.hidden.grad = self.weight.grad = None
        (self.upstream * log_prob).mean().backward()

    def disagreement(self) -> float:
        """Largest relative difference of a gradient, in the 2-norm."""
        found = []
        for way in (self.ours, self.plain):
            way()
            assert self.hidden.grad is not None and self.weight.grad is not None
            found.append((self.hidden.grad, self.weight.grad))
        pairs = zip(*found, strict=True)
        return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def _shape(sizes: Sizes, options: Options) -> dict[str, int]:
    return {
        "tokens": sizes.tokens,
        "vocabulary": sizes.vocabulary,
        "hidden": sizes.hidden,
        "seed": options.seed,
    }


def _named(sizes: Sizes) -> str:
    return f"{sizes.tokens:,} tokens x {sizes.vocabulary:,} vocabulary, hidden {sizes.hidden}"


def memory(options: Options, sizes: Sizes) -> Row:
    """Peak of loss and gradient above the inputs, each way in a process of its own."""
    ours, plain = (
        in_child("benchmarks.speed.language", {**_shape(sizes, options), "ours": ours})
        for ours in (True, False)
    )
    return Row(f"peak memory of log-prob and gradient, {_named(sizes)}", ours, plain, "MB", _FULL)


def log_probs(options: Options, sizes: Sizes) -> Iterator[Row | Check]:
    """Agreement and time."""
    both = LogProbs(**_shape(sizes, options))
    yield checked(
        "gradient of log-probs against that of full logits, relative difference",
        both.disagreement(),
        GRADIENT_LIMIT,
    )
    yield paired(both.ours, both.plain, options.repeats).row(
        f"log-prob and gradient, {_named(sizes)}", _FULL, "ms", "per batch"
    )


def peak(*, ours: bool, **shape: int) -> float:
    """MB that loss and gradient need above their inputs; alone in its process."""
    torch.set_num_threads(1)
    both = LogProbs(**shape)
    return growth_mb(both.ours if ours else both.plain)


if __name__ == "__main__":
    print(peak(**json.loads(sys.argv[1])))
