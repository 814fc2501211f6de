"""TRL's SFTTrainer with the library's loss: SFT and importance-weighted SFT of a causal LM.

from iwsft.language.trl import ImportanceWeightedSFTTrainer

trainer = ImportanceWeightedSFTTrainer("Qwen/Qwen2.5-0.5B", args=SFTConfig("runs/trl"),
                                       train_dataset=dataset, proposal="current")
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from pathlib import Path
from typing import Any

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor, nn

from iwsft.chain import check_chain
from iwsft.datasets.text.names import objection
from iwsft.datasets.text.rows import ASSISTANT, is_number, turn_weight
from iwsft.extras import named
from iwsft.language.batches import collate
from iwsft.language.config import check_engine, check_q
from iwsft.language.loss import check_weights, token_loss
from iwsft.language.weighted import REFERENCE, WeightedTrainer
from iwsft.objective import Proposal, Terms
from iwsft.policies.causal_lm import CausalLMPolicy
from iwsft.policies.causal_lm_families import check_switch
from iwsft.policies.log_prob import evaluating, noise_watch
from iwsft.presets import ImportanceWeights
from iwsft.proposals import EMA, HardSync
from iwsft.trajectory import (
    ASSISTANT_MASK,
    ATTENTION_MASK,
    DATA_WEIGHT,
    REF_LOG_PROB,
    TOKENS,
    TRAJ_IDS,
    from_steps,
    lengths,
    select,
)
from iwsft.validation import beyond_float32

with named():
    from datasets import Dataset  # type: ignore[import-untyped]
    from trl import SFTTrainer, pack_dataset

# Position of a row's first token among all tokens of the dataset; in a batch, that of each token.
_PLACE = "place"
# Column with the data weight of a row.
_WEIGHT = "weight"
# Label of a token that is not trained.
_IGNORED = -100


class ImportanceWeightedSFTTrainer(WeightedTrainer, SFTTrainer):
    """TRL's ``SFTTrainer`` with :class:`~iwsft.ImportanceWeightedMLE` as the training loss.

    TRL does everything before the loss, log-probs and evaluation included. A trajectory is a row
    before packing, with the tokens that TRL trains. The reference is the model as it is given,
    without its PEFT adapters. Checkpoints are those of
    :class:`~iwsft.language.ImportanceWeightedTrainer`.

    ``proposal``, ``sync_every``, ``ema_decay``, ``length_normalize`` and ``importance_weights`` are
    as for :class:`~iwsft.language.ImportanceWeightedTrainer`. With ``"cached"``, too, q is a
    float32 copy of the trained parameters, and each batch runs forward once more. All other
    arguments are those of SFTTrainer.

    A warning counts the rows that ``max_length`` of SFTConfig cuts, or of which it leaves nothing.

    A ValueError says that settings of TRL make another loss or cut trajectories into parts, that
    rows are not all there at the start, or that settings do not fit together.
    """

    args: Any
    model: Any
    train_dataset: Any
    _signature_columns: Any

    def __init__(
        self,
        model: Any,
        args: Any = None,
        *,
        proposal: Proposal = "current",
        sync_every: int | None = None,
        ema_decay: float | None = None,
        length_normalize: bool = True,
        importance_weights: ImportanceWeights | None = None,
        **settings: Any,
    ) -> None:
        check_q(proposal, sync_every, ema_decay)
        check_chain("importance_weights", importance_weights)
        _check(args, settings)
        weights = importance_weights
        if weights is not None and (weights.reference == "synced" or weights.reads):
            lacks = sorted(weights.reads) or ["the log-probs of the last sync"]
            problem = f"{weights} need {', '.join(lacks)}, which TRL's batches do not have"
            raise ValueError(f"{problem}; use ImportanceWeightedTrainer")
        self._proposal, self._sync_every, self._ema_decay = proposal, sync_every, ema_decay
        super().__init__(model=model, args=args, **settings)
        if self._is_vision_dataset:
            raise ValueError("rows with images are not tokens alone: leave them out")
        configs: Any = getattr(self.model, "peft_config", {})
        if any(config.is_prompt_learning for config in configs.values()):
            raise ValueError("prompt learning adds tokens to a trajectory: use LoRA")
        self._policy = _FusedPolicy(self.model)
        # The weights are computed here, from the log-probs that TRL computes.
        self._loss = token_loss(
            self._policy,
            importance_weights=importance_weights,
            proposal="reference" if proposal == "reference" else "lagged",
            length_normalize=length_normalize,
            reduction="sum",
            hold_q=False,
        )
        check_engine(self, self._loss.importance_weights, whole=proposal == "reference")
        self._collate = partial(collate, pad_token_id=self._tokenizer.pad_token_id or 0)
        self._read_dataset()
        self._tell_of_cuts(len(settings["train_dataset"]))
        self.data_collator: Any = _WithPlaces(self.data_collator, self._trajectories)

    def _prepare_dataset(
        self, dataset: Any, tokenizer: Any, args: Any, packing: bool, make: Any, name: str
    ) -> Any:
        """Prepare a dataset as TRL does; packed rows keep their weights, one for each token."""
        prepare = partial(super()._prepare_dataset, dataset, tokenizer, args)
        if name != "train" or not packing or _WEIGHT not in dataset.column_names:
            return prepare(packing, make, name)
        rows = prepare(False, make, name)
        rows = rows.map(lambda row: {DATA_WEIGHT: [row[_WEIGHT]] * len(row["input_ids"])})
        rows = rows.select_columns(["input_ids", "labels", DATA_WEIGHT])
        rows = pack_dataset(rows, args.max_length, args.packing_strategy)
        return rows.shuffle(seed=args.seed) if args.shuffle_dataset else rows

    def _read_dataset(self) -> None:
        """Find the trajectories of the prepared dataset, and number its tokens."""
        ids, labels = self.train_dataset["input_ids"], self.train_dataset["labels"]
        sizes = [len(row) for row in ids]
        packed = "seq_lengths" in self.train_dataset.column_names
        parts = chain.from_iterable(self.train_dataset["seq_lengths"]) if packed else sizes
        tokens_of = torch.tensor([*parts], dtype=torch.int64)
        trajectory = torch.arange(len(tokens_of)).repeat_interleave(tokens_of)
        check_switch(self.model.config, trajectory)
        trained = torch.tensor([*chain.from_iterable(labels)], dtype=torch.int64) != _IGNORED
        # Nothing predicts the first token of a trajectory.
        trained[tokens_of.cumsum(0) - tokens_of] = False
        if not bool(trained.any()):
            most = f"within max_length={self.args.max_length} of SFTConfig"
            raise ValueError(f"there is no token to train on {most}: all labels are -100")
        if self._proposal != "reference":
            self._loss.importance_weights.check_overflow(int(trajectory[trained].bincount().max()))
        tokens = torch.tensor([*chain.from_iterable(ids)])
        steps: dict[NestedKey, Tensor] = {
            TOKENS: tokens,
            ATTENTION_MASK: torch.ones_like(tokens, dtype=torch.bool),
            ASSISTANT_MASK: trained,
        }
        columns = self.train_dataset.column_names
        if DATA_WEIGHT in columns or _WEIGHT in columns:
            if DATA_WEIGHT in columns:
                weight = torch.tensor([*chain.from_iterable(self.train_dataset[DATA_WEIGHT])])
            else:
                weight = torch.tensor([*self.train_dataset[_WEIGHT]])
                weight = weight.repeat_interleave(torch.tensor(sizes))
            steps[DATA_WEIGHT] = weight.float() * trained
        self._trajectories = from_steps(steps, trajectory)
        rows = select(self._trajectories, trajectory[trained].unique())
        check_weights(self._loss, rows, "the column 'weight'")
        self._longest = max(sizes)
        starts = torch.tensor([0, *sizes[:-1]]).cumsum(0).tolist()
        self.train_dataset = self.train_dataset.add_column(_PLACE, starts)

    def _tell_of_cuts(self, rows: int) -> None:
        """Warn of rows that TRL has cut, or left out, which it does in silence."""
        trained = self._trajectories.get(TRAJ_IDS)[self._trajectories.get(ASSISTANT_MASK)].unique()
        sizes, most = lengths(self._trajectories)[trained], self.args.max_length
        longest = 0 if most is None else int((sizes == most).sum())
        told, left_out = [], rows - len(sizes)
        if left_out > 0:
            told.append(f"leaves out {left_out} of {rows} rows, of which it trains nothing")
        if longest:
            told.append(f"cuts rows to max_length={most}, which {longest} reach")
        if told:
            way_out = "" if most is None else "; raise max_length in SFTConfig, or set it to None"
            warnings.warn(f"TRL {', and '.join(told)}{way_out}", stacklevel=3)

    def _set_signature_columns_if_needed(self) -> None:
        """Keep the column of places in the dataset."""
        super()._set_signature_columns_if_needed()
        self._signature_columns = [*{*self._signature_columns, _PLACE}]

    def settings(self) -> dict[str, Any]:
        """Settings that a checkpoint belongs to."""
        return {**super().settings(), "processes": self.accelerator.num_processes}

    def _start(self) -> None:
        """Prepare the reference and q, which need the engine, when training begins."""
        if self._loss.needs_reference:
            sizes = lengths(self._trajectories)
            # As many tokens as a batch of the training has.
            width = self.args.per_device_train_batch_size * self._longest // int(sizes.max())
            batches = [part.tolist() for part in sizes.argsort(stable=True).split(width)]
            self._annotate(
                self._forward(self._trajectories, batches), Path(self.args.output_dir) / REFERENCE
            )
        if self._proposal == "lagged":
            self._follow(EMA, decay=self._ema_decay)
        elif self._proposal == "cached":
            self._follow(HardSync, every=self._sync_every)
            self.own_states["sync"] = self._q
        self.restore()

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return the micro-batches of the next update, and the number of its trajectories."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        mine = sum(len(self._segments(batch)[1].unique()) for batch in batches)
        self._measures.begin()
        draws = torch.tensor(float(mine), device=device)
        return batches, self.accelerator.reduce(draws, "sum")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the part of a micro-batch in our loss of its update; in evaluation TRL's loss."""
        places = inputs.pop(_PLACE, None)
        if places is None or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        noisy = noise_watch(model, places.device)
        outputs: list[Any] = []
        hook = model.register_forward_hook(lambda *call: outputs.append(call[-1]))
        try:
            # Its metrics are logged; its loss is not used.
            super().compute_loss(model, inputs, False, num_items_in_batch)
        finally:
            hook.remove()
        log_prob = outputs[0].log_probs
        mask, ids = self._segments({**inputs, _PLACE: places})
        if not len(ids):
            return 0.0 * log_prob.sum()
        log_q = log_prob.detach()
        if self._shards is not None or (self._proposal == "current" and noisy()):
            log_q = self._log_prob_of_q(model, inputs)
        terms = self._terms(log_prob[mask].float(), log_q[mask].float(), ids, places[:, 1:][mask])
        return self._part_of_update(terms, num_items_in_batch, float("nan"))

    def _segments(self, batch: Any) -> tuple[Tensor, Tensor]:
        """The trained tokens of a batch, bool ``[B, T - 1]``, and the number of each one's row."""
        places = batch[_PLACE][:, 1:]
        mask = (batch["labels"][:, 1:] != _IGNORED) & (places >= 0)
        chosen = places[mask]
        of = self._trajectories.get(TRAJ_IDS)[chosen.cpu()].to(chosen.device)
        start = torch.ones_like(chosen, dtype=torch.bool)
        start[1:] = (of[1:] != of[:-1]) | (chosen[1:] <= chosen[:-1])
        return mask, start.cumsum(0) - 1

    @torch.no_grad()
    def _log_prob_of_q(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """Log-probs under q, without dropout and other noise."""
        swapped = nullcontext() if self._shards is None else self._shards.swapped()
        with evaluating(model), swapped:
            log_prob: Tensor = model(**inputs, fused_lm_head=True).log_probs
        return log_prob

    def _terms(self, log_prob: Tensor, log_q: Tensor, ids: Tensor, places: Tensor) -> Terms:
        """Terms of the trained tokens of a batch, which are back to back."""
        batch = TensorDict({}, batch_size=ids.shape).set(TRAJ_IDS, ids)
        segments = self._loss.segments(batch)
        share = self._loss.share(batch, segments)
        weight = self._trajectories.get(DATA_WEIGHT, default=None)
        if weight is not None:
            weight = weight[places.cpu()].to(log_prob.device)
            batch.set(DATA_WEIGHT, weight)
        reference = None
        if self._loss.needs_reference:
            reference = self._trajectories.get(REF_LOG_PROB)[places.cpu()].to(log_prob.device)
        base = reference
        if self._proposal == "reference":
            log_q = base = torch.zeros_like(log_prob)
        weights = self._loss.weigh(batch, log_q, reference=base, segments=segments, share=share)
        return Terms(segments, share, log_prob, *weights[:2], reference, weight)


class _FusedPolicy(CausalLMPolicy):
    """The model with TRL's output layer, so that the reference is rounded as the training is."""

    def log_prob(self, trajectories: TensorDictBase) -> Tensor:
        """log p of the trained tokens of a padded batch, ``[B, T]``, 0 elsewhere."""
        ids = trajectories.get(TOKENS)
        output = self.model(
            input_ids=ids,
            attention_mask=trajectories.get(ATTENTION_MASK),
            labels=ids.masked_fill(~trajectories.get(ASSISTANT_MASK), _IGNORED),
            use_cache=False,
            fused_lm_head=True,
        )
        return nn.functional.pad(output.log_probs, (1, 0))


def _check(args: Any, settings: dict[str, Any]) -> None:
    """Refuse what changes the loss, or what it can't read, before anything is prepared."""
    for name, value, usual in (
        ("loss_type", getattr(args, "loss_type", "nll"), "nll"),
        ("compute_loss_func", settings.get("compute_loss_func"), None),
        ("label_smoothing_factor", getattr(args, "label_smoothing_factor", 0), 0),
    ):
        if value != usual:
            why = "iwsft weighs the log-likelihood of whole trajectories"
            raise ValueError(f"{name}={value!r} is another loss: {why}; leave it {usual!r}")
    if getattr(args, "packing", False) and args.packing_strategy != "bfd":
        raise ValueError(
            f"packing_strategy={args.packing_strategy!r} cuts trajectories into parts; use 'bfd'"
        )
    if getattr(args, "auto_find_batch_size", False):
        raise ValueError("auto_find_batch_size starts again with another reference; set the size")
    if not isinstance(settings.get("train_dataset"), Dataset):
        raise ValueError("the reference needs all rows at the start: pass a datasets.Dataset")
    rows, held_out = settings["train_dataset"], settings.get("eval_dataset")
    parts = held_out.values() if isinstance(held_out, dict) else [held_out]
    # TRL ends in a StopIteration.
    if not len(rows) or any(isinstance(part, Dataset) and not len(part) for part in parts):
        name = "eval_dataset" if len(rows) else "train_dataset"
        raise ValueError(f"there is no row in {name}")
    _check_columns(rows)
    _check_masks(rows, by_completion=getattr(args, "completion_only_loss", None))


def _check_columns(rows: Dataset) -> None:
    """Refuse a weight that is not a number, and columns beside it that TRL would leave unread."""
    usual = {"correct": True, "count": 1, "ref_log_probs": None}
    for name in rows.column_names:
        for number, value in enumerate(rows[name]):
            if value not in (None, usual[name]) if name in usual else objection(name, value):
                raise ValueError(
                    f"row {number}: TRL does not read {name!r} ({value!r:.40}); use "
                    "ImportanceWeightedTrainer, or drop such rows, or the column"
                )
    for number, weight in enumerate(rows[_WEIGHT] if _WEIGHT in rows.column_names else ()):
        if not is_number(weight):
            raise ValueError(f"row {number}: weight must be a finite number, it is {weight!r:.60}")
        if bool(beyond_float32(torch.tensor(weight, dtype=torch.float64))):
            problem = f"the weight {weight:g} is beyond float32; scale all by one factor"
            raise ValueError(f"row {number}: {problem}")
    for column in {"messages", "completion"} & {*rows.column_names}:
        for number, turns in enumerate(rows[column]):
            if isinstance(turns, str) or not turns or turns[0].keys() <= {"role", "content"}:
                # A column has one type, with the same keys in all rows.
                break
            if any(turn_weight(turn) != 1 for turn in turns if turn["role"] == ASSISTANT):
                raise ValueError(
                    f"row {number}: TRL does not read the weights of turns; use "
                    "ImportanceWeightedTrainer, or give the row a 'weight'"
                )


def _check_masks(rows: Dataset, *, by_completion: bool | None) -> None:
    """Refuse masks of tokens that TRL does not read: it would train on what they leave out."""
    way_out = {"attention_mask": "take the padding out of the rows"}
    if not by_completion:
        way_out["completion_mask"] = "set completion_only_loss=True in SFTConfig"
    names = {*rows.column_names}
    for name in way_out.keys() & names if "input_ids" in names else ():
        for number, row in enumerate(rows.select_columns([name, *{"labels"} & names])):
            left_out = [not kept for kept in row[name]]
            if name == "attention_mask":
                # What follows padding reads it.
                left_out = [*accumulate(left_out, max)]
            trained = [label != _IGNORED for label in row.get("labels") or left_out]
            if any(out and used for out, used in zip(left_out[1:], trained[1:], strict=True)):
                problem = f"row {number}: TRL trains on tokens that {name!r} leaves out"
                raise ValueError(f"{problem}; {way_out[name]}")


@dataclass
class _WithPlaces:
    """A collator of TRL's rows, which here also places each token among all those of the dataset.

    A ValueError says that it moves tokens, changes them, or trains others than the dataset says.
    """

    collator: Any
    trajectories: TensorDictBase

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.collator(rows)
        if all(_PLACE in row for row in rows):
            own = [row[_PLACE] + torch.arange(len(row["input_ids"])) for row in rows]
            if len(batch["labels"]) < len(rows):
                own = [torch.cat(own)]
            places = nn.utils.rnn.pad_sequence(own, batch_first=True, padding_value=-1)
            spare = batch["labels"].shape[1] - places.shape[1]
            batch[_PLACE] = nn.functional.pad(places, (0, spare), value=-1)
            self._check(batch)
        return batch

    def _check(self, batch: dict[str, Any]) -> None:
        ids, labels, places = batch["input_ids"], batch["labels"], batch[_PLACE]
        tokens, trained = (self.trajectories.get(key) for key in (TOKENS, ASSISTANT_MASK))
        known = places >= 0
        kept = ids.shape == places.shape and torch.equal(ids[known], tokens[places[known]])
        # Nothing predicts what comes first in a row.
        known[:, 0] = False
        if not kept or bool((known & (labels != _IGNORED) & ~trained[places]).any()):
            problem = f"{type(self.collator).__name__} moves or changes tokens, or trains others"
            way_out = "a data_collator must pad the rows on the right, in their order, and no more"
            raise ValueError(f"{problem} than the dataset says: {way_out}")
