"""Tiny decoders and token trajectories for the tests of the reference."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from iwsft.forward_pass import ForwardPass
from iwsft.language.batches import collate
from iwsft.policies import CausalLMPolicy
from iwsft.reference import write_reference
from tests.policies import language_models

VOCABULARY = 61
SIZES = (9, 4, 14, 6, 11, 23, 5, 8, 3, 17)
# Each trajectory once.
BATCHES = [[5, 1, 7], [2, 0], [9, 4, 3], [8, 6]]


def decoder(seed: int = 0, *, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A random decoder in training mode."""
    sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": 2}
    return language_models.decoder(seed=seed, dtype=dtype, **(sizes | settings)).train()


def policy(seed: int = 0, **settings: Any) -> CausalLMPolicy:
    return CausalLMPolicy(decoder(seed, **settings))


def dataset(
    sizes: Sequence[int] = SIZES, *, multiplicity: Sequence[int] | None = None, seed: int = 0
) -> TensorDict:
    """Trajectories of random tokens; the second half of each is the assistant's."""
    draw = torch.Generator().manual_seed(seed)
    size = torch.tensor(sizes)
    place = torch.cat([torch.arange(n) for n in sizes])
    number = len(place)
    data = TensorDict(
        {
            # The last token of the vocabulary is left for tests that place it.
            "tokens": {"full": torch.randint(3, VOCABULARY - 1, (number,), generator=draw)},
            "masks": {
                "all_attention_mask": torch.ones(number, dtype=torch.bool),
                "all_assistant_mask": place >= (size // 2).repeat_interleave(size),
            },
            "collector": {"traj_ids": torch.arange(len(sizes)).repeat_interleave(size)},
        },
        [number],
    )
    if multiplicity is not None:
        data["multiplicity"] = torch.tensor(multiplicity).repeat_interleave(size)
    return data


def annotate(
    theta: Any,
    data: TensorDict,
    batches: Sequence[Sequence[int]] = BATCHES,
    *,
    cache: Path | None = None,
    **how: Any,
) -> str | None:
    """Annotate in batches that are collated as training does it; the key of what is stored."""
    forward = ForwardPass(theta, data, batches, collate=partial(collate, **how), shared=True)
    return write_reference(forward, cache=cache)


class Counting(CausalLMPolicy):
    """Records the batches that it ran, and breaks at one of them."""

    def __init__(self, model: Any, *, breaks_at: int | None = None) -> None:
        super().__init__(model)
        self._batches: list[list[int]] = []
        self._breaks_at = breaks_at

    def log_prob(self, trajectories: TensorDictBase) -> Tensor:
        if len(self._batches) == self._breaks_at:
            raise InterruptedError
        ids = trajectories["collector", "traj_ids"]
        self._batches.append(ids.unique().tolist())
        return super().log_prob(trajectories)


def files(folder: Path) -> list[Path]:
    """What a cache holds."""
    return sorted(folder.iterdir())
