"""What a model generates, on disk: a line for each answer, written batch by batch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iwsft.checkpoint import CheckpointError
from iwsft.files import full_disk_named
from iwsft.progress import Progress

GENERATIONS = "generations.jsonl"
# A line of the file: id of the question, number of the sample, its seed, tokens and text.
Generation = dict[str, Any]
Key = tuple[str, int]
_ANSWER = "<<<ANSWER>>>"


@dataclass(frozen=True)
class Prompter:
    """Questions in a model's tokens.

    ``stop`` are the tokens that end an answer. ``context`` is the most tokens of prompt and answer.
    ``note`` is what a reader of the scores must know about the prompts. ``identity`` is the model's
    commit on the hub, or a digest of its files.
    """

    tokenizer: Any
    stop: frozenset[int]
    context: int | None
    note: str | None
    identity: str

    def prompt(self, text: str) -> list[int]:
        """Encode a user's text as the prompt that the model answers."""
        if self.tokenizer.chat_template is None:
            return encode_prompt(self.tokenizer, f"{text}\n\n")
        return self.chat([{"role": "user", "content": text}])

    def chat(self, messages: Sequence[Any]) -> list[int]:
        """Encode a conversation by the chat template, up to where the model's answer begins."""
        text = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Encode a text to continue: without the EOS that some tokenizers put after every text."""
    ids, own = (list(tokenizer.encode(text, add_special_tokens=x)) for x in (True, False))
    ended = [*own, tokenizer.eos_token_id]
    return ids[:-1] if ids[-len(ended) :] == ended else ids


def turn_end(tokenizer: Any) -> set[int]:
    """Return the special token that the chat template writes after an assistant's turn, if any.

    It is unknown for a template that writes another answer than the given one.
    """
    # Tuned models end with it, also where the tokenizer still names a base model's end.
    if tokenizer.chat_template is None:
        return set()
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
    _, answer, after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(_ANSWER)
    if not answer:
        return set()
    tokens = tokenizer.encode(after, add_special_tokens=False)
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return set(tokens[:1]) & special


def seed_of(*parts: object) -> int:
    """Return the seed of an answer, below 2^62, which depends only on the parts of its name."""
    text = " ".join(map(str, parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 2


def generate_missing(
    path: Path,
    keys: Sequence[Key],
    generations: list[Generation],
    answer: Callable[[Sequence[Key]], Sequence[Generation]],
    *,
    batch: int,
    title: str,
) -> None:
    """Generate what is missing of ``keys``, and add it to the list and the file, batch by batch.

    Batches are the same in every run, and one that a kill cut is generated again as a whole, so
    that the generations are those of an uninterrupted run, bit for bit. ``generations`` is what
    :func:`read_generations` returned. ``answer`` makes the entries of the keys of a batch, without
    ``id`` and ``sample``. ``title`` is on the progress bar.
    """
    with Progress() as progress:
        task = progress.add_task(title, total=len(keys))
        for start in range(len(generations) // batch * batch, len(keys), batch):
            names = keys[start : start + batch]
            entries = zip(names, answer(names), strict=True)
            whole = [{"id": name, "sample": sample, **own} for (name, sample), own in entries]
            new = whole[len(generations) - start :]
            with full_disk_named(path), path.open("ab") as file:
                file.write("".join(json.dumps(generation) + "\n" for generation in new).encode())
                file.flush()
                os.fsync(file.fileno())
            generations += new
            progress.update(task, completed=len(generations))


def read_generations(path: Path, keys: Sequence[Key]) -> list[Generation]:
    """Read the generations so far, in the order of ``keys``; a line that a kill cut is removed."""
    content = path.read_bytes() if path.exists() else b""
    whole = content[: content.rfind(b"\n") + 1]
    generations: list[Generation] = []
    for number, line in enumerate(whole.splitlines()):
        try:
            generations.append(json.loads(line))
            fits = (generations[-1]["id"], generations[-1]["sample"]) == keys[number]
        except (ValueError, LookupError, TypeError):
            fits = False
        if not fits:
            raise CheckpointError(
                f"{path}:{number + 1} is not the generation that belongs there; remove it and all "
                "lines after it, then pass --resume"
            )
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return generations
