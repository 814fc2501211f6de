"""Settings of a fine-tuning run: those of transformers, and how trajectories are weighted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import get_args

from transformers import TrainingArguments

from iwsft.language.batches import Layout
from iwsft.objective import Proposal


@dataclass
class ImportanceWeightedConfig(TrainingArguments):
    """transformers' ``TrainingArguments`` and what :class:`ImportanceWeightedTrainer` adds.

    Attributes:
        proposal: what q is. ``"reference"``: pi_ref, plain SFT. ``"current"``: theta itself, with
            no gradient through the weights; free. ``"cached"``: theta as it was at the last hard
            sync, every ``sync_every`` updates (paper, Algorithm 1); a sync runs the trajectories of
            the coming updates forward once and keeps their weights, so there is no second model.
            ``"lagged"``: an exponential moving average of theta (Section 4.2), kept in float32
            shard by shard; each batch runs forward once more.
        sync_every: Q, updates between hard syncs; with ``"cached"`` only.
        ema_decay: the paper's alpha, in [0, 1); with ``"lagged"`` only.
        length_normalize: divide the log-probability of a trajectory by its trained tokens.
        layout: of a batch, ``"padded"`` or ``"packed"``; both give the same loss.
        token_budget: tokens of a micro-batch at most, padding included where there is some, in
            place of ``per_device_train_batch_size``.
        pad_to_multiple_of: of the padded length.
        reference_cache: folder of kept reference log-probabilities; by default ``reference`` in
            ``output_dir``.
    """

    logging_steps: float = field(default=10, metadata={"help": "updates between log lines"})
    proposal: Proposal = field(default="current", metadata={"help": "what q is"})
    sync_every: int | None = field(default=None, metadata={"help": "updates between hard syncs"})
    ema_decay: float | None = field(default=None, metadata={"help": "decay of the moving average"})
    length_normalize: bool = field(default=True, metadata={"help": "divide by the length"})
    layout: Layout = field(default="padded", metadata={"help": "padded or packed batches"})
    token_budget: int | None = field(default=None, metadata={"help": "tokens of a micro-batch"})
    pad_to_multiple_of: int = field(default=8, metadata={"help": "of the padded length"})
    reference_cache: str | None = field(default=None, metadata={"help": "kept reference log-probs"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.proposal not in get_args(Proposal):
            raise ValueError(f"proposal={self.proposal!r} must be one of {get_args(Proposal)}")
        if self.layout not in get_args(Layout):
            raise ValueError(f"layout={self.layout!r} must be one of {get_args(Layout)}")
        _goes_with("sync_every", self.sync_every, "cached", self.proposal)
        _goes_with("ema_decay", self.ema_decay, "lagged", self.proposal)
        if self.sync_every is not None and self.sync_every < 1:
            raise ValueError(f"sync_every={self.sync_every}: a sync needs an update before it")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay={self.ema_decay} must be in [0, 1)")
        for name, why in _REFUSED.items():
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported here: {why}")


_REFUSED = {
    "load_best_model_at_end": "results are those of the last policy; every checkpoint is kept, "
    "so a better one can be chosen from them",
    "ignore_data_skip": "a resumed run goes on with the batches that it has not seen",
    "auto_find_batch_size": "batches are planned before training; choose token_budget or "
    "per_device_train_batch_size, and gradient_accumulation_steps",
    "label_smoothing_factor": "the loss is a log-likelihood of the tokens themselves",
    "use_liger_kernel": "log-probabilities are computed in chunks already",
}


def _goes_with(name: str, value: object, proposal: str, found: str) -> None:
    if (value is not None) != (found == proposal):
        raise ValueError(
            f"{name}={value} and proposal={found!r}: {name} goes with proposal={proposal!r}, and "
            "only with it"
        )
