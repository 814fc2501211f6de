"""transformers' Trainer with the library's loss: SFT and importance-weighted SFT of a causal LM."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    SaveStrategy,
    TrainOutput,
    rotate_checkpoints,
)

from iwsft.fingerprint import fingerprint
from iwsft.forward_pass import dataset_log_prob
from iwsft.language import saving
from iwsft.language.batches import PLACE, TrajectoryDataset, collate
from iwsft.language.checks import check_engine, warn_of_half_precision
from iwsft.language.config import ImportanceWeightedConfig
from iwsft.language.loss import token_loss
from iwsft.language.measures import Measures
from iwsft.language.plan import PlannedLoader, plan_updates
from iwsft.language.shards import Shards
from iwsft.language.weighing import CachedWeights
from iwsft.objective import LOSS
from iwsft.policies.causal_lm import CausalLMPolicy
from iwsft.proposals import EMA
from iwsft.reference import cached_reference, reference_log_prob
from iwsft.trajectory import (
    ASSISTANT_MASK,
    REF_LOG_PROB,
    TOKENS,
    TRAJ_IDS,
    Segments,
    check_tensordict,
)
from iwsft.weights import ImportanceWeights

WEIGHTS = "weights.pt"
REFERENCE = "reference"
# Those with which a run is resumed have to be the same.
SETTINGS = (
    "proposal",
    "sync_every",
    "ema_decay",
    "length_normalize",
    "layout",
    "pad_to_multiple_of",
)


class ImportanceWeightedTrainer(Trainer):
    """Fine-tunes a causal LM on curated trajectories with :class:`~iwsft.ImportanceWeightedMLE`.

    Everything around the loss is transformers' own: accelerate, DeepSpeed ZeRO and FSDP2, gradient
    accumulation and checkpointing, mixed precision, schedules, logging. What differs:

    - A batch is trajectories, and the loss is divided once, by the draws of an update over all
      accumulated micro-batches and processes. An update is the same however it is divided up
      (:class:`~iwsft.language.plan.UpdatePlan`). An epoch holds each trajectory as often as its
      ``multiplicity`` says.
    - The reference is the model as it is handed over (its adapters off, where it has some). Its
      log-probs are computed once at the start, within the engine and in the batches of the first
      epoch, so the first update's weights are exactly those of log-ratio 0; they are kept on disk.
    - Log lines hold ``ESS``, ``weight_mean``, ``weight_max``, ``clip_fraction``, ``kl_approx`` and
      ``log_prob`` beside the loss.
    - A checkpoint is whole or not there. Resuming, in mid-window of a hard sync too, continues the
      run as if it had never stopped.

    Args:
        model: a causal decoder with its output layer, or a PEFT model of one.
        args: settings.
        trajectories: packed token trajectories, curated; see ``iwsft.language.tokenize``.
            ``ref_log_prob`` is written into them.
        importance_weights: from per-token log-ratios to weights; by default exp of the mean
            log-ratio of a trajectory.
        eval_trajectories: held out; ``evaluate`` gives their mean negative log-likelihood.
        processing_class: the tokenizer; its pad token fills batches, and it is saved along.
        callbacks: further callbacks of transformers.
        optimizers: an optimizer and a schedule in place of those that ``args`` names.

    Raises:
        ValueError: settings that do not fit together or are not supported, an empty dataset, or
            trajectories that the model can't read.
        OverflowError: a chain of weights that must overflow on these trajectories.
    """

    # The loss is divided by the draws of the whole update.
    loss_is_scaled_for_ga = True
    args: ImportanceWeightedConfig

    def __init__(
        self,
        model: nn.Module,
        args: ImportanceWeightedConfig,
        *,
        trajectories: TensorDictBase,
        importance_weights: ImportanceWeights | None = None,
        eval_trajectories: TensorDictBase | None = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        if not isinstance(args, ImportanceWeightedConfig):
            raise TypeError(
                f"args must be an iwsft.language.ImportanceWeightedConfig, not a "
                f"{type(args).__name__}; it takes the same settings and a few more"
            )
        pad_token_id = getattr(processing_class, "pad_token_id", None) or 0
        self._policy = CausalLMPolicy(model)
        for held in (trajectories, eval_trajectories):
            if held is not None:
                check_tensordict(held)
                self._policy.check(held)
        weights = ImportanceWeights() if importance_weights is None else importance_weights
        self._dataset = _dataset(trajectories)
        self._collate = partial(
            collate,
            layout=args.layout,
            pad_token_id=pad_token_id,
            multiple_of=args.pad_to_multiple_of,
        )
        if args.proposal != "reference":
            weights.check_overflow(_longest(trajectories))
        self._trajectories = trajectories
        self._loss = token_loss(
            self._policy,
            importance_weights=weights,
            proposal=args.proposal,
            length_normalize=args.length_normalize,
            reduction="sum",
            hold_q=False,
        )
        super().__init__(
            model=model,
            args=args,
            train_dataset=self._dataset,
            eval_dataset=None if eval_trajectories is None else _dataset(eval_trajectories),
            data_collator=self._collate,
            processing_class=processing_class,
            callbacks=[*(callbacks or []), _AtStart(self)],
            optimizers=optimizers,
        )
        check_engine(self, args.proposal, weights)
        warn_of_half_precision(self, model)
        self._plan = plan_updates(
            self._dataset.sizes,
            args,
            processes=self.accelerator.num_processes,
            process=self.accelerator.process_index,
        )
        self._measures = Measures()
        self._weights: CachedWeights | None = None
        self._shards: Shards | None = None
        self._q: EMA | None = None
        self._resumed: Path | None = None
        self._reference_key: str | None = None
        self._finite = torch.tensor(True)
        self._aside = False
        self._parameters = sum(p.numel() for p in model.parameters())
        self._fingerprint = fingerprint(
            {str(key): trajectories.get(key) for key in (TOKENS, ASSISTANT_MASK, TRAJ_IDS)}
        )

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of this process: as planned, and not dealt out again by accelerate."""
        workers = self.args.dataloader_num_workers
        return PlannedLoader(
            self._dataset,
            batch_sampler=self._plan,
            collate_fn=self._collate,
            num_workers=workers,
            persistent_workers=workers > 0 and self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor if workers else None,
        )

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The micro-batches of the next update, with their weights, and its draws overall."""
        update = self.state.global_step
        if self._weights is not None and update >= self._weights.until:
            last = max(self.state.max_steps, update + 1)
            with nullcontext() if self._shards is None else self._shards.swapped():
                window = range(update, min(update + (self.args.sync_every or 1), last))
                self._weights.weigh(window, partial(self._log_prob, self._dataset.trajectories))
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        draws = torch.zeros((), dtype=torch.float64, device=device)
        for batch in batches:
            if self._weights is not None:
                self._weights.write(batch)
            segments = self._loss.segments(batch)
            draws += self._loss.share(batch, segments).sum().to(device)
        self._measures.begin()
        return batches, self.accelerator.reduce(draws, "sum")

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs.to(self.args.device)

    def floating_point_ops(self, inputs: Any) -> int:
        """6 x parameters x tokens of a batch, the usual estimate."""
        return 6 * self._parameters * int(inputs.get(TOKENS).numel())

    def _track_num_input_tokens(self, inputs: Any) -> None:
        if self.args.include_num_input_tokens_seen != "no":
            tokens = torch.tensor(inputs.get(TOKENS).numel(), device=self.args.device)
            self.state.num_input_tokens_seen += int(self.accelerator.reduce(tokens, "sum"))

    # ---- loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The share of a micro-batch in the loss of its update.

        Times the number of processes, as engines average gradients over them.
        """
        self._policy.model = model
        terms = self._loss.terms(inputs, cached=self._weights is not None)
        out = self._loss.summary(terms)
        clipped = math.nan if self._weights is None else self._weights.clip_fraction
        self._measures.add(terms, clipped)
        draws = terms.share.sum() if num_items_in_batch is None else num_items_in_batch
        loss = out[LOSS] * (self.accelerator.num_processes / draws).to(out[LOSS].dtype)
        self._finite = self._finite.to(loss.device) & loss.detach().isfinite()
        return (loss, out) if return_outputs else loss

    def _log_prob(self, trajectories: TensorDictBase, batches: list[list[int]]) -> Tensor:
        """log p of the tokens of all trajectories that are in the batches, ``[N]``."""
        self._policy.model = self.model_wrapped
        return dataset_log_prob(
            self._policy,
            trajectories,
            batches,
            collate=self._collate,
            device=self.accelerator.device,
            shared=True,
        )

    # ---- start and resumption ----

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train; see :class:`transformers.Trainer`.

        Args:
            resume_from_checkpoint: a checkpoint's folder; True: the last one in ``output_dir``.
            trial: of a search over settings.
            ignore_keys_for_eval: not used.

        Raises:
            FileExistsError: ``output_dir`` holds checkpoints that are not to be resumed.
            CheckpointError: a checkpoint that is damaged, of other settings, or of another number
                of processes.
            FloatingPointError: loss or weights are no longer finite; checkpoints stay.
        """
        self._resumed = saving.resumed(
            self._folder,
            resume_from_checkpoint,
            saves=self.args.save_strategy != SaveStrategy.NO,
        )
        self._reference_key = None
        if self._resumed is not None:
            self._reference_key = saving.check(self._resumed, self._settings())
        checkpoint = None if self._resumed is None else str(self._resumed)
        result: TrainOutput = super().train(checkpoint, trial, ignore_keys_for_eval)
        return result

    @property
    def _folder(self) -> Path:
        return Path(str(self.args.output_dir))

    def _start(self) -> None:
        """What needs the engine: reference, q. Called when training begins or goes on."""
        if self.args.proposal == "reference":
            return
        self._annotate()
        if self.args.proposal == "lagged":
            self._shards = Shards(self.model_wrapped, optimizer=self.optimizer)
            self._q = EMA(self._loss, decay=self.args.ema_decay or 0.0, holder=self._shards)
        if self.args.proposal != "current":
            self._weights = CachedWeights(self._loss, self._dataset, self._plan)
            self._weights.until = self.state.global_step
        if self._resumed is not None and self._shards is not None:
            self._shards.load_state_dict(saving.read_state(self._resumed / self._shards_file))
        if self._resumed is not None and self._weights is not None:
            self._weights.load_state_dict(saving.read_state(self._resumed / WEIGHTS))

    def _annotate(self) -> None:
        """Write ``ref_log_prob`` into the trajectories; a resumed run takes that of its start."""
        cache = Path(self.args.reference_cache or self._folder / REFERENCE)
        if self._reference_key is not None:
            cached_reference(self._trajectories, self._reference_key, cache=cache)
        else:
            self._policy.model = self.model_wrapped
            log_prob, self._reference_key = reference_log_prob(
                self._policy,
                self._trajectories,
                batches=[self._dataset.positions(batch) for batch in self._plan.epoch(0)],
                collate=self._collate,
                cache=cache,
                device=self.accelerator.device,
            )
            self._trajectories.set(REF_LOG_PROB, log_prob)
        self._dataset.trajectories.set(REF_LOG_PROB, self._trajectories.get(REF_LOG_PROB))

    def _settings(self) -> dict[str, Any]:
        """What a checkpoint belongs to."""
        return {
            **{name: getattr(self.args, name) for name in SETTINGS},
            "importance_weights": repr(self._loss.importance_weights),
            "plan": self._plan.settings(),
            "trajectories": self._fingerprint,
        }

    @property
    def _shards_file(self) -> str:
        return f"q_{self.accelerator.process_index}.pt"

    # ---- checkpoints ----

    def _get_output_dir(self, trial: Any) -> str:
        run = super()._get_output_dir(trial)
        return str(Path(run) / saving.ASIDE) if self._aside else run

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint aside, ours included, and move it to its place when it is whole."""
        self._check_finite()
        run = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            saving.clear(run)
        self.accelerator.wait_for_everyone()
        with saving.written_aside(run):
            self._aside = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._aside = False
            folder = run / saving.ASIDE / name
            if self._shards is not None:
                saving.write_state(folder / self._shards_file, self._shards.state_dict())
            if self._weights is not None and self.args.should_save:
                saving.write_state(folder / WEIGHTS, self._weights.state_dict())
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                saving.seal(folder, self._settings(), self._reference_key)
                saving.publish(folder, run / name)
                saving.clear(run)
                rotate_checkpoints(str(run), save_total_limit=self.args.save_total_limit)
        self.accelerator.wait_for_everyone()

    # ---- logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write a log line, with what the weights came to since the last one."""
        if "loss" in logs:
            self._check_finite()
            logs |= self._measures.collect(
                lambda x: self.accelerator.gather(x.to(self.args.device)).cpu()
            )
        super().log(logs, start_time)

    def _check_finite(self) -> None:
        if not bool(self._finite):
            raise FloatingPointError(
                f"the loss is no longer finite, at update {self.state.global_step} or a little "
                f"before; lower learning_rate ({self.args.learning_rate:g}) or clip the weights. "
                "Earlier checkpoints stay"
            )

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean negative log-likelihood of the held-out trajectories, by trajectory and by token.

        Args:
            eval_dataset: not taken; they are handed over as ``eval_trajectories``.
            ignore_keys: not used.
            metric_key_prefix: of the names.

        Raises:
            ValueError: there are no held-out trajectories.
        """
        held_out = self.eval_dataset
        if not isinstance(held_out, TrajectoryDataset) or eval_dataset is not None:
            raise ValueError("hand held-out trajectories over as eval_trajectories=...")
        entries = range(len(held_out))
        width = self.args.per_device_eval_batch_size
        batches = [held_out.positions(entries[at : at + width]) for at in entries[::width]]
        log_prob = self._log_prob(held_out.trajectories, batches)
        held = held_out.trajectories
        segments = self._loss.segments(held)
        share = self._loss.share(held, segments)
        steps = share * segments.spread(segments.lengths)
        metrics = {
            f"{metric_key_prefix}_loss": -float((share * log_prob).sum() / share.sum()),
            f"{metric_key_prefix}_token_loss": -float((steps * log_prob).sum() / steps.sum()),
        }
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


class _AtStart(TrainerCallback):
    """Tells the trainer when its engine is ready and when an update is done."""

    def __init__(self, trainer: ImportanceWeightedTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self._trainer._q is not None:
            self._trainer._q.step()


def _dataset(trajectories: TensorDictBase) -> TrajectoryDataset:
    """A shallow copy of the trajectories in which each token knows its place."""
    placed = trajectories.copy()
    return TrajectoryDataset(placed.set(PLACE, torch.arange(len(placed))))


def _longest(trajectories: TensorDictBase) -> int:
    """Trained tokens of the longest trajectory."""
    mask = trajectories.get(ASSISTANT_MASK)
    return int(Segments.of(trajectories, mask=mask).lengths.max())
