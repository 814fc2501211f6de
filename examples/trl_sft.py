"""iw-SFT inside TRL: SFTTrainer formats, tokenises, packs, batches and logs; the loss is ours.

Run it with ``python examples/trl_sft.py --model Qwen/Qwen2.5-0.5B-Instruct --data rows.jsonl``.
Rows have ``prompt`` and ``completion``, or ``messages``. Of ``messages`` TRL trains all tokens,
unless the config has ``assistant_only_loss=True``.
"""

from pathlib import Path
from typing import Any

import torch
import tyro
from datasets import load_dataset  # type: ignore[import-untyped]
from trl import SFTConfig

from iwsft.language.trl import ImportanceWeightedSFTTrainer


def main(model: str, data: Path, out: Path = Path("runs/trl"), updates: int = 100) -> Any:
    """Fine-tune a model on good rows with q = theta, save it, and return TRL's log lines."""
    on_cpu = not torch.cuda.is_available()
    args = SFTConfig(str(out), max_steps=updates, packing=True, max_length=1024, use_cpu=on_cpu)
    dataset = load_dataset("json", data_files=str(data), split="train")
    trainer = ImportanceWeightedSFTTrainer(model, args, train_dataset=dataset, proposal="current")
    trainer.train()
    trainer.save_model()
    return trainer.state.log_history


if __name__ == "__main__":
    tyro.cli(main)
