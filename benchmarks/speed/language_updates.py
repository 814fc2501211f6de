"""Updates of a small decoder: weighted ones against SFT, and our SFT against TRL's SFTTrainer."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import torch
from tensordict import NestedKey, TensorDict
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import (
    PreTrainedTokenizerFast,
    PrinterCallback,
    Qwen2Config,
    Qwen2ForCausalLM,
    Trainer,
    TrainerCallback,
)
from trl import SFTConfig, SFTTrainer

from benchmarks.speed.measure import Check, Comparison, Times, peak_mb_of_child
from benchmarks.speed.options import Options
from iwsft.language.config import ImportanceWeightedConfig
from iwsft.language.trainer import ImportanceWeightedTrainer
from iwsft.policies.causal_lm import CausalLMPolicy
from iwsft.presets import ImportanceWeights
from iwsft.trajectory import ASSISTANT_MASK, ATTENTION_MASK, DATA_WEIGHT, TOKENS, from_steps

# Largest relative difference of the losses of the first updates, both in float32.
LOSS_LIMIT = 1e-5
SFT: dict[str, Any] = {"proposal": "reference"}
# TRL has no settings of our trainer.
TRL = None


@dataclass(frozen=True)
class Sizes:
    """Sizes of the decoder and its training."""

    batch: int = 16
    length: int = 128
    # The last tokens of each trajectory are the assistant's.
    trained: int = 64
    width: int = 192
    inner: int = 768
    heads: int = 4
    layers: int = 4
    vocabulary: int = 2048
    # Updates of a block, which is an epoch, and between hard syncs.
    updates: int = 4
    # Blocks for each repeat that the options ask for.
    blocks: int = 2


SIZES = {
    "paper": Sizes(),
    "small": Sizes(2, 16, 8, width=32, inner=128, layers=1, vocabulary=64, updates=2, blocks=1),
}
WEIGHTED: dict[str, dict[str, Any]] = {
    "iw-SFT update, q = theta": {"proposal": "current"},
    "iw-SFT update, a hard sync each block": {"proposal": "cached"},
    "iw-SFT update, EMA": {"proposal": "lagged", "ema_decay": 0.99},
    "SFT update with data weights": {**SFT, "weighted": True},
    "DFT update": {"importance_weights": ImportanceWeights.dft()},
    "EAFT update": {"importance_weights": ImportanceWeights.eaft()},
}


def measure(options: Options, sizes: Sizes) -> Iterator[Comparison | Check]:
    """Yield the agreement with TRL, memory and time against it, then our updates against SFT."""
    yield agreement(options, sizes)
    shape = {"seed": options.seed, "sizes": asdict(sizes)}
    ours, peer = (peak_mb_of_child(__name__, settings=way, **shape) for way in (SFT, TRL))
    shapes = f"{sizes.batch} x {sizes.length} tokens"
    name = f"SFT, {shapes}, {sizes.trained} of them trained, vocabulary {sizes.vocabulary:,}"
    yield Comparison(f"peak memory of {name}", ours, peer, "MB", "TRL's SFTTrainer")
    with tempfile.TemporaryDirectory() as folder:

        def run(settings: dict[str, Any] | None, sizes: Sizes) -> TimedRun:
            place = tempfile.mkdtemp(dir=folder)
            return TimedRun(
                build_trainer(Path(place), settings, options.seed, sizes), sizes.updates
            )

        def pair(ours: Callable[[], float], peer: Callable[[], float]) -> Times:
            # The first block has the costs of a first call.
            blocks = [(ours(), peer()) for _ in range(1 + sizes.blocks * options.repeats)][1:]
            return Times([seconds for seconds, _ in blocks], [seconds for _, seconds in blocks])

        per = sizes.updates * sizes.batch * sizes.length
        peer_name = "TRL's SFTTrainer on the same model, data and batch"
        for trained in (sizes.length, sizes.trained):
            given = replace(sizes, trained=trained)
            sft = run(SFT, given)
            name = f"SFT, {shapes}, {trained} of them trained"
            times = pair(sft, run(TRL, given))
            yield times.row(name, peer_name, "us", "per token", per=per)
        ways: dict[str, Callable[[], float]] = {
            "log-probs of a batch without gradient": sft.forward,
            **{name: run(settings, sizes) for name, settings in WEIGHTED.items()},
        }
        for name, way in ways.items():
            yield pair(way, sft).row(name, "our SFT update", "ms", "per update", per=sizes.updates)


def agreement(options: Options, sizes: Sizes) -> Check:
    """Compare the losses of our SFT and TRL's, on one batch again and again."""
    losses = []
    for settings in (SFT, TRL):
        with tempfile.TemporaryDirectory() as folder:
            trainer = build_trainer(Path(folder), settings, options.seed, sizes, batches=1)
            trainer.train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    pairs = list(zip(*losses, strict=True))
    largest = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    name = f"losses of {len(pairs)} updates of SFT against TRL's, relative difference"
    return Check(name, largest, LOSS_LIMIT)


class TimedRun(TrainerCallback):
    """A call trains, and returns the processor seconds of the last block of updates.

    ``now`` is another clock.
    """

    def __init__(
        self, trainer: Trainer, updates: int, now: Callable[[], float] = time.process_time
    ) -> None:
        self._trainer, self._now = trainer, now
        self._first = trainer.args.max_steps - updates
        self._start = self._stop = 0.0
        # The last callback: the reference has been computed when its training begins.
        trainer.add_callback(self)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = self._now()

    def on_step_end(self, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        if state.global_step == self._first:
            self._start = self._now()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._stop = self._now()

    def __call__(self) -> float:
        self._trainer.train()
        return self._stop - self._start

    @torch.no_grad()
    def forward(self) -> float:
        """Return the seconds of a pass over the batches of a block, without gradient."""
        model: Any = self._trainer.model
        policy, start = CausalLMPolicy(model), self._now()
        for batch in self._trainer.get_train_dataloader():
            policy.log_prob(batch)
        return self._now() - start


def build_trainer(
    folder: Path,
    settings: dict[str, Any] | None,
    seed: int,
    sizes: Sizes,
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
        "output_dir": str(folder),
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
    trainer: Trainer
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


def packed(ids: Tensor, sizes: Sizes, *, weighted: bool = False) -> TensorDict:
    """Return trajectories made of tokens ``[rows, length]``, perhaps with data weights."""
    number = torch.arange(ids.numel())
    steps: dict[NestedKey, Tensor] = {
        TOKENS: ids.reshape(-1),
        ATTENTION_MASK: torch.ones(ids.numel(), dtype=torch.bool),
        ASSISTANT_MASK: number % sizes.length >= sizes.length - sizes.trained,
    }
    if weighted:
        steps[DATA_WEIGHT] = torch.rand(
            ids.numel(), generator=torch.Generator().manual_seed(len(ids))
        )
    return from_steps(steps, number // sizes.length)


def build_trl_trainer(
    model: Qwen2ForCausalLM, ids: Tensor, common: dict[str, Any], sizes: Sizes
) -> Trainer:
    """Return TRL's trainer of the assistant's tokens among ``ids``."""
    labels = ids.clone()
    labels[:, : sizes.length - sizes.trained] = -100
    words = {str(number): number for number in range(sizes.vocabulary)}
    config = SFTConfig(
        **common,
        # Off, as in our trainer; it costs time.
        gradient_checkpointing=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    rows = {"input_ids": ids.tolist(), "labels": labels.tolist()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, "0")), pad_token="0", eos_token="0"
    )
    return SFTTrainer(
        model, config, train_dataset=datasets.Dataset.from_dict(rows), processing_class=tokenizer
    )


def job(settings: dict[str, Any] | None, seed: int, sizes: dict[str, int]) -> Callable[[], object]:
    """Return a block of updates, whose memory is measured, of our trainer or of TRL's."""
    folder = tempfile.TemporaryDirectory()
    trainer = build_trainer(Path(folder.name), settings, seed, Sizes(**sizes))

    def train() -> None:
        with folder:
            trainer.train()

    return train
