"""Settings of the fine-tuning, plain values: a recipe's, or those of a run; where it trains."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal

from benchmarks.options import option

if TYPE_CHECKING:
    from iwsft import ImportanceWeights

Preset = Literal["recipe", "paper_llm", "authors_llm"]
setting = partial(option, source="set by the recipe")


@dataclass(frozen=True, kw_only=True)
class Optimization:
    """How to optimise."""

    learning_rate: Annotated[float, setting("FLOAT", aliases=("--lr",))]
    """Peak of AdamW's learning rate."""
    batch_size: Annotated[int, setting("INT")]
    """Rows of an update, over all processes and accumulation steps."""
    max_steps: Annotated[
        int | None, setting("INT", "none, --epochs counts", aliases=("--steps",))
    ] = None
    """Number of updates, instead of --epochs."""
    epochs: Annotated[float | None, setting("FLOAT", "none, --max-steps counts")] = None
    """Passes over the curated data, instead of --max-steps."""
    warmup: Annotated[float, setting("FLOAT")] = 0.05
    """Updates of the linear warm-up; below 1, their share of all updates."""
    scheduler: Annotated[str, setting("NAME")] = "cosine"
    """Schedule after the warm-up, by transformers' name."""
    weight_decay: Annotated[float, setting("FLOAT")] = 0.0
    """Weight decay of AdamW."""
    adam_beta1: Annotated[float, setting("FLOAT")] = 0.9
    """First beta of AdamW."""
    adam_beta2: Annotated[float, setting("FLOAT")] = 0.95
    """Second beta of AdamW."""
    max_grad_norm: Annotated[float, setting("FLOAT")] = 1.0
    """Norm that gradients are clipped to."""
    lora_rank: Annotated[int | None, setting("INT", "none, all weights are trained")] = None
    """Rank of LoRA adapters on all linear layers, which are then trained alone, at ten times the
    recipe's learning rate."""


@dataclass(frozen=True, kw_only=True)
class Curation:
    """Which rows to train on."""

    max_length: Annotated[int | None, setting("INT", "none, nothing is cut")] = None
    """Most tokens of a row, of the training and of the test."""
    cuts: Annotated[tuple[float, ...], setting("[FLOAT ...]", "none, all rows once")] = ()
    """Percentiles of the scores of D+ that SFT and iw-SFT keep."""
    quality_cuts: Annotated[tuple[float, ...], setting("[FLOAT ...]")] = (0, 50, 75)
    """Percentiles of D_Q+, for SFT(Q)."""


@dataclass(frozen=True, kw_only=True)
class Weighting:
    """How importance weights are computed, in algorithms that have them."""

    preset: Annotated[Preset, setting()] = "recipe"
    """Preset of the weights; "recipe" is the chain of --temperature, --reduce, --max-weight and
    --self-normalize."""
    temperature: Annotated[float, setting("FLOAT")] = 1.0
    """Factor k of g(x) = k x, of a token's log-ratio x."""
    reduce: Annotated[Literal["sum", "mean"], setting()] = "mean"
    """Reduction of the log-ratios along the trajectory."""
    max_weight: Annotated[float, setting("FLOAT")] = 16.0
    """Value that a larger weight is clipped to, before --self-normalize divides."""
    self_normalize: Annotated[bool, setting()] = False
    """Divide the weights by their mean over the batch."""
    step_clip: Annotated[tuple[float, float], setting("FLOAT FLOAT")] = (0.2, 1.8)
    """Limits of the ratio of a step, in iw-sft-step."""
    sync_every: Annotated[int, setting("INT")] = 50
    """Updates between hard syncs of q."""
    ema_decay: Annotated[float, setting("FLOAT")] = 0.99
    """Decay of q as a moving average, in an update."""
    length_normalize: Annotated[bool, setting()] = True
    """Divide a trajectory's log-probability by its length."""


@dataclass(frozen=True, kw_only=True)
class Related:
    """How the related methods weigh, each by its own options, and what else changes weights."""

    reference: Annotated[Literal["none"] | None, setting("none", "pi_ref, the model")] = None
    """What q is divided by in every iw-sft algorithm; "none" weighs by q itself."""
    q: Annotated[Literal["auto"] | None, setting("auto", "none, k is fixed")] = None
    """Rule that chooses the temperature at each sync: "auto" takes the one that promises the most
    right answers, or the best score, on the rows of one prompt in five, which are not trained."""
    normalize_data_weights: Annotated[bool, setting()] = False
    """Divide an update by the absolute data weights of its rows, instead of by their number."""
    rwr_beta: Annotated[float, setting("FLOAT")] = 1.0
    """Temperature of rwr, in units of the score; a row weighs exp(score / beta)."""
    power_k: Annotated[float, setting("FLOAT")] = 10.0
    """Exponent k of the token weight p^k of power."""
    psft_epsilon: Annotated[float, setting("FLOAT")] = 0.2
    """How far a token's ratio may rise above 1 between syncs, in psft."""
    eaft_alpha: Annotated[float, setting("FLOAT")] = 1.0
    """Exponent of the entropy that weighs a token in eaft."""
    eaft_top_k: Annotated[int, setting("INT")] = 20
    """Number of likeliest tokens that the entropy of eaft is of."""
    asft_alpha: Annotated[float, setting("FLOAT")] = 0.1
    """Coefficient of the KL divergence from pi_ref in asft."""
    nft_epsilon: Annotated[float, setting("FLOAT")] = 1.0
    """Least likelihood of a wrong token in nft, in (0, 1]."""
    baseline_margin: Annotated[float, setting("FLOAT")] = 0.1
    """How far the baseline of asymre is below the share of right answers."""
    minor_sft_beta: Annotated[float, setting("FLOAT")] = 0.1
    """Factor beta of the answer's log-ratio in minor-sft."""


# Settings METHOD_ARGUMENT, each of one related method.
METHOD_SETTINGS = tuple(each.name for each in fields(Related) if type(each.default) in (float, int))


@dataclass(frozen=True, kw_only=True)
class Memory:
    """How to spend memory."""

    micro_batch_size: Annotated[int | None, setting("INT", "as many as there are")] = None
    """Rows of a forward pass on a device."""
    layout: Annotated[Literal["padded", "packed"], setting()] = "padded"
    """Layout of the batches."""
    precision: Annotated[Literal["float32", "bfloat16"], setting()] = "float32"
    """Precision of the matrix products."""
    gradient_checkpointing: Annotated[bool, setting()] = False
    """Recompute activations in the backward pass."""


@dataclass(frozen=True, kw_only=True)
class Settings(Optimization, Curation, Weighting, Related, Memory):
    """Settings of the fine-tuning."""

    def importance_weights(
        self, *, per_step: bool = False, related: str | None = None
    ) -> ImportanceWeights:
        """Build the chain of weights of ``preset``, of iw-sft-step or a related method."""
        from iwsft import ImportanceWeights, weights

        chain: ImportanceWeights
        if related is not None:
            own = [name for name in METHOD_SETTINGS if name.startswith(f"{related}_")]
            values = {name.removeprefix(f"{related}_"): getattr(self, name) for name in own}
            chain = getattr(ImportanceWeights, related)(**values)
            return chain
        if self.q is not None:
            chain = replace(ImportanceWeights.auto(), reduce=self.reduce)
        elif per_step:
            chain = ImportanceWeights(step=(weights.ClipRatio(*self.step_clip),), reduce=None)
        elif self.preset != "recipe":
            chain = getattr(ImportanceWeights, self.preset)()
        else:
            last = (weights.SelfNormalize(),) if self.self_normalize else ()
            chain = ImportanceWeights(
                step=(weights.Temperature(self.temperature),),
                reduce=self.reduce,
                trajectory=(weights.ClipWeight(max=self.max_weight), *last),
            )
        return chain if self.reference is None else replace(chain, reference=self.reference)


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Where to train."""

    deepspeed: Annotated[
        tuple[str, ...] | None,
        option(
            "[CONFIG]",
            "one process",
            help="Train under accelerate, with one process per GPU, or 2 on the CPU. CONFIG is a "
            "name in benchmarks/llm/configs, a YAML file of accelerate or a JSON file of "
            "DeepSpeed; without CONFIG the command chooses one that fits.",
        ),
    ] = None
    device: Annotated[str | None, option("cpu|cuda", "a GPU where there is one")] = None
    """Device of what is one process."""


@dataclass(frozen=True, kw_only=True)
class Saving:
    """What to write while it trains."""

    resume: bool = False
    """Continue what was cut off; what is finished is kept."""
    log_every: int = 1
    """Updates between log lines."""
    save_every: Annotated[int | None, option("INT", "a fifth of the run")] = None
    """Updates between checkpoints."""
    report_to: Annotated[tuple[str, ...], option("[NAME ...]")] = ()
    """Trackers of transformers that get the metrics, too: tensorboard, wandb, trackio, ..."""
