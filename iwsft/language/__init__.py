"""Language: rows of text -> token trajectories -> batches for ``ImportanceWeightedMLE``.

    from iwsft import curate
    from iwsft.language import EpochSampler, read, tokenize

    data = tokenize(read("mine.jsonl"), tokenizer, max_length=4096)
    best = curate(data.trajectories, cuts=(50, 75, 90), score="score")
    for batch in EpochSampler(best, batch_size=8, pad_token_id=tokenizer.pad_token_id):
        ...

``ImportanceWeightedTrainer`` is transformers' Trainer with this loss (docs/language.md).
transformers and datasets load where they are used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from iwsft.datasets.text import s1k
from iwsft.datasets.text.chat import ChatEncoder
from iwsft.datasets.text.rows import Row, check_scores, read, to_row
from iwsft.datasets.text.tokens import TokenDataset, correct_only, tokenize
from iwsft.language.batches import EpochBatches, EpochSampler, TrajectoryDataset, collate
from iwsft.language.loss import token_loss
from iwsft.reference import annotate_reference as annotate_tokens
from iwsft.reference import cached_reference

if TYPE_CHECKING:
    from iwsft.language.config import ImportanceWeightedConfig
    from iwsft.language.trainer import ImportanceWeightedTrainer

__all__ = [
    "ChatEncoder",
    "EpochBatches",
    "EpochSampler",
    "ImportanceWeightedConfig",
    "ImportanceWeightedTrainer",
    "Row",
    "TokenDataset",
    "TrajectoryDataset",
    "annotate_tokens",
    "cached_reference",
    "check_scores",
    "collate",
    "correct_only",
    "read",
    "s1k",
    "to_row",
    "token_loss",
    "tokenize",
]

# Their modules import transformers.
_LAZY = {
    "ImportanceWeightedConfig": "config",
    "ImportanceWeightedTrainer": "trainer",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
