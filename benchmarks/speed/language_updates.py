"""Updates of a small decoder: iw-SFT against SFT, and our SFT against TRL's SFTTrainer."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import torch
from tensordict import TensorDict
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

from benchmarks.speed.measure import Check, Options, Row, Times, checked, growth_mb, in_child
from iwsft.language.config import ImportanceWeightedConfig
from iwsft.language.trainer import ImportanceWeightedTrainer
from iwsft.trajectory import ASSISTANT_MASK, ATTENTION_MASK, TOKENS, from_steps

# Of the losses of the first updates, both in float32.
LOSS_LIMIT = 1e-5
TRL = "trl"
SFT: dict[str, Any] = {"proposal": "reference"}


@dataclass(frozen=True)
class Sizes:
    """What is trained.

    Attributes:
        batch: trajectories of an update.
        length: tokens of each.
        trained: how many of them, the last, are the assistant's.
        width: hidden size of the decoder.
        layers: of the decoder.
        vocabulary: its tokens.
        updates: of a block, an epoch; also updates between hard syncs.
        blocks: for each repeat that the options ask for.
    """

    batch: int = 16
    length: int = 128
    trained: int = 64
    width: int = 192
    layers: int = 4
    vocabulary: int = 2048
    updates: int = 4
    blocks: int = 3


SIZES = {
    "paper": Sizes(),
    "small": Sizes(
        batch=2, length=16, trained=8, width=32, layers=1, vocabulary=64, updates=2, blocks=1
    ),
}


def measure(options: Options, sizes: Sizes) -> Iterator[Row | Check]:
    """Agreement with TRL, then all ways in turn, then memory."""
    yield agreement(options, sizes)
    ways: dict[str, dict[str, Any]] = {
        "q = theta": {"proposal": "current"},
        f"hard sync every {sizes.updates} updates": {
            "proposal": "cached",
            "sync_every": sizes.updates,
        },
        "EMA": {"proposal": "lagged", "ema_decay": 0.99},
    }
    everything: dict[str, dict[str, Any] | None] = {"SFT": SFT, TRL: None, **ways}
    with tempfile.TemporaryDirectory() as folder:
        runs = {
            name: Run(trainer(Path(folder) / str(place), own, options, sizes))
            for place, (name, own) in enumerate(everything.items())
        }
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for block in range(1 + sizes.blocks * options.repeats):
            for name, run in runs.items():
                found = run()
                # The first pays for what comes once.
                if block > 0:
                    seconds[name].append(found)
    shape = f"{sizes.batch} x {sizes.length} tokens, {sizes.trained} trained"
    yield Times(seconds["SFT"], seconds[TRL]).row(
        f"SFT, {shape}, vocabulary {sizes.vocabulary:,}",
        "TRL's SFTTrainer on the same model, data and batch",
        "us",
        "per token",
        per=sizes.updates * sizes.batch * sizes.length,
    )
    for name in ways:
        yield Times(seconds[name], seconds["SFT"]).row(
            f"iw-SFT update, {name}, {shape}", "our SFT", "ms", "per update", per=sizes.updates
        )
    yield memory(options, sizes)


def memory(options: Options, sizes: Sizes) -> Row:
    """What a block of updates adds to the peak, each way in a process of its own."""
    ours, peer = (
        in_child(
            "benchmarks.speed.language_updates",
            {"own": own, "seed": options.seed, "sizes": asdict(sizes)},
        )
        for own in (SFT, None)
    )
    name = f"peak memory of SFT, {sizes.batch} x {sizes.length} tokens, vocabulary "
    return Row(f"{name}{sizes.vocabulary:,}", ours, peer, "MB", "TRL's SFTTrainer")


def agreement(options: Options, sizes: Sizes) -> Check:
    """The losses of our SFT and TRL's, on one batch again and again."""
    with tempfile.TemporaryDirectory() as folder:
        losses = []
        for own in (SFT, None):
            trained = trainer(Path(folder) / str(own is None), own, options, sizes, batches=1)
            trained.train()
            losses.append([row["loss"] for row in trained.state.log_history if "loss" in row])
    pairs = list(zip(*losses, strict=True))
    worst = max(abs(ours - theirs) / abs(theirs) for ours, theirs in pairs)
    name = f"losses of {len(pairs)} updates of SFT against TRL's, relative difference"
    return checked(name, worst, LOSS_LIMIT)


class Run(TrainerCallback):
    """Trains for a block of updates; the processor seconds from the first to the last of them."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._start = self._stop = 0.0
        # The last of the callbacks: the reference has been computed when training begins.
        trainer.add_callback(self)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._start = time.process_time()

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        self._stop = time.process_time()

    def __call__(self) -> float:
        self._trainer.train()
        return self._stop - self._start


def trainer(
    folder: Path,
    own: dict[str, Any] | None,
    options: Options,
    sizes: Sizes,
    *,
    batches: int | None = None,
) -> Trainer:
    """Our trainer with some settings, or with None TRL's, on random tokens.

    Args:
        folder: its output.
        own: what is not plain in the settings of ours.
        options: the seed is used.
        sizes: what is trained.
        batches: in the data; by default one for each update.
    """
    torch.manual_seed(options.seed)
    model = decoder(sizes)
    found: Trainer
    rows = sizes.batch * (sizes.updates if batches is None else batches)
    draw = torch.Generator().manual_seed(options.seed)
    ids = torch.randint(1, sizes.vocabulary, (rows, sizes.length), generator=draw)
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "per_device_train_batch_size": sizes.batch,
        "max_steps": sizes.updates,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "bf16": False,
        "use_cpu": True,
        "logging_steps": 1 if batches == 1 else 10**6,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": options.seed,
    }
    if own is None:
        found = _trl(model, ids, settings, sizes)
    else:
        found = ImportanceWeightedTrainer(
            model, ImportanceWeightedConfig(**settings, **own), trajectories=packed(ids, sizes)
        )
    # Its lines would stand among those of the table.
    found.remove_callback(PrinterCallback)
    return found


def packed(ids: Tensor, sizes: Sizes) -> TensorDict:
    """Trajectories of ours from ``[rows, length]`` tokens."""
    number = torch.arange(ids.numel())
    steps = {
        TOKENS: ids.reshape(-1),
        ATTENTION_MASK: torch.ones(ids.numel(), dtype=torch.bool),
        ASSISTANT_MASK: number % sizes.length >= sizes.length - sizes.trained,
    }
    return from_steps(steps, number // sizes.length)


def _trl(model: Any, ids: Tensor, settings: dict[str, Any], sizes: Sizes) -> Trainer:
    labels = ids.clone()
    labels[:, : sizes.length - sizes.trained] = -100
    words = {str(number): number for number in range(sizes.vocabulary)}
    return SFTTrainer(
        model,
        SFTConfig(
            **settings,
            # As in ours; it would be slower with.
            gradient_checkpointing=False,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=datasets.Dataset.from_dict(
            {"input_ids": ids.tolist(), "labels": labels.tolist()}
        ),
        processing_class=PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words, "0")), pad_token="0", eos_token="0"
        ),
    )


def decoder(sizes: Sizes) -> Qwen2ForCausalLM:
    """Random weights, tied embeddings."""
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=sizes.vocabulary,
            hidden_size=sizes.width,
            intermediate_size=4 * sizes.width,
            num_hidden_layers=sizes.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=sizes.length,
            tie_word_embeddings=True,
        )
    )


def peak(own: dict[str, Any] | None, seed: int, sizes: dict[str, int]) -> float:
    """MB that a block of updates needs above model and data; alone in its process."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        trained = trainer(Path(folder), own, Options(seed=seed), Sizes(**sizes))
        return growth_mb(trained.train)


if __name__ == "__main__":
    print(peak(**json.loads(sys.argv[1])))
