"""The base model in its cache: trained once, checked whenever it is found."""

from __future__ import annotations

import errno
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from benchmarks.llm.kept import kept
from benchmarks.llm.recipes.arithmetic.base import BaseSettings, check_settings, config, train
from benchmarks.llm.recipes.arithmetic.strategies import mixture
from benchmarks.llm.recipes.arithmetic.task import problems
from benchmarks.llm.recipes.arithmetic.tokenizer import VOCABULARY, tokenizer
from iwsft.fingerprint import fingerprint


def base_model(folder: Path, *, seed: int, settings: BaseSettings | None = None) -> Path:
    """Train the base model, or find it in the cache.

    Args:
        folder: of the cache; a model is kept in a folder of its own under a key of the settings,
            the seed, the texts it learns and the versions of torch and transformers.
        seed: of the weights and the texts.
        settings: sizes and training; the defaults take about 70 seconds of a CPU core.

    Returns:
        Folder with model and tokenizer, for ``from_pretrained``, and
        :data:`benchmarks.llm.kept.RECORD`: settings, seed, parameters, losses
        ``[[update, mean since the last], ...]``, cpu_seconds.

    Raises:
        ValueError: a kept model that is damaged, or settings that can't be trained.
        OSError: the folder can't be written; nothing half-written takes its name.
    """
    settings = BaseSettings() if settings is None else settings
    check_settings(settings)

    def make(home: Path) -> dict[str, Any]:
        start = time.process_time()
        model, losses = train(settings, seed)
        spent = time.process_time() - start
        try:
            model.save_pretrained(home)
        except SafetensorError as error:
            # Its own error for a full disk.
            raise OSError(
                errno.EIO,
                f"the base model can't be written to {home.parent} ({error}); see whether there is "
                "space left, and run again",
            ) from error
        tokenizer().save_pretrained(home)
        return {
            "settings": asdict(settings),
            "seed": seed,
            "parameters": sum(p.numel() for p in model.parameters()),
            "losses": losses,
            "cpu_seconds": round(spent, 1),
        }

    home = Path(folder) / f"arithmetic-base-{_key(settings, seed)}"
    return kept(home, make, remake="run again, which trains it anew")


def _key(settings: BaseSettings, seed: int) -> str:
    asked = problems(64, seed, "train")
    return fingerprint(
        {
            **asdict(settings),
            "config": config(settings).to_json_string(),
            "seed": seed,
            # The code that writes them can't be hashed, the texts can.
            "texts": list(zip(asked, mixture(asked, seed), strict=True)),
            "vocabulary": VOCABULARY,
            "versions": (torch.__version__, version("transformers")),
        }
    )[:16]
