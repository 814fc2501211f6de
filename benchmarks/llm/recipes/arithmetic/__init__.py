"""Sums written out step by step: the paper's bandit (Section 3.5) in language."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class BaseSettings:
    """Size and training of the base model; the defaults have 1.09M parameters."""

    hidden_size: int = 128
    intermediate_size: int = 576
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    # Updates, each on texts not seen before.
    steps: int = 1300
    batch_size: int = 16
    # Peak, after the warm-up; then a cosine to 0.
    lr: float = 1.2e-3
    warmup: int = 30
    weight_decay: float = 0.1
