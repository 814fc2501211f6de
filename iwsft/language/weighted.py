"""What trainers with the library's loss share: reference, a q that follows, measures, checks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from iwsft.distributed import gathered
from iwsft.extras import named
from iwsft.forward_pass import ForwardPass
from iwsft.language.batches import token_fingerprint
from iwsft.language.config import OPTIMIZER_SETTINGS, warn_of_half_precision
from iwsft.language.loss import Measures
from iwsft.language.saving import CheckpointedTrainer
from iwsft.language.shards import Shards
from iwsft.objective import LOSS, ImportanceWeightedMLE, Proposal, Terms
from iwsft.policies.causal_lm import CausalLMPolicy
from iwsft.proposals import EMA, HardSync
from iwsft.reference import adapter_parts, cached_reference, write_reference
from iwsft.trajectory import GIVEN_REF_LOG_PROB

with named():
    from transformers import TrainerCallback

REFERENCE = "reference"


class WeightedTrainer(CheckpointedTrainer):
    """A Trainer whose loss is :class:`~iwsft.ImportanceWeightedMLE`; subclasses make the terms."""

    # The loss is divided by the multiplicities of the whole update.
    loss_is_scaled_for_ga = True
    _policy: CausalLMPolicy
    _loss: ImportanceWeightedMLE
    _trajectories: TensorDictBase
    # What makes a batch of trajectories.
    _collate: Callable[..., TensorDict]
    _proposal: Proposal
    _sync_every: int | None
    _ema_decay: float | None
    # A lagged q, and what moves it.
    _shards: Shards | None = None
    _q: EMA | HardSync | None = None
    # Whether the policy at the start of training is the reference, bit for bit.
    _at_reference: bool = False

    def __init__(self, **settings: Any) -> None:
        self._measures = Measures()
        self._finite = torch.tensor(True)
        callbacks = [*(settings.pop("callbacks", None) or []), _Hooks(self)]
        super().__init__(callbacks=callbacks, **settings)
        args: Any = self.args
        # torchrl sets "spawn", with which workers run a script without a main guard again.
        if args.dataloader_num_workers and sys.platform == "linux":
            start = args.dataloader_multiprocessing_context or "fork"
            args.dataloader_multiprocessing_context = start
        warn_of_half_precision(self)

    def _start(self) -> None:
        """Prepare the reference and q, which need the engine, when training begins."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Settings that a checkpoint belongs to."""
        return {
            "proposal": self._proposal,
            "sync_every": self._sync_every,
            "ema_decay": self._ema_decay,
            "length_normalize": self._loss.length_normalize,
            "importance_weights": repr(self._loss.importance_weights),
            "optimizer": {name: str(getattr(self.args, name)) for name in OPTIMIZER_SETTINGS},
            "trajectories": self._fingerprint,
        }

    @cached_property
    def _fingerprint(self) -> str:
        return token_fingerprint(self._trajectories)

    def _forward(
        self, trajectories: TensorDictBase, batches: Sequence[Sequence[int]], **settings: Any
    ) -> ForwardPass:
        """A pass over batches, by the positions of their trajectories."""
        self._policy.model = self.model_wrapped
        settings |= {"collate": self._collate, "device": self.accelerator.device, "shared": True}
        return ForwardPass(self._policy, trajectories, batches, **settings)

    def _annotate(self, forward: ForwardPass, cache: Path) -> None:
        """Write ``ref_log_prob`` into the trajectories; a resumed run reads that of its start."""
        if self.reference_key is None:
            self.reference_key = write_reference(forward, cache=cache)
            given = forward.trajectories.get(GIVEN_REF_LOG_PROB, default=None)
            self._at_reference = given is None and not adapter_parts(self._policy)
        else:
            cached_reference(forward.trajectories, self.reference_key, cache=cache)

    def _follow(self, updater: Callable[..., EMA | HardSync], **settings: Any) -> None:
        """Begin with q = theta, in shards that an updater moves and that checkpoints contain."""
        self._shards = Shards(self.model_wrapped, optimizer=self.optimizer)
        self._q = updater(self._loss, holder=self._shards, **settings)
        self.own_states["q"] = self._shards

    def _part_of_update(
        self, terms: Terms, draws: Any, clip_fraction: float, score: Tensor | None = None
    ) -> Tensor:
        """Measure a micro-batch; its part in the loss of its update, divided by ``draws``.

        It is multiplied by the number of processes, since engines average gradients over them.
        """
        loss = self._loss.summary(terms)[LOSS]
        self._measures.add(terms, clip_fraction, score)
        loss = loss * (self.accelerator.num_processes / draws).to(loss.dtype)
        self._finite = self._finite.to(loss.device) & loss.isfinite()
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Write a log line, with the means of the updates since the last one."""
        if "loss" in logs:
            self.check_finite()
            logs |= self._measures.collect(self._loss, gathered)
        super().log(logs, start_time)

    def check_finite(self) -> None:
        """Raise FloatingPointError once a loss was infinite or NaN."""
        if not bool(self._finite):
            raise FloatingPointError(
                f"the loss is no longer finite, at update {self.state.global_step} or just before: "
                f"lower learning_rate ({self.args.learning_rate:g}) or clip the weights"
            )


class _Hooks(TrainerCallback):
    """Calls the trainer when its engine is ready and after each update."""

    def __init__(self, trainer: WeightedTrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._trainer._start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if self._trainer._q is not None:
            self._trainer._q.step()
