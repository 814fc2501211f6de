"""A model for an evaluation: its prompts in tokens, its stop tokens, its generator."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig

from benchmarks.llm.evaluation.options import Options
from benchmarks.llm.models import first_line, load, load_tokenizer, locate
from iwsft.language.generation import Generator, TransformersGenerator, VLLMGenerator

_ANSWER = "<<<ANSWER>>>"


@dataclass(frozen=True)
class Prompter:
    """Questions in a model's tokens.

    ``stop`` are the tokens that end an answer. ``context`` is the most tokens of prompt and
    completion together. ``note`` is what a reader of the scores must know about the prompts.
    ``identity`` is the model's commit on the hub, or a digest of its weights.
    """

    tokenizer: Any
    stop: frozenset[int]
    context: int | None
    note: str | None
    identity: str

    def prompt(self, text: str) -> list[int]:
        """Encode a user's text as the prompt that the model answers."""
        if self.tokenizer.chat_template is None:
            return list(self.tokenizer.encode(f"{text}\n\n"))
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer.encode(chat, add_special_tokens=False))


def load_prompter(options: Options) -> Prompter:
    """Load the tokenizer and the settings of a model, but not its weights."""
    name = locate(options.model)
    code: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(name, **code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"transformers cannot load --model {name} ({first_line(error)}); pass a folder "
            "written by save_pretrained, or a hub id"
        ) from error
    tokenizer = load_tokenizer(name, **code)
    try:
        ends = GenerationConfig.from_pretrained(name, **code).eos_token_id
    # It is optional.
    except (OSError, ValueError):
        ends = config.eos_token_id
    ends = [ends] if isinstance(ends, int) else ends or []
    stop = {*ends, tokenizer.eos_token_id, *_turn_end(tokenizer)} - {None}
    if not stop:
        raise ValueError(
            f"--model {name} names no token that ends an answer; set eos_token in its tokenizer"
        )
    note = f"{name} has no chat template: the bare question is its prompt"
    return Prompter(
        tokenizer,
        frozenset(stop),
        getattr(config.get_text_config(), "max_position_embeddings", None),
        f"{note}, which suits only base models" if tokenizer.chat_template is None else None,
        getattr(config, "_commit_hash", None) or _digest(Path(name)),
    )


def load_generator(options: Options) -> Generator:
    """Load the weights."""
    if options.backend == "vllm":
        return VLLMGenerator(
            locate(options.model),
            dtype=options.dtype,
            parallel=max(1, torch.cuda.device_count()),
            trust_remote_code=options.trust_remote_code,
        )
    spread: dict[str, Any] = {"device_map": "auto"} if options.device == "auto" else {}
    model: Any
    model, _ = load(
        options.model,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
        **spread,
    )
    if not spread:
        try:
            model.to(options.device)
        except RuntimeError as error:
            raise ValueError(
                f"--model {options.model} does not fit on --device {options.device}: "
                f"{first_line(error)}"
            ) from error
    return TransformersGenerator(model, batch_size=options.batch)


def _turn_end(tokenizer: Any) -> set[int]:
    """Return the special token that the chat template writes after an assistant's turn, if any.

    A model tuned on chats ends with it, also where its tokenizer still names a base model's end.
    """
    if tokenizer.chat_template is None:
        return set()
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(_ANSWER)[2]
    tokens = tokenizer.encode(after, add_special_tokens=False)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return set(tokens[:1]) & special


def _digest(folder: Path) -> str:
    """Return the SHA-256 of the weight files' names, sizes and 16 blocks spread over each.

    All of 65 GB would take minutes; training changes every block.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".safetensors", ".bin"):
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for number in range(16):
                    file.seek(max(0, size - 2**16) * number // 15)
                    digest.update(file.read(2**16))
    return digest.hexdigest()
