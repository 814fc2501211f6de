"""Language: rows of text -> token trajectories -> batches for ``ImportanceWeightedMLE``.

    from iwsft import curate
    from iwsft.language import EpochSampler, read, tokenize

    data = tokenize(read("mine.jsonl"), tokenizer, max_length=4096)
    best = curate(data.trajectories, cuts=(50, 75, 90), score="score")
    for batch in EpochSampler(best, batch_size=8, pad_token_id=tokenizer.pad_token_id):
        ...

``ImportanceWeightedTrainer`` is transformers' Trainer with this loss (docs/language.md).
Each name loads its module with its first use.
"""

from __future__ import annotations

from pkgutil import resolve_name
from typing import TYPE_CHECKING, Any

from iwsft.extras import named

if TYPE_CHECKING:
    from iwsft.datasets.text import s1k as s1k
    from iwsft.datasets.text.chat import ChatEncoder as ChatEncoder
    from iwsft.datasets.text.rows import Row as Row
    from iwsft.datasets.text.rows import check_scores as check_scores
    from iwsft.datasets.text.rows import read as read
    from iwsft.datasets.text.rows import to_row as to_row
    from iwsft.datasets.text.tokens import TokenDataset as TokenDataset
    from iwsft.datasets.text.tokens import correct_only as correct_only
    from iwsft.datasets.text.tokens import tokenize as tokenize
    from iwsft.language.batches import EpochBatches as EpochBatches
    from iwsft.language.batches import EpochSampler as EpochSampler
    from iwsft.language.batches import TrajectoryDataset as TrajectoryDataset
    from iwsft.language.batches import collate as collate
    from iwsft.language.config import ImportanceWeightedConfig as ImportanceWeightedConfig
    from iwsft.language.loss import token_loss as token_loss
    from iwsft.language.trainer import ImportanceWeightedTrainer as ImportanceWeightedTrainer
    from iwsft.reference import annotate_reference
    from iwsft.reference import cached_reference as cached_reference

    annotate_tokens = annotate_reference

_PUBLIC = {
    "ChatEncoder": "iwsft.datasets.text.chat:ChatEncoder",
    "EpochBatches": "iwsft.language.batches:EpochBatches",
    "EpochSampler": "iwsft.language.batches:EpochSampler",
    "ImportanceWeightedConfig": "iwsft.language.config:ImportanceWeightedConfig",
    "ImportanceWeightedTrainer": "iwsft.language.trainer:ImportanceWeightedTrainer",
    "Row": "iwsft.datasets.text.rows:Row",
    "TokenDataset": "iwsft.datasets.text.tokens:TokenDataset",
    "TrajectoryDataset": "iwsft.language.batches:TrajectoryDataset",
    "annotate_tokens": "iwsft.reference:annotate_reference",
    "cached_reference": "iwsft.reference:cached_reference",
    "check_scores": "iwsft.datasets.text.rows:check_scores",
    "collate": "iwsft.language.batches:collate",
    "correct_only": "iwsft.datasets.text.tokens:correct_only",
    "read": "iwsft.datasets.text.rows:read",
    "s1k": "iwsft.datasets.text.s1k:",
    "to_row": "iwsft.datasets.text.rows:to_row",
    "token_loss": "iwsft.language.loss:token_loss",
    "tokenize": "iwsft.datasets.text.tokens:tokenize",
}
__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with named():
        return resolve_name(_PUBLIC[name])
