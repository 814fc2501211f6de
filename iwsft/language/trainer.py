"""transformers' Trainer with the library's loss: SFT and importance-weighted SFT of a causal LM."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.utils.data import DataLoader

from iwsft.chain import check_chain, written_by
from iwsft.datasets.text.rows import Row, read
from iwsft.datasets.text.tokens import CORRECT, correct_only, tokenize
from iwsft.extras import named
from iwsft.fingerprint import fingerprint
from iwsft.language.batches import PLACE, TrajectoryDataset, collate
from iwsft.language.config import (
    ImportanceWeightedConfig,
    check_engine,
)
from iwsft.language.loss import (
    check_judges,
    check_weights,
    judge,
    negative_log_likelihood,
    token_loss,
)
from iwsft.language.plan import plan_updates
from iwsft.language.weighted import REFERENCE, WeightedTrainer
from iwsft.objective import ImportanceWeightedMLE
from iwsft.policies.causal_lm import CausalLMPolicy
from iwsft.presets import ImportanceWeights
from iwsft.proposals import EMA, write_weights
from iwsft.trajectory import (
    ASSISTANT_MASK,
    ATTENTION_MASK,
    IMPORTANCE_WEIGHT,
    REF_LOG_PROB,
    STANDARD_SCORE,
    TOKENS,
    TRAJ_IDS,
    Segments,
    lengths,
)
from iwsft.validation import check_packed, check_valid_steps

with named():
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback


class ImportanceWeightedTrainer(WeightedTrainer):
    """Fine-tunes a causal LM on curated trajectories with :class:`~iwsft.ImportanceWeightedMLE`.

    Everything around the loss is transformers' own: accelerate, DeepSpeed ZeRO and FSDP2, gradient
    accumulation and checkpointing, mixed precision, schedules, logging. What differs:

    - The loss is divided once, by the multiplicities of an update over all micro-batches and
      processes, so an update is the same however it is divided. An epoch contains each trajectory
      as often as its ``multiplicity`` says.
    - The reference is the model as it is given (without its adapters, if it has some). Its
      log-probs are computed once, in the batches of the first epoch, so that the first weights are
      exactly those of log-ratio 0. Rows with ``ref_log_probs`` have those instead.
    - A resumed run gives the same numbers as one that was never stopped.

    Args:
        model: A causal decoder with its output layer, a PEFT model of one, or the hub id or folder
            of one, which is loaded in float32.
        args: Settings of the run; by default those of an ``ImportanceWeightedConfig()``.
        trajectories: Packed token trajectories, curated; see ``iwsft.language.tokenize``.
            ``ref_log_prob`` is written into them. Those of multiplicity 0 are not trained on, and
            :class:`~iwsft.lower_bound.LowerBound` judges by them.
        train_dataset: Rows of text instead: records with ``messages``, or ``prompt`` and
            ``completion``, such as a ``Dataset`` or a list, or what :func:`iwsft.language.read`
            returns. They are cut to ``args.max_length`` tokens. Those that are not ``correct`` are
            left out.
        importance_weights: Transforms from per-token log-ratios to weights; by default exp of the
            mean log-ratio of a trajectory.
        eval_trajectories: Held-out trajectories, for ``evaluate``.
        eval_dataset: Held-out rows of text instead, as ``train_dataset``.
        processing_class: Tokenizer, which is saved with the model; by default that of its hub id or
            folder. Its pad token fills batches.
        callbacks, optimizers: As for transformers' Trainer.

    Raises:
        ValueError: Settings do not fit together or are not supported, the dataset is empty, or the
            model can't read the trajectories.
        OverflowError: The weights must overflow on these trajectories.
    """

    args: ImportanceWeightedConfig
    # With "cached" and "lagged" the weights of all tokens, with a synced reference its log-probs;
    # the first update for which they are not known (``until``), and ``clip_fraction`` before it.
    _cached: TensorDict | None = None

    def __init__(
        self,
        model: nn.Module | str,
        args: ImportanceWeightedConfig | None = None,
        *,
        trajectories: TensorDictBase | None = None,
        train_dataset: Any = None,
        importance_weights: ImportanceWeights | None = None,
        eval_trajectories: TensorDictBase | None = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ) -> None:
        args = ImportanceWeightedConfig() if args is None else args
        if not isinstance(args, ImportanceWeightedConfig):
            raise TypeError(f"args must be ImportanceWeightedConfig, not {type(args).__name__}")
        check_chain("importance_weights", importance_weights)
        if args.max_length is not None and train_dataset is None and eval_dataset is None:
            cut = "give it to tokenize, which makes trajectories"
            raise ValueError(f"max_length={args.max_length} cuts rows of text alone: {cut}")
        if isinstance(model, str) and processing_class is None:
            processing_class = AutoTokenizer.from_pretrained(model)
        encode = partial(_encoded, tokenizer=processing_class, max_length=args.max_length)
        names = ("train_dataset", "trajectories"), ("eval_dataset", "eval_trajectories")
        trajectories = encode(names[0], train_dataset, trajectories)
        if trajectories is None:
            raise ValueError("there is nothing to train on: pass trajectories= or train_dataset=")
        held_out = encode(names[1], eval_dataset, eval_trajectories)
        # After the rows are checked: large weights take minutes to load.
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self._policy = CausalLMPolicy(model)
        self._proposal = args.proposal
        self._sync_every, self._ema_decay = args.sync_every, args.ema_decay
        self._trajectories = trajectories
        self._dataset = self._readable(trajectories)
        self._loss = self._make_loss(args, importance_weights or ImportanceWeights())
        self._collate = partial(
            collate,
            layout=args.layout,
            pad_token_id=getattr(processing_class, "pad_token_id", None) or 0,
            multiple_of=args.pad_to_multiple_of,
        )
        super().__init__(
            model=model,
            args=args,
            train_dataset=self._dataset,
            eval_dataset=None if held_out is None else self._readable(held_out),
            data_collator=self._collate,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        check_engine(self, self._loss.importance_weights, whole=args.proposal != "current")
        self._plan = plan_updates(
            self._dataset.sizes,
            args,
            processes=self.accelerator.num_processes,
            process=self.accelerator.process_index,
        )
        self._parameters = sum(p.numel() for p in model.parameters())

    @property
    def _syncs_reference(self) -> bool:
        """Whether the reference is theta at the last sync."""
        return self._loss.importance_weights.reference == "synced"

    def _readable(self, trajectories: TensorDictBase) -> TrajectoryDataset:
        """Trajectories that the model can read, in which each token carries its position."""
        check_packed(trajectories)
        self._policy.check(trajectories)
        placed = trajectories.copy()
        return TrajectoryDataset(placed.set(PLACE, torch.arange(len(placed))))

    def _make_loss(
        self, args: ImportanceWeightedConfig, weights: ImportanceWeights
    ) -> ImportanceWeightedMLE:
        segments = Segments.of(self._trajectories, mask=self._trajectories.get(ASSISTANT_MASK))
        check_valid_steps(segments, repr(ASSISTANT_MASK))
        if args.proposal != "reference" or weights.kl:
            if self._trajectories.is_locked:
                raise ValueError("the trajectories are locked: pass trajectories.copy()")
            if weights.reference == "synced" and args.reference is None:
                needs = "reference='synced' and a sync_every, such as 50, in args"
                raise ValueError(f"{weights} divide by the policy at the last sync: set {needs}")
            weights.check_overflow(int(segments.lengths.max()))
            if weights.scored:
                judged = len(self._dataset.undrawn) > 0
                check_judges(self._dataset.judges if judged else self._trajectories)
            for name in weights.from_batch:
                if self._trajectories.get(name, default=None) is None:
                    missing = f"{weights} read {name!r}, which the trajectories lack"
                    raise ValueError(f"{missing}: {written_by(name)}")
        loss = token_loss(
            self._policy,
            importance_weights=weights,
            proposal=args.proposal,
            reference=args.reference,
            length_normalize=args.length_normalize,
            reduction="sum",
            normalize_data_weights=args.normalize_data_weights,
            hold_q=False,
        )
        check_weights(loss, self._trajectories)
        return loss

    # ---- data ----

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches of this process as planned; accelerate does not distribute them again."""
        args, workers = self.args, self.args.dataloader_num_workers
        loader: Any = DataLoader(
            self._dataset,
            batch_sampler=self._plan,
            collate_fn=self._collate,
            num_workers=workers,
            multiprocessing_context=args.dataloader_multiprocessing_context if workers else None,
            persistent_workers=workers > 0 and args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor if workers else None,
        )
        # transformers calls it when an epoch begins.
        loader.set_epoch = self._plan.set_epoch
        return loader

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The micro-batches of the next update, with their weights, and what it is divided by."""
        update = self.state.global_step
        cached = self._cached
        if cached is not None and update >= cached["until"]:
            stop = min(update + (self.args.sync_every or 1), self.state.max_steps)
            self._weigh(cached, range(update, stop))
        batches = [next(epoch_iterator) for _ in range(num_batches)]
        draws = torch.zeros((), dtype=torch.float64, device=device)
        for batch in batches:
            if cached is not None:
                key = REF_LOG_PROB if self._syncs_reference else IMPORTANCE_WEIGHT
                batch.set(key, cached["weights"][batch.get(PLACE)])
            segments = self._loss.segments(batch)
            share = self._loss.share(batch, segments)
            weight = self._loss.data_weight(batch, segments, share)
            draws += self._loss.divisor(share, weight).to(device)
        self._measures.begin()
        return batches, self.accelerator.reduce(draws, "sum")

    def _prepare_inputs(self, inputs: Any) -> Any:
        return inputs.to(self.args.device)

    def floating_point_ops(self, inputs: Any) -> int:
        """6 x parameters x tokens of a batch, the usual estimate."""
        return 6 * self._parameters * int(inputs.get(TOKENS).numel())

    def _track_num_input_tokens(self, inputs: Any) -> None:
        if self.args.include_num_input_tokens_seen != "no":
            counted = torch.ones_like(inputs.get(TOKENS))
            if self.args.include_num_input_tokens_seen == "non_padding":
                counted = inputs.get(ATTENTION_MASK)
            tokens = counted.sum().to(self.args.device)
            self.state.num_input_tokens_seen += int(self.accelerator.reduce(tokens, "sum"))

    # ---- loss ----

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """The part of a micro-batch in the loss of its update, see :meth:`_part_of_update`."""
        self._policy.model = model
        terms = self._loss.terms(inputs)
        known = math.nan if self._cached is None else float(self._cached["clip_fraction"])
        score = inputs.get(STANDARD_SCORE, default=None)
        loss = self._part_of_update(terms, num_items_in_batch, known, score)
        return (loss, self._loss.summary(terms)) if return_outputs else loss

    def _weigh(self, cached: TensorDict, updates: range) -> None:
        """Cache the weights of coming updates, by one pass of q over their trajectories.

        They are those of the whole window, in which q does not move. A synced reference does not
        either: then the pass is its own, and its log-probs are cached.
        """
        batches = [batch for number in updates for batch in self._plan.update(number)]
        window = self._dataset.drawn([*chain.from_iterable(batches)])
        positions = [self._dataset.positions(batch) for batch in batches]
        place = {t: n for n, t in enumerate(sorted({*chain.from_iterable(positions)}))}
        log_q = self._log_q(window, [[place[t] for t in batch] for batch in positions])
        cached["until"] = torch.tensor(updates.stop)
        if self._syncs_reference:
            cached["weights"][window.get(PLACE)] = log_q
            return
        segments = self._loss.segments(window)
        share = self._loss.share(window, segments)
        undrawn = self._dataset.undrawn
        if self._loss.importance_weights.scored and len(undrawn):
            # They choose the exponent of the window.
            judges, batches = self._dataset.judges, self._in_batches(range(len(undrawn)))
            judge(self._loss, judges, self._log_q(judges, batches))
        weights = write_weights(window, self._loss, log_q, segments=segments, share=share)
        cached["weights"][window.get(PLACE)] = window.get(IMPORTANCE_WEIGHT)
        cached["clip_fraction"] = (share * weights.clipped).sum() / share.sum()
        choice = {} if weights.choice is None else weights.choice._asdict()
        self._measures.choice = {name: float(x) for name, x in choice.items()}

    def _log_q(self, trajectories: TensorDictBase, batches: Sequence[Sequence[int]]) -> Tensor:
        """log q of each token.

        Before the first update q is the reference, by the same batches. Later batches hold
        trajectories of similar length, which need less padding; then rounding may differ.
        """
        begins = self.state.global_step == 0
        if begins and self._at_reference:
            return trajectories.get(REF_LOG_PROB)
        sizes = lengths(trajectories)
        rows = max(len({*batch}) * int(sizes[[*batch]].max()) for batch in batches if batch)
        inputs = trajectories.select(*self._policy.in_keys, TRAJ_IDS)
        with nullcontext() if self._shards is None else self._shards.swapped():
            forward = self._forward(inputs, batches if begins else (), rows=rows)
            return forward.log_prob().float()

    def _in_batches(self, positions: Sequence[int]) -> list[list[int]]:
        width = self.args.per_device_eval_batch_size
        return [list(positions[at : at + width]) for at in range(0, len(positions), width)]

    # ---- start ----

    def _start(self) -> None:
        """Prepare the reference and q, which need the engine, when training begins."""
        if self._loss.needs_reference and not self._syncs_reference:
            cache = Path(self.args.reference_cache or Path(str(self.args.output_dir)) / REFERENCE)
            batches = [self._dataset.positions(batch) for batch in self._plan.epoch(0)]
            if self._loss.importance_weights.scored:
                batches += self._in_batches(self._dataset.undrawn.tolist())
            annotated = self._dataset.trajectories
            self._annotate(self._forward(annotated, batches), cache)
            self._trajectories.set(REF_LOG_PROB, annotated.get(REF_LOG_PROB))
        if self.args.proposal == "lagged":
            self._follow(EMA, decay=self.args.ema_decay or 0.0)
        if self.args.proposal in ("cached", "lagged") or self._syncs_reference:
            self._loss.awaits_sync = False
            self._cached = TensorDict(
                weights=torch.ones(len(self._trajectories)),
                until=torch.tensor(self.state.global_step),
                clip_fraction=torch.tensor(math.nan, dtype=torch.float64),
            )
            self.shared_states["weights"] = self._cached
        self.restore()

    def settings(self) -> dict[str, Any]:
        """Settings that a checkpoint belongs to."""
        own: dict[str, Any] = {}
        if self.args.normalize_data_weights:
            own["normalize_data_weights"] = True
        if self._loss.importance_weights.scored:
            own["scores"] = fingerprint({"scores": self._trajectories.get(STANDARD_SCORE)})
        return {
            **super().settings(),
            **own,
            "layout": self.args.layout,
            "pad_to_multiple_of": self.args.pad_to_multiple_of,
            "plan": self._plan.settings(),
        }

    # ---- evaluation ----

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Mean negative log-likelihood of the held-out trajectories, by trajectory and by token."""
        held_out: Any = self.eval_dataset
        if not isinstance(held_out, TrajectoryDataset) or eval_dataset is not None:
            raise ValueError("pass held-out trajectories as eval_trajectories=...")
        batches = self._in_batches(held_out.positions(range(len(held_out))))
        log_prob = self._forward(held_out.trajectories, batches).log_prob()
        names = (f"{metric_key_prefix}_loss", f"{metric_key_prefix}_token_loss")
        means = negative_log_likelihood(self._loss, held_out.trajectories, log_prob)
        metrics = dict(zip(names, means, strict=True))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def _encoded(
    names: tuple[str, str], rows: Any, trajectories: Any, tokenizer: Any, max_length: int | None
) -> TensorDictBase | None:
    """Trajectories as they are given, or those of the rows that are correct."""
    if rows is None:
        return trajectories
    name, instead = names
    if trajectories is not None:
        raise ValueError(f"{name} and {instead}: pass one of them")
    if isinstance(rows, TensorDictBase) or hasattr(rows, "trajectories"):
        raise TypeError(f"{name} takes rows of text; pass token trajectories as {instead}=")
    if name == "eval_dataset" and isinstance(rows, Mapping):
        parts = ", ".join(map(str, rows))
        raise TypeError(f"{name} has several parts ({parts}): pass the rows of one of them")
    if tokenizer is None:
        raise ValueError(f"{name} has rows of text: pass the tokenizer as processing_class=")
    if not (isinstance(rows, list) and isinstance(next(iter(rows), None), Row)):
        rows = read(rows)
    encoded = tokenize(rows, tokenizer, max_length=max_length).trajectories
    return encoded if encoded.get(CORRECT, default=None) is None else correct_only(encoded)
