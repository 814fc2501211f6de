"""A model that generates: how it is asked, its weights in an engine, and its answers on disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
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
from iwsft.language.generation import Generator, Request, TransformersGenerator, VLLMGenerator
from iwsft.language.generations import Generation, Key, Prompter, seed_of, turn_end
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


def check_room(
    prompter: Prompter, prompts: Mapping[str, Sequence[int]], new: int, way_out: str
) -> None:
    """Check that prompts leave room for so many new tokens in the model's context."""
    sizes, context = {name: len(tokens) for name, tokens in prompts.items()}, prompter.context
    long = [name for name, size in sizes.items() if context is not None and size + new > context]
    if long:
        raise ValueError(
            f"{long[0]} has {sizes[long[0]]} tokens, and {new} new ones do not fit in the model's "
            f"context of {context} (so in {len(long)} of {len(sizes)} prompts); {way_out}"
        )


def requests_of(
    prompts: Mapping[str, Sequence[int]], keys: Sequence[Key], most: int, *purpose: object
) -> list[Request]:
    """Ask for ``most`` tokens of each answer, whose seed depends on ``purpose`` and its name."""
    return [Request(prompts[name], most, seed_of(*purpose, name, n)) for name, n in keys]


def as_generation(
    tokenizer: Any, request: Request, tokens: Sequence[int], stop: int | None, **thinking: int
) -> Generation:
    """An answer as it is written; ``stop`` is the token that ended it."""
    about = {"seed": request.seed, "tokens": len(tokens), "stopped": stop is not None}
    return {**about, **thinking, "text": tokenizer.decode(tokens)}
