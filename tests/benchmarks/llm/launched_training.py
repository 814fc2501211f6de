"""Two updates of a tiny decoder in a process that was started as another one was: its engine."""

from __future__ import annotations

import gc
import json
import os
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen2Config, Trainer, TrainingArguments

from benchmarks.llm.launch import assert_engine, launched
from iwsft.language.shards import compile_nothing

CONFIG = Qwen2Config(
    vocab_size=512,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    tie_word_embeddings=False,
)


def live_bytes() -> dict[str, int]:
    """Bytes of all tensors there are, by dtype, each storage once."""
    gc.collect()
    found: dict[int, tuple[str, int]] = {}
    for thing in gc.get_objects():
        if not issubclass(type(thing), torch.Tensor) or thing.is_meta:
            continue
        for tensor in (thing, getattr(thing, "ds_tensor", None), thing.grad):
            if tensor is not None:
                storage = tensor.untyped_storage()
                found[storage.data_ptr()] = (str(tensor.dtype), storage.nbytes())
    total: Counter[str] = Counter()
    for dtype, size in found.values():
        total[dtype] += size
    return dict(total)


def refusals(trainer: Trainer, launch: Any) -> dict[str, str]:
    """Return the errors for engines that were not asked for."""
    other = {"stage": 2, "processes": 4, "engine": "fsdp2", "offload_optimizer": True}
    said = {}
    for name, value in other.items():
        try:
            assert_engine(trainer.accelerator, replace(launch, **{name: value}))
        except ValueError as error:
            said[name] = str(error)
    return said


def train(rank: int, out: Path) -> None:
    """Train in the environment of ``started-RANK.json``, and write what was seen into ``out``."""
    os.environ |= json.loads((out / f"started-{rank}.json").read_text())
    # The launcher that had it is gone.
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    before = live_bytes()
    launch = launched()
    assert launch is not None
    compile_nothing()
    args = TrainingArguments(
        str(out),
        use_cpu=True,
        bf16=True,
        max_steps=2,
        per_device_train_batch_size=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    row = {"input_ids": torch.arange(16), "labels": torch.arange(16)}
    trainer = Trainer(AutoModelForCausalLM.from_config(CONFIG), args, train_dataset=[row] * 8)
    assert_engine(trainer.accelerator, launch)
    seen: dict[str, Any] = {"launch": asdict(launch), "refusals": refusals(trainer, launch)}
    trainer.train()
    seen["loss"] = trainer.state.log_history[-1]["train_loss"]
    seen["live"] = {name: size - before.get(name, 0) for name, size in live_bytes().items()}
    (out / f"rank-{args.process_index}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()
