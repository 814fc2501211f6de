"""Updates of a small decoder: weighted ones against SFT, and our SFT against TRL's SFTTrainer."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import datasets  # type: ignore[import-untyped]
import torch
from tensordict import NestedKey, TensorDict
from torch import Tensor
from transformers import PrinterCallback, Qwen2Config, Qwen2ForCausalLM, Trainer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.llm.recipes.arithmetic.base import tokenizer
from benchmarks.speed import measure as speed
from benchmarks.speed.measure import Check, Comparison, Way, compare
from benchmarks.speed.options import Options
from iwsft.language.config import ImportanceWeightedConfig
from iwsft.language.trainer import ImportanceWeightedTrainer
from iwsft.policies.causal_lm import CausalLMPolicy
from iwsft.presets import ImportanceWeights
from iwsft.trajectory import ASSISTANT_MASK, ATTENTION_MASK, DATA_WEIGHT, TOKENS, from_steps

# Largest relative difference of the losses of the first updates, both in float32.
LOSS_LIMIT = 1e-5
# Settings of our trainer; TRL has none of them.
Settings = dict[str, Any] | None
SFT: Settings = {"proposal": "reference"}
TRL: Settings = None
WEIGHTED: dict[str, Settings] = {
    "iw-SFT update, q = theta": {"proposal": "current"},
    "iw-SFT update, a hard sync each block": {"proposal": "cached"},
    "iw-SFT update, EMA": {"proposal": "lagged", "ema_decay": 0.99},
    "SFT update with data weights": {"proposal": "reference", "weighted": True},
    "DFT update": {"importance_weights": ImportanceWeights.dft()},
    "EAFT update": {"importance_weights": ImportanceWeights.eaft()},
}


def sizes_of(options: Options) -> SimpleNamespace:
    """Return the sizes of a decoder and its training."""
    return speed.scaled(
        options,
        batch=(16, 2),
        length=(128, 16),
        # The last tokens of each trajectory are the assistant's.
        trained=(64, 8),
        width=(192, 32),
        inner=(768, 128),
        heads=(4, 4),
        layers=(4, 1),
        vocabulary=(2048, 64),
        # Updates of a block, which is an epoch, and between hard syncs.
        updates=(4, 2),
        # Blocks for each repeat that the options ask for.
        blocks=(2, 1),
    )


def measure(options: Options) -> Iterator[Comparison | Check]:
    """Yield the agreement with TRL, memory and time against it, then our updates against SFT."""
    sizes = sizes_of(options)
    losses = [losses_of(settings, options, sizes) for settings in (SFT, TRL)]
    difference = speed.relative_difference(*losses)
    name = f"losses of {len(losses[0])} updates of SFT against TRL's, relative difference"
    yield Check(name, difference, LOSS_LIMIT)
    what = f"SFT, {sizes.batch} x {sizes.length} tokens, {{}} of them trained"
    name = f"{what.format(sizes.trained)}, vocabulary {sizes.vocabulary:,}"
    yield speed.compare_peaks(name, "TRL's SFTTrainer", __name__, options)
    # Six runs by default, whose median leaves a cold first one out.
    in_turn = partial(compare, repeats=sizes.blocks * options.repeats, warm_up=0)
    per = sizes.updates * sizes.batch * sizes.length
    peer_name, unit = "TRL's SFTTrainer on the same model, data and batch", "us per token"
    for trained in (sizes.length, sizes.trained):
        sizes.trained = trained
        sft, trl = (TimedRun(settings, options, sizes) for settings in (SFT, TRL))
        yield in_turn(what.format(trained), sft, trl, peer_name, unit, per=per)
    name, unit = "log-probs of a batch without gradient", "ms per update"
    peer_name, per = "our SFT update", sizes.updates
    yield in_turn(name, sft.forward, sft, peer_name, unit, per=per)
    for name, settings in WEIGHTED.items():
        way = TimedRun(settings, options, sizes)
        yield in_turn(name, way, sft, peer_name, unit, per=per)


def losses_of(settings: Settings, options: Options, sizes: SimpleNamespace) -> list[Tensor]:
    """Return the losses of the updates of a block, all on one batch."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build_trainer(folder, settings, options.seed, sizes, batches=1)
        trainer.train()
    return [torch.tensor(row["loss"]) for row in trainer.state.log_history if "loss" in row]


class TimedRun(TrainerCallback):
    """A call trains, and returns the seconds of the last block of updates, on the clock ``now``."""

    def __init__(
        self, settings: Settings, options: Options, sizes: SimpleNamespace, device: str = "cpu"
    ) -> None:
        self.now: Callable[[], float] = time.process_time
        self._folder, seed = tempfile.TemporaryDirectory(), options.seed
        self._trainer = build_trainer(self._folder.name, settings, seed, sizes, device=device)
        self._first = self._trainer.args.max_steps - sizes.updates
        self._start = self._stop = 0.0
        # The last callback: the reference has been computed when its training begins.
        self._trainer.add_callback(self)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = self.now()

    def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == self._first:
            self._start = self.now()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._stop = self.now()

    def __call__(self) -> float:
        self._trainer.train()
        return self._stop - self._start

    @torch.no_grad()
    def forward(self) -> float:
        """Return the seconds of a pass over the batches of a block, without gradient."""
        model: Any = self._trainer.model
        policy, start = CausalLMPolicy(model), self.now()
        for batch in self._trainer.get_train_dataloader():
            policy.log_prob(batch)
        return self.now() - start


def build_trainer(
    folder: str,
    settings: Settings,
    seed: int,
    sizes: SimpleNamespace,
    *,
    batches: int | None = None,
    device: str = "cpu",
) -> Trainer:
    """Return our trainer, or for ``TRL`` TRL's, on a random batch per update or ``batches``."""
    torch.manual_seed(seed)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.width,
            intermediate_size=sizes.inner,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=2,
            max_position_embeddings=sizes.length,
            tie_word_embeddings=True,
        )
    )
    rows = sizes.batch * (sizes.updates if batches is None else batches)
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, sizes.vocabulary, (rows, sizes.length), generator=draw)
    common: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": sizes.batch,
        "max_steps": sizes.updates,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "bf16": device != "cpu",
        "use_cpu": device == "cpu",
        "logging_steps": 1 if batches == 1 else 10**6,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": seed,
    }
    if settings is None:
        trainer = build_trl_trainer(model, ids, common, sizes)
    else:
        own = dict(settings)
        if own.get("proposal") == "cached":
            own["sync_every"] = sizes.updates
        # Until its first sync q is the reference, and costs nothing.
        common["max_steps"] += own.get("sync_every", int(own.get("proposal") == "lagged"))
        weights, weighted = own.pop("importance_weights", None), own.pop("weighted", False)
        trainer = ImportanceWeightedTrainer(
            model,
            ImportanceWeightedConfig(**common, **own),
            trajectories=packed(ids, sizes, weighted=weighted),
            importance_weights=weights,
        )
    # Its lines would mix with those of the table.
    trainer.remove_callback(PrinterCallback)
    return trainer


def packed(ids: Tensor, sizes: SimpleNamespace, *, weighted: bool = False) -> TensorDict:
    """Return trajectories made of tokens ``[rows, length]``, perhaps with data weights."""
    number = torch.arange(ids.numel())
    steps: dict[NestedKey, Tensor] = {
        TOKENS: ids.reshape(-1),
        ATTENTION_MASK: torch.ones(ids.numel(), dtype=torch.bool),
        ASSISTANT_MASK: number % sizes.length >= sizes.length - sizes.trained,
    }
    if weighted:
        draw = torch.Generator().manual_seed(len(ids))
        steps[DATA_WEIGHT] = torch.rand(ids.numel(), generator=draw)
    return from_steps(steps, number // sizes.length)


def build_trl_trainer(
    model: Qwen2ForCausalLM, ids: Tensor, common: dict[str, Any], sizes: SimpleNamespace
) -> Trainer:
    """Return TRL's trainer of the assistant's tokens among ``ids``."""
    labels = ids.clone()
    labels[:, : sizes.length - sizes.trained] = -100
    config = SFTConfig(
        **common,
        # Off, as in our trainer; it costs time.
        gradient_checkpointing=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    rows = {"input_ids": ids.tolist(), "labels": labels.tolist()}
    data = datasets.Dataset.from_dict(rows)
    # No row needs its tokenizer.
    return SFTTrainer(model, config, train_dataset=data, processing_class=tokenizer())


def job(options: Options, *, ours: bool) -> Way:
    """Return a block of updates, whose memory is measured, of our trainer or of TRL's."""
    return TimedRun(SFT if ours else TRL, options, sizes_of(options))
