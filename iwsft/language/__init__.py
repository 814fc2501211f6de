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
    from iwsft.datasets.text.tokens import weigh_correct as weigh_correct
    from iwsft.language.batches import EpochBatches as EpochBatches
    from iwsft.language.batches import EpochSampler as EpochSampler
    from iwsft.language.batches import TrajectoryDataset as TrajectoryDataset
    from iwsft.language.batches import collate as collate
    from iwsft.language.config import ImportanceWeightedConfig as ImportanceWeightedConfig
    from iwsft.language.loss import token_loss as token_loss
    from iwsft.language.trainer import ImportanceWeightedTrainer as ImportanceWeightedTrainer
    from iwsft.reference import cached_reference as cached_reference


_NAMES = {
    "iwsft.datasets.text.chat": "ChatEncoder",
    "iwsft.datasets.text.rows": "Row check_scores read to_row",
    "iwsft.datasets.text.tokens": "TokenDataset correct_only tokenize weigh_correct",
    "iwsft.language.batches": "EpochBatches EpochSampler TrajectoryDataset collate",
    "iwsft.language.config": "ImportanceWeightedConfig",
    "iwsft.language.loss": "token_loss",
    "iwsft.language.trainer": "ImportanceWeightedTrainer",
    "iwsft.reference": "cached_reference",
}
_PUBLIC = {name: f"{where}:{name}" for where, names in _NAMES.items() for name in names.split()}
_PUBLIC["s1k"] = "iwsft.datasets.text.s1k"
__all__ = [*_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with named():
        return resolve_name(_PUBLIC[name])
