"""A model that generates: how it is asked, and its weights in one of the engines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

from benchmarks.llm.models import (
    check_fit,
    commit_of,
    load,
    load_config,
    load_tokenizer,
    locate,
    split_commit,
    with_commit,
)
from iwsft.fingerprint import model_sha256
from iwsft.language.generation import Generator, TransformersGenerator, VLLMGenerator
from iwsft.language.generations import Prompter, turn_end
from iwsft.policies.causal_lm_families import context_of


def pinned(model: str, *configs: Path) -> str:
    """Find a model, see :func:`benchmarks.llm.models.locate`, and name its commit on the hub.

    So that all loads are of one commit. It is that which the first of ``configs`` recorded, each
    the ``config.json`` of an earlier call, else the newest.
    """
    place = locate(model)
    if Path(place).is_dir():
        return place
    for path in configs:
        try:
            config = json.loads(path.read_text())
            if config["model"] == model:
                return with_commit(place, config["settings"]["model"])
        # What is wrong with a config is told where it is claimed.
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return with_commit(place, commit_of(place))


def load_prompter(model: str, *, trust_remote_code: bool = False) -> Prompter:
    """Load the tokenizer and the settings of a model, but not its weights."""
    name = locate(model)
    place, commit = split_commit(name)
    of_commit: dict[str, Any] = {"revision": commit}
    code: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    config = load_config(name, **code)
    tokenizer = load_tokenizer(name, **code)
    check_fit(model, config, tokenizer)
    try:
        ends = GenerationConfig.from_pretrained(place, **of_commit, **code).eos_token_id
    # It is optional.
    except (OSError, ValueError):
        ends = config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    stop = {*ends, tokenizer.eos_token_id, *turn_end(tokenizer)} - {None}
    if not stop:
        raise ValueError(f"--model {name} has no end token; set eos_token in its tokenizer")
    note = f"{name} has no chat template: the bare question is its prompt"
    return Prompter(
        tokenizer,
        frozenset(stop),
        context_of(config),
        f"{note}, which suits only base models" if tokenizer.chat_template is None else None,
        commit_of(name) or model_sha256(Path(name)),
    )


def load_generator(
    model: str,
    *,
    backend: str,
    batch: int,
    device: str,
    dtype: str = "auto",
    trust_remote_code: bool = False,
) -> Generator:
    """Load the weights of a model into an engine, ``transformers`` or ``vllm``."""
    settings: Any = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if backend == "vllm":
        gpus = max(1, torch.cuda.device_count())
        place, commit = split_commit(locate(model))
        return VLLMGenerator(place, revision=commit, parallel=gpus, **settings)
    decoder, _ = load(model, device_map=device, **settings)
    return TransformersGenerator(decoder, batch_size=batch)
