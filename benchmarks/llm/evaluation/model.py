"""A model as an evaluation needs it: prompts in tokens, what ends an answer, a generator."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.llm.evaluation.arguments import Arguments
from benchmarks.llm.gguf import first_line
from benchmarks.llm.models import load, load_tokenizer, locate
from iwsft.language.generation import Generator, TransformersGenerator, VLLMGenerator

_ANSWER = "<<<ANSWER>>>"
_WEIGHTS = (".safetensors", ".bin")
_BLOCK, _BLOCKS = 2**16, 16


@dataclass(frozen=True)
class Prompter:
    """Questions in a model's tokens.

    Attributes:
        tokenizer: the model's.
        stop: tokens that end an answer.
        context: most tokens of prompt and completion, or None.
        note: what a reader of the scores must know of the prompts, or None.
        identity: tells this model from others: its commit on the hub, or what its weights hold.
    """

    tokenizer: Any
    stop: frozenset[int]
    context: int | None
    note: str | None
    identity: str

    @staticmethod
    def load(arguments: Arguments) -> Prompter:
        """Load tokenizer and settings, no weights.

        Raises:
            ValueError: no model in transformers' format, no tokenizer, or no end token.
        """
        from transformers import AutoConfig, GenerationConfig

        where = locate(arguments.model)
        options: dict[str, Any] = {"trust_remote_code": arguments.trust_remote_code}
        try:
            config = AutoConfig.from_pretrained(where, **options)
        except (OSError, ValueError) as error:
            raise ValueError(
                f"--model {where} is no model that transformers can load ({first_line(error)}); "
                "pass a folder written by save_pretrained, or a hub id"
            ) from error
        tokenizer = load_tokenizer(where, **options)
        try:
            ends = GenerationConfig.from_pretrained(where, **options).eos_token_id
        # It is optional.
        except (OSError, ValueError):
            ends = config.eos_token_id
        stop = {
            *([ends] if isinstance(ends, int) else ends or []),
            *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]),
            *_turn_end(tokenizer),
        }
        if not stop:
            raise ValueError(
                f"--model {where} names no token that ends an answer; set eos_token in its "
                "tokenizer"
            )
        note = None
        if tokenizer.chat_template is None:
            note = (
                f"{where} has no chat template: the bare question is its prompt, which only base "
                "models are used to"
            )
        return Prompter(
            tokenizer,
            frozenset(stop),
            getattr(config.get_text_config(), "max_position_embeddings", None),
            note,
            getattr(config, "_commit_hash", None) or _weights(Path(where)),
        )

    def prompt(self, text: str) -> list[int]:
        """What a user says, as the model is asked it, up to where it answers."""
        if self.tokenizer.chat_template is None:
            return list(self.tokenizer.encode(f"{text}\n\n"))
        chat = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer.encode(chat, add_special_tokens=False))


def check_device(device: str) -> None:
    """Check that a device is there; ``auto`` always is.

    Raises:
        ValueError: it is not.
    """
    if device == "auto":
        return
    try:
        torch.ones(1, device=device).item()
    # What torch raises for names it does not know, and for devices that are not there.
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"--device {device} can't be used here: {first_line(error)}; cpu can"
        ) from error


def generator(arguments: Arguments) -> Generator:
    """Load the weights.

    Raises:
        ImportError: the backend, or what reads the format, is not installed.
        ValueError: the weights do not load, or the device cannot be used.
    """
    if arguments.backend == "vllm":
        return VLLMGenerator(
            locate(arguments.model),
            dtype=arguments.dtype,
            parallel=max(1, torch.cuda.device_count()),
            trust_remote_code=arguments.trust_remote_code,
        )
    spread: dict[str, Any] = {"device_map": "auto"} if arguments.device == "auto" else {}
    loaded, _ = load(
        arguments.model,
        dtype=arguments.dtype,
        trust_remote_code=arguments.trust_remote_code,
        **spread,
    )
    model: Any = loaded
    if not spread:
        try:
            model.to(arguments.device)
        except RuntimeError as error:
            raise ValueError(
                f"--model {arguments.model} does not fit on --device {arguments.device}: "
                f"{first_line(error)}"
            ) from error
    return TransformersGenerator(model, batch_size=arguments.batch)


def _turn_end(tokenizer: Any) -> set[int]:
    """The special token that the chat template puts behind an assistant's words, where it does.

    A model tuned on chats ends with it, also where its tokenizer still names a base model's end.
    """
    if tokenizer.chat_template is None:
        return set()
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(_ANSWER)[2]
    tokens = tokenizer.encode(after, add_special_tokens=False)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return set(tokens[:1]) & special


def _weights(folder: Path) -> str:
    """SHA-256 over names and sizes of the files of weights, and blocks spread over each.

    All of 65 GB would take minutes; training moves every block.
    """
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in _WEIGHTS:
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            for block in _blocks(path, size):
                digest.update(block)
    return digest.hexdigest()


def _blocks(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        for number in range(_BLOCKS):
            file.seek(max(0, size - _BLOCK) * number // (_BLOCKS - 1))
            yield file.read(_BLOCK)
