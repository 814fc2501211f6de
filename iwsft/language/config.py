"""Settings of a fine-tuning run: those of transformers, and how trajectories are weighted."""

from __future__ import annotations

import warnings
from dataclasses import MISSING, dataclass
from typing import Any, get_args

from iwsft.chain import Chain, Reference
from iwsft.extras import named
from iwsft.language.batches import Layout
from iwsft.objective import Proposal
from iwsft.validation import check_count

with named():
    from transformers import Trainer, TrainingArguments


@dataclass
class ImportanceWeightedConfig(TrainingArguments):
    """transformers' ``TrainingArguments`` and what :class:`ImportanceWeightedTrainer` adds.

    Attributes:
        proposal: What q is. ``"reference"``: pi_ref, plain SFT. ``"current"``: theta itself.
            ``"cached"``: theta at the last hard sync (paper, Algorithm 1), which runs the
            trajectories of the coming updates forward once and keeps their weights. ``"lagged"``: a
            moving average of theta (Section 4.2), in float32; each batch runs forward once more.
        reference: What q is divided by, in place of what the importance weights say. ``"fixed"``:
            the model as it is given. ``"synced"``: theta at the last sync, every ``sync_every``
            updates (PSFT). ``"none"``: nothing, so weights are functions of q itself (DFT).
        sync_every: Q, updates between hard syncs; with ``"cached"`` or ``reference="synced"`` only.
        ema_decay: The paper's alpha, in [0, 1); with ``"lagged"`` only.
        length_normalize: Whether to divide the log-probability of a trajectory by its trained
            tokens.
        normalize_data_weights: Whether an update is divided by the absolute data weights of its
            trajectories instead of by their number.
        layout: Layout of a batch, ``"padded"`` or ``"packed"``; both give the same loss.
        token_budget: Most tokens of a micro-batch, padding included, in place of
            ``per_device_train_batch_size``.
        pad_to_multiple_of: Number that the padded length is a multiple of.
        max_length: Most tokens of a row that is given as text; None cuts nothing.
        reference_cache: Folder of cached reference log-probabilities; by default ``reference`` in
            ``output_dir``.
    """

    logging_steps: float = 10
    proposal: Proposal = "current"
    reference: Reference | None = None
    sync_every: int | None = None
    ema_decay: float | None = None
    length_normalize: bool = True
    normalize_data_weights: bool = False
    layout: Layout = "padded"
    token_budget: int | None = None
    pad_to_multiple_of: int = 8
    max_length: int | None = None
    reference_cache: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layout not in get_args(Layout):
            raise ValueError(f"layout={self.layout!r} must be one of {get_args(Layout)}")
        if self.pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of={self.pad_to_multiple_of} must be at least 1")
        check_q(self.proposal, self.sync_every, self.ema_decay, self.reference)
        for name, why in _REFUSED.items():
            if self._is_set(name):
                raise ValueError(f"{name}={getattr(self, name)!r} is not supported here: {why}")
        unused = [name for name in _UNUSED if self._is_set(name)]
        for name, where, unread in (
            ("metric_for_best_model", "without eval_strategy", self.eval_strategy == "no"),
            ("per_device_train_batch_size", "with token_budget", self.token_budget is not None),
            ("pad_to_multiple_of", "with layout='packed'", self.layout == "packed"),
        ):
            if unread and self._is_set(name):
                unused.append(f"{name} {where}")
        if unused:
            warnings.warn(f"without effect here: {', '.join(unused)}", UserWarning, stacklevel=3)
        distribution: Any = self.accelerator_config
        if distribution.split_batches or distribution.dispatch_batches:
            raise ValueError("accelerator_config can't split or dispatch batches that are planned")
        metric = self.metric_for_best_model
        if metric is not None and metric.removeprefix("eval_") not in ("loss", "token_loss"):
            raise ValueError(f"{metric!r} is unknown; metrics are eval_loss and eval_token_loss")

    def _is_set(self, name: str) -> bool:
        """Whether a setting differs from its default."""
        setting = self.__dataclass_fields__[name]
        made = setting.default_factory
        return bool(getattr(self, name) != (setting.default if made is MISSING else made()))


def check_q(
    proposal: str,
    sync_every: int | None,
    ema_decay: float | None,
    reference: Reference | None = None,
) -> None:
    """Check that proposal and reference are known, and that their settings fit them."""
    for name, kind, known in (
        ("proposal", proposal, get_args(Proposal)),
        ("reference", reference, (None, *get_args(Reference))),
    ):
        if kind not in known:
            raise ValueError(f"{name}={kind!r} must be one of {known}")
    syncing = {
        "proposal='cached'": proposal == "cached",
        "reference='synced'": reference == "synced",
    }
    for name, value, users in (
        ("sync_every", sync_every, syncing),
        ("ema_decay", ema_decay, {"proposal='lagged'": proposal == "lagged"}),
    ):
        used = [user for user, uses in users.items() if uses]
        if value is None and used:
            raise ValueError(f"{used[0]} needs {name}: pass it, too")
        if value is not None and not used:
            raise ValueError(f"{name}={value} changes nothing without {' or '.join(users)}")
    if sync_every is not None:
        check_count("sync_every", sync_every)
    if ema_decay is not None and not 0 <= ema_decay < 1:
        raise ValueError(f"ema_decay={ema_decay} must be in [0, 1)")


# Settings of updates that a resumed run has from its checkpoint, or must share with its first part.
OPTIMIZER_SETTINGS = (
    *("optim", "optim_args", "learning_rate", "weight_decay", "max_grad_norm"),
    *("adam_beta1", "adam_beta2", "adam_epsilon", "neftune_noise_alpha"),
    *("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
)
# Settings of transformers' evaluation, of its means over tokens, and of batches that it makes from
# columns or losses that it replaces; they are without effect here.
_UNUSED = (
    *("average_tokens_across_devices", "batch_eval_metrics", "eval_accumulation_steps"),
    *("eval_do_concat_batches", "eval_use_gather_object", "label_names", "prediction_loss_only"),
    *("include_for_metrics", "length_column_name", "liger_kernel_config"),
)
_PLANNED = "an update holds the entries that are planned for it, each epoch all of them once"
_REFUSED = {
    "load_best_model_at_end": "results are those of the last policy; checkpoints are kept",
    "ignore_data_skip": "a resumed run continues with the batches that it has not seen",
    "enable_jit_checkpoint": "a run does not resume exactly from the middle of an update",
    "dataloader_drop_last": _PLANNED,
    "dataloader_in_order": _PLANNED,
    "train_sampling_strategy": _PLANNED,
    "fp16_full_eval": "evaluation has the precision of training",
    "bf16_full_eval": "evaluation has the precision of training",
    "auto_find_batch_size": "batches are planned before training; choose their size",
    "label_smoothing_factor": "the loss is a log-likelihood of the tokens themselves",
    "use_liger_kernel": "log-probabilities are computed in chunks already",
}


def check_engine(trainer: Trainer, weights: Chain, *, whole: bool) -> None:
    """Refuse ways of running that would change the result.

    ``whole`` tells whether the weights of an update are computed together, or do not depend on q.
    """
    if trainer.args.n_gpu > 1:
        way_out = "start one process per GPU (accelerate launch)"
        raise ValueError(f"one process sees {trainer.args.n_gpu} GPUs: {way_out}")
    cut = (trainer.get_tp_size(), trainer.get_cp_size(), trainer.get_sp_size())
    if any(size > 1 for size in cut):
        cuts = "tensor, context and sequence parallelism"
        raise ValueError(f"{cuts} are not supported: use ZeRO-3 or FSDP2")
    parts = trainer.args.gradient_accumulation_steps * trainer.accelerator.num_processes
    if not whole and weights.compares and parts > 1:
        problem = f"{weights} compares the weights of an update, divided here into {parts}"
        way_out = "use one, or ImportanceWeightedTrainer with proposal='cached', sync_every=1"
        raise ValueError(f"{problem} micro-batches; {way_out}")


def warn_of_half_precision(trainer: Trainer) -> None:
    """Warn if the optimizer would step on half-precision weights."""
    # DeepSpeed keeps float32 weights of its own; FSDP2 may upcast them when it shards.
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
        return
    model: Any = trainer.model
    trained = [p for p in model.parameters() if p.requires_grad]
    half = {str(p.dtype) for p in trained if p.itemsize < 4}
    if half:
        problem = f"the weights are {', '.join(sorted(half))}, which round small steps away"
        way_out = "load the model with dtype='float32' and set bf16=True"
        warnings.warn(f"{problem}: {way_out}", UserWarning, stacklevel=4)
