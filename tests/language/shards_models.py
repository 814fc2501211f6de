"""A tiny decoder, batches of tokens, and its moving average computed by hand."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from iwsft import EMA, ImportanceWeightedMLE
from iwsft.language.shards import Shards
from tests.policies import language_models

DECAY = 0.7


def decoder(seed: int = 0, *, tied: bool = True) -> Any:
    """Sizes that two ranks don't divide evenly."""
    model = language_models.decoder(
        seed=seed,
        dtype=torch.float32,
        hidden_size=21,
        intermediate_size=27,
        num_hidden_layers=2,
        num_attention_heads=3,
        head_dim=4,
        num_key_value_heads=1,
        attention_bias=True,
        tie_word_embeddings=tied,
    )
    return model.train()


def packed(seed: int) -> TensorDict:
    """Three trajectories of random tokens."""
    return language_models.packed((7, 4, 9), seed=seed, assistant=1.0)


class _NoPolicy(nn.Module):
    """The loss of an average needs no policy of its own: the shards hold the model."""

    def log_prob(self, trajectories: TensorDict) -> Tensor:
        raise NotImplementedError


def sharded(model: Any, *, decay: float = DECAY, optimizer: Any = None) -> tuple[Shards, EMA]:
    """q of a model in shards, and the updater that moves it."""
    shards = Shards(model, optimizer=optimizer)
    loss = ImportanceWeightedMLE(_NoPolicy(), proposal="lagged", functional=False, hold_q=False)
    return shards, EMA(loss, decay=decay, holder=shards)


class Average:
    """The moving average of whole parameters, by its definition, in float64."""

    def __init__(self, theta: dict[str, Tensor]) -> None:
        self.q = {name: value.double() for name, value in theta.items()}

    def step(self, theta: dict[str, Tensor]) -> None:
        for name, value in theta.items():
            self.q[name] = DECAY * self.q[name] + (1 - DECAY) * value.double()


def values(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the trainable parameters."""
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
