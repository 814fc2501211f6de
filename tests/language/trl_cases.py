"""A small decoder and rows for TRL's trainer with our loss, and short runs of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import Qwen2ForCausalLM
from trl import SFTConfig

from iwsft.language.trl import ImportanceWeightedSFTTrainer
from tests import tiny_qwen2
from tests.datasets.text.chat_tokenizers import byte_level

ROWS = [
    {"prompt": f"{a}+{b}=", "completion": str((a + b) * 10 ** (a % 3))}
    for a in (1, 4, 8, 9)
    for b in (2, 3)
]
SETTINGS: dict[str, Any] = {
    "logging_steps": 1,
    "report_to": "none",
    "bf16": False,
    "use_cpu": True,
    "disable_tqdm": True,
    "per_device_train_batch_size": len(ROWS),
    "max_steps": 4,
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "save_strategy": "no",
}
OURS = ("proposal", "sync_every", "ema_decay", "importance_weights", "length_normalize")


def decoder() -> Qwen2ForCausalLM:
    """Random weights, with the vocabulary of a byte-level tokenizer."""
    tokenizer = byte_level()
    size = len(tokenizer)
    return tiny_qwen2.decoder(tokenizer, vocab_size=size, max_position_embeddings=64)


def in_trl(folder: Path, model: Any, rows: Any = ROWS, **own: Any) -> ImportanceWeightedSFTTrainer:
    """TRL's trainer with our loss; ``own``: settings, and arguments of the trainer."""
    names = (*OURS, "peft_config", "compute_loss_func", "eval_dataset", "data_collator")
    of_trainer = {name: own.pop(name) for name in names if name in own}
    return ImportanceWeightedSFTTrainer(
        model,
        SFTConfig(str(folder), gradient_checkpointing=False, **{**SETTINGS, **own}),
        train_dataset=Dataset.from_list(rows) if isinstance(rows, list) else rows,
        processing_class=byte_level(),
        **of_trainer,
    )


def trained(trainer: Any, **resume: Any) -> list[dict[str, float]]:
    """Train; the log lines of the updates."""
    trainer.train(**resume)
    return [row for row in trainer.state.log_history if "loss" in row]
