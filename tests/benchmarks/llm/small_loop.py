"""A small loop: a model of random weights, prompts, verifiers, and the words of the command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2ForCausalLM

from benchmarks.llm.recipes.arithmetic import BaseSettings
from benchmarks.llm.recipes.arithmetic.base import config, tokenizer
from benchmarks.llm.recipes.arithmetic.task import problems

# Half of all texts are right, which a model that has learned nothing can be.
VERIFIERS = """
def parity(text, row):
    return (sum(map(ord, text)) + len(row["prompt"])) % 2

def broken(text, row):
    raise KeyError("no such column")

def never(text, row):
    return 0

def debt(text, row):
    if len(text) % 5 == 0:
        raise ValueError("no verdict")
    return parity(text, row) - 2
"""
SAMPLES = 6


def make(folder: Path) -> None:
    """Write the model, the prompts and the module of verifiers."""
    torch.manual_seed(0)
    sizes = BaseSettings(hidden_size=32, intermediate_size=48, layers=2)
    Qwen2ForCausalLM(config(sizes)).save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    for name, count, split in (("prompts", 8, "train"), ("held-out", 5, "held-out")):
        asked = problems(count, 1, split)  # type: ignore[arg-type]
        rows = [{"prompt": each.prompt, "answer": str(each.answer)} for each in asked]
        write(folder / f"{name}.jsonl", rows)
    (folder / "scripted_verifiers.py").write_text(VERIFIERS)


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def words_of(place: Path, verifier: str = "parity") -> list[str]:
    name = f"scripted_verifiers:{verifier}" if verifier in VERIFIERS else verifier
    return [
        *("--model", str(place / "model"), "--prompts", str(place / "prompts.jsonl")),
        *("--verifier", name, "--samples-per-prompt", str(SAMPLES), "--max-tokens", "24"),
        *("--sampling-batch", "16", "--learning-rate", "0.003", "--batch-size", "4"),
        *("--epochs", "1", "--rounds", "1"),
    ]


def score(text: str, prompt: str) -> int:
    return (sum(map(ord, text)) + len(prompt)) % 2
