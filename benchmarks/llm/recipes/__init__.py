"""Recipes of ``python -m benchmarks.llm``: model, data, settings and test of a language task.

A new recipe is one module with a ``RECIPE``, and one line here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from benchmarks.options import check_known
from iwsft import ImportanceWeights, weights
from iwsft.datasets.text.rows import Row

# Name -> the module that holds it as RECIPE; it is imported where it is used.
RECIPES = {
    "arithmetic": "benchmarks.llm.recipes.arithmetic.recipe",
    "chat": "benchmarks.llm.recipes.chat",
    "gsm8k": "benchmarks.llm.recipes.gsm8k",
    "s1k": "benchmarks.llm.recipes.s1k",
}

Preset = Literal["recipe", "paper_llm", "authors_llm"]
# "score", "interval", "n", and further numbers by name.
Evaluation = Mapping[str, Any]


@dataclass(frozen=True)
class Settings:
    """Settings of the fine-tuning, plain values: a recipe's, or those of a run.

    Attributes:
        learning_rate: Peak of AdamW's learning rate.
        batch_size: Rows of an update, over all processes and accumulation steps.
        max_steps: Number of updates; this, or ``epochs``.
        epochs: Passes over the curated data.
        warmup: Updates of the linear warm-up; below 1, their share of all updates.
        weight_decay: Weight decay of AdamW.
        adam_beta1: First beta of AdamW.
        adam_beta2: Second beta of AdamW.
        scheduler: Schedule after the warm-up, by transformers' name.
        max_grad_norm: Norm that gradients are clipped to.
        max_length: Most tokens of a row; None cuts nothing.
        cuts: Percentiles of the scores of D+ that SFT and iw-SFT keep; empty keeps all once.
        quality_cuts: Percentiles of D_Q+, for SFT(Q).
        sync_every: Updates between hard syncs of q.
        ema_decay: Decay of q as a moving average, an update.
        length_normalize: Divide a trajectory's log-probability by its length.
        preset: Preset of the weights; ``"recipe"`` is the chain of the four fields below.
        temperature: Factor k of g(x) = k x.
        reduce: Reduction along the trajectory.
        max_weight: Value that a larger weight is clipped to.
        self_normalize: Divide the weights by their mean over the batch.
        step_clip: Limits of the ratio of a step, in the per-step variant.
        micro_batch_size: Rows of a forward pass on a device; None takes as many as there are.
        layout: Layout of the batches.
        precision: Precision of the matrix products.
        gradient_checkpointing: Recompute activations in the backward pass.
        lora_rank: Rank of LoRA adapters on all linear layers, which are then trained alone, at ten
            times the recipe's learning rate; None trains all weights.
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
    lora_rank: int | None = None

    def importance_weights(self, *, per_step: bool = False) -> ImportanceWeights:
        """Build the chain of weights of ``preset``, or that of the per-step variant.

        There each step's ratio, clipped to ``step_clip``, weighs its own loss.
        """
        if per_step:
            return ImportanceWeights(step=(weights.ClipRatio(*self.step_clip),), reduce=None)
        if self.preset == "paper_llm":
            return ImportanceWeights.paper_llm()
        if self.preset == "authors_llm":
            return ImportanceWeights.authors_llm()
        last = (weights.SelfNormalize(),) if self.self_normalize else ()
        return ImportanceWeights(
            step=(weights.Temperature(self.temperature),),
            reduce=self.reduce,
            trajectory=(weights.ClipWeight(max=self.max_weight), *last),
        )


@dataclass(frozen=True)
class Prepared:
    """What a recipe trains: a model and rows.

    ``model`` is a folder or hub id that ``from_pretrained`` loads. ``rows`` have ``score`` and
    ``correct`` where the recipe has them. ``score_name`` names the test's score in tables.
    ``notes`` are facts for the report, by name. ``held_out`` is what the test asks, where it comes
    with the rows.
    """

    model: str
    rows: list[Row]
    score_name: str
    notes: Mapping[str, Any] = field(default_factory=dict)
    held_out: Sequence[Any] = ()


@dataclass(frozen=True)
class Recipe(ABC):
    """A language task: where model and rows come from, how to train, how to test.

    Attributes:
        name: Name on the command line.
        defaults: Settings of its runs, where the command line sets no others.
        presets: Settings by the preset of their weights, where a preset changes others too.
        seeds: Seeds of its runs, where the command line names none.
        algos: Algorithms of its runs, where the command line names none.
        needs: Options that it has no default for.
        holds_out: Whether it takes ``eval_data`` and ``eval_share``.
        compares: Whether the base is always tested too, so that a result shows the change.
    """

    name: str
    defaults: Settings
    presets: Mapping[str, Settings] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    algos: tuple[str, ...] = (
        *("base", "sft", "sft-q", "iw-sft"),
        *("iw-sft-hard", "iw-sft-ema", "iw-sft-step"),
    )
    needs: tuple[str, ...] = ()
    holds_out: bool = False
    compares: bool = False

    @abstractmethod
    def prepare(
        self,
        folder: Path,
        *,
        seed: int,
        model: str | None = None,
        data: str | None = None,
        eval_data: str | None = None,
        eval_share: float | None = None,
        trust_remote_code: bool = False,
    ) -> Prepared:
        """Make or find model and rows in the cache ``folder``; the same seed finds the same files.

        ``model`` (a hub id or a folder) and ``data`` (a file, a folder or a hub id) replace the
        recipe's own. ``eval_data`` (as ``data``) or ``eval_share`` (of the prompts) say which rows
        are held out. ``trust_remote_code`` runs code that comes with the model. Raises ValueError
        where the recipe can't use them or the cache is damaged, and OSError where a file can't be
        read or written.
        """

    def tested_rows(self, prepared: Prepared) -> Sequence[Row]:
        """Return the rows that the test reads, cut to ``defaults.max_length`` tokens."""
        return ()

    @abstractmethod
    def evaluate(self, model: Any, tokenizer: Any, prepared: Prepared, *, seed: int) -> Evaluation:
        """Test a model, which is on its device; the same ``seed`` gives all models the same luck.

        Returns ``score`` in [0, 1], ``interval`` (its 95 % interval, both ends), ``n`` (what the
        score is a mean over), and further numbers by name.
        """


def load_recipe(name: str) -> Recipe:
    """Import the recipe of a name."""
    check_known("recipe", name, list(RECIPES))
    recipe: Recipe = import_module(RECIPES[name]).RECIPE
    return recipe
