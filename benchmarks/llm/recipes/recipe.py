"""What every recipe offers: its settings, a model with labelled rows, and a test."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from iwsft.datasets.text.rows import Row
from iwsft.weights import (
    ClipRatio,
    ClipWeight,
    ImportanceWeights,
    SelfNormalize,
    Temperature,
)

Preset = Literal["recipe", "paper_llm", "authors_llm"]
# "score", "interval", "n", and further numbers by name.
Evaluation = Mapping[str, Any]


@dataclass(frozen=True)
class Defaults:
    """Settings of a recipe, plain values.

    Attributes:
        learning_rate: of AdamW, at its peak.
        batch_size: draws of an update, over all ranks and accumulation steps.
        max_steps: updates; this, or ``epochs``.
        epochs: passes over the curated data.
        warmup: updates of the linear warm-up; below 1, their share of all updates.
        weight_decay: of AdamW.
        adam_beta1: of AdamW.
        adam_beta2: of AdamW.
        scheduler: after the warm-up, in transformers' words.
        max_grad_norm: gradients are clipped to this norm.
        max_length: tokens of a row at most; None cuts nothing.
        cuts: percentiles of the scores of D+ that SFT and iw-SFT keep; empty keeps all once.
        quality_cuts: those of D_Q+, for SFT(Q).
        sync_every: Q, updates between hard syncs of q.
        ema_decay: of q as a moving average, an update.
        length_normalize: divide a trajectory's log-probability by its length.
        preset: of the weights; ``"recipe"`` is the chain of the four fields below.
        temperature: k of g(x) = k x.
        reduce: along the trajectory.
        max_weight: a larger weight is clipped to it.
        self_normalize: divide the weights by their mean over the batch.
        step_clip: of the ratio of a step, in the per-step variant.
        micro_batch_size: draws of a forward pass on a device; None takes as many as there are.
        layout: of the batches.
        precision: of the matrix products.
        gradient_checkpointing: recompute activations in the backward pass.
    """

    learning_rate: float
    batch_size: int
    max_steps: int | None = None
    epochs: float | None = None
    warmup: float = 0.05
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    scheduler: str = "cosine"
    max_grad_norm: float = 1.0
    max_length: int | None = None
    cuts: tuple[float, ...] = ()
    quality_cuts: tuple[float, ...] = (0, 50, 75)
    sync_every: int = 50
    ema_decay: float = 0.99
    length_normalize: bool = True
    preset: Preset = "recipe"
    temperature: float = 1.0
    reduce: Literal["sum", "mean"] = "mean"
    max_weight: float = 16.0
    self_normalize: bool = False
    step_clip: tuple[float, float] = (0.2, 1.8)
    micro_batch_size: int | None = None
    layout: Literal["padded", "packed"] = "padded"
    precision: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError(
                f"max_steps={self.max_steps} and epochs={self.epochs}: set one of them, the other "
                "None"
            )

    def importance_weights(self, *, per_step: bool = False) -> ImportanceWeights:
        """The chain of weights of ``preset``.

        Args:
            per_step: that of the per-step variant instead: each step's ratio, clipped to
                ``step_clip``, weighs its own loss.
        """
        if per_step:
            return ImportanceWeights(step=(ClipRatio(*self.step_clip),), reduce=None)
        if self.preset == "paper_llm":
            return ImportanceWeights.paper_llm()
        if self.preset == "authors_llm":
            return ImportanceWeights.authors_llm()
        last = (SelfNormalize(),) if self.self_normalize else ()
        return ImportanceWeights(
            step=(Temperature(self.temperature),),
            reduce=self.reduce,
            trajectory=(ClipWeight(max=self.max_weight), *last),
        )


@dataclass(frozen=True)
class Prepared:
    """What a recipe trains: a model and rows.

    Attributes:
        model: what ``from_pretrained`` loads, a folder or a hub id.
        rows: all labelled rows, with ``score`` and ``correct`` where the recipe has them.
        score_name: of the test's score, in tables.
        load_kwargs: further arguments of :func:`benchmarks.llm.models.load`.
        notes: facts for the report, by name.
    """

    model: str
    rows: list[Row]
    score_name: str
    load_kwargs: Mapping[str, Any] = field(default_factory=dict)
    notes: Mapping[str, Any] = field(default_factory=dict)


class Recipe(Protocol):
    """A language task: where model and rows come from, how to train, how to test."""

    @property
    def name(self) -> str:
        """As on the command line."""

    @property
    def describe(self) -> str:
        """What it is, in a line."""

    @property
    def defaults(self) -> Defaults:
        """Its settings."""

    def prepare(self, folder: Path, *, seed: int, model: str | None, data: str | None) -> Prepared:
        """Make or find model and rows; the same seed finds the same files.

        Args:
            folder: of the cache.
            seed: of all draws.
            model: another model than the recipe's own: a hub id or a folder.
            data: other rows than the recipe's own: a file, a folder or a hub id.

        Raises:
            ValueError: a model or rows that the recipe can't use, or a damaged cache.
            OSError: a file that can't be read or written.
        """

    def evaluate(self, model: Any, tokenizer: Any, prepared: Prepared, *, seed: int) -> Evaluation:
        """Test a model on what it was not trained on.

        Args:
            model: a causal language model, on its device.
            tokenizer: of the model.
            prepared: of :meth:`prepare`.
            seed: of the draws; the same for all models, so that they share their luck.

        Returns:
            ``score`` in [0, 1], ``interval`` (its 95 % interval, both ends), ``n`` (what the score
            is a mean over), and further numbers by name.
        """
