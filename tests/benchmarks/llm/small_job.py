"""A small arithmetic job: a decoder of little training, rows from a file, a short test."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

from benchmarks.llm.launch import Launch
from benchmarks.llm.options import Options
from benchmarks.llm.recipes.arithmetic import BaseSettings
from benchmarks.llm.recipes.arithmetic.base import tokenizer, train
from benchmarks.llm.recipes.arithmetic.recipe import ArithmeticRecipe
from benchmarks.llm.recipes.arithmetic.task import check, mixture, problems
from benchmarks.llm.run import Run
from benchmarks.llm.settings import Settings

ROWS = 200
RECIPE = replace(ArithmeticRecipe(), samples=ROWS, held_out=40)


def write(folder: Path) -> tuple[str, str]:
    """Write a model and rows into a folder; where they are."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "layers": 2, "steps": 300}
    model, _ = train(replace(BaseSettings(), **sizes), seed=0)
    model.save_pretrained(folder / "model")
    tokenizer().save_pretrained(folder / "model")
    asked = problems(ROWS, 1, "train")
    with (folder / "rows.jsonl").open("w") as file:
        for problem, text in zip(asked, mixture(asked, 1), strict=True):
            verdict = check(problem, text)
            row = {"prompt": problem.prompt, "completion": text, "score": verdict.quality}
            file.write(json.dumps({**row, "correct": bool(verdict.score)}) + "\n")
    return str(folder / "model"), str(folder / "rows.jsonl")


def run(settings: Settings, processes: int = 1) -> Run:
    """A run of SFT with these settings, on processes that each have a GPU."""
    launch = Launch("zero3", "deepspeed", 3, False, "cuda", processes)
    return Run("small", "sft", 0, Options(seeds=(0,), settings=settings), launch)


def digest(prompt: str) -> int:
    """The number that decides whether the rows of a prompt judge: where 5 divides it."""
    return int.from_bytes(hashlib.sha256(" ".join(prompt.split()).encode()).digest()[-4:], "big")
