"""A tiny decoder, random trajectories for it, and short runs of the trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from transformers import Qwen2Config, Qwen2ForCausalLM, TrainerCallback

from iwsft.language.config import ImportanceWeightedConfig
from iwsft.language.trainer import ImportanceWeightedTrainer
from iwsft.trajectory import DATA_WEIGHT, MULTIPLICITY, from_steps

VOCABULARY = 97
ENTRIES = 11


def model(seed: int = 0) -> Qwen2ForCausalLM:
    """Random weights, large enough that tokens matter to each other."""
    torch.manual_seed(seed)
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.2,
            pad_token_id=0,
        )
    ).eval()


def trajectories(
    entries: int = ENTRIES, seed: int = 0, *, twice: int | None = None, weighted: bool = False
) -> TensorDict:
    """Random token trajectories of 5 to 19 tokens, the first three of each a prompt.

    Args:
        entries: Number of trajectories.
        seed: Seed of the tokens.
        twice: Trajectory that an epoch contains twice.
        weighted: Whether tokens have data weights, in [0, 2).
    """
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(5, 20, (entries,), generator=generator)
    ids = torch.arange(entries).repeat_interleave(sizes)
    position = torch.arange(len(ids)) - (sizes.cumsum(0) - sizes)[ids]
    steps: dict[Any, torch.Tensor] = {
        ("tokens", "full"): torch.randint(3, VOCABULARY, (len(ids),), generator=generator),
        ("masks", "all_attention_mask"): torch.ones(len(ids), dtype=torch.bool),
        ("masks", "all_assistant_mask"): position >= 3,
    }
    if twice is not None:
        steps[MULTIPLICITY] = 1 + (ids == twice).long()
    if weighted:
        steps[DATA_WEIGHT] = 2 * torch.rand(len(ids), generator=generator)
    return from_steps(steps, ids)


def trainer(
    folder: Path, *, data: TensorDict | None = None, **own: Any
) -> ImportanceWeightedTrainer:
    """A trainer of 7 updates of 4 entries; ``own``: settings, and arguments of the trainer."""
    of_trainer = {
        name: own.pop(name)
        for name in ("importance_weights", "eval_trajectories", "callbacks", "processing_class")
        if name in own
    }
    decoder = own.pop("model", None)
    settings: dict[str, Any] = {
        "per_device_train_batch_size": 4,
        "max_steps": 7,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        **own,
    }
    return ImportanceWeightedTrainer(
        model() if decoder is None else decoder,
        ImportanceWeightedConfig(output_dir=str(folder), **settings),
        trajectories=trajectories() if data is None else data,
        **of_trainer,
    )


class Stop(TrainerCallback):
    """Stops a run after so many updates."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        control.should_training_stop = state.global_step >= self.after


def losses(trained: ImportanceWeightedTrainer) -> list[float]:
    """The loss of each update."""
    return [row["loss"] for row in trained.state.log_history if "loss" in row]
