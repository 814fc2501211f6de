"""The base model: a small Qwen2 decoder trained from scratch on the mixture of strategies."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

import torch
from rich.progress import track
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from benchmarks.llm.recipes.arithmetic.strategies import mixture
from benchmarks.llm.recipes.arithmetic.task import problems
from benchmarks.llm.recipes.arithmetic.tokenizer import CONTEXT, EOS, PAD, VOCABULARY, tokenizer

_IGNORED = -100
_LOGGED_EVERY = 50
# Tables of digits are learnt in a sudden drop of the loss; a larger start and shorter wavelengths
# of the rotary embedding than language models have bring it earlier.
_INITIALIZER_RANGE = 0.08
_ROPE_THETA = 10.0


@dataclass(frozen=True)
class BaseSettings:
    """Size and training of the base model; the defaults have 1.09M parameters."""

    hidden_size: int = 128
    intermediate_size: int = 576
    layers: int = 4
    heads: int = 4
    key_value_heads: int = 2
    steps: int = 1300
    """Updates, each on texts not seen before."""
    batch_size: int = 16
    """Texts an update."""
    lr: float = 1.2e-3
    """Peak, after the warm-up; then a cosine to 0."""
    warmup: int = 30
    weight_decay: float = 0.1


def train(settings: BaseSettings, seed: int) -> tuple[Qwen2ForCausalLM, list[list[float]]]:
    """Next-token loss on the completions of :func:`mixture`, AdamW.

    Returns:
        The model in eval mode, and ``[[update, mean loss since the last], ...]``.
    """
    tokens, labels = _texts(settings, seed)
    # The caller's own draws do not depend on whether the model was kept.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config(settings))
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.lr, (0.9, 0.95), weight_decay=settings.weight_decay, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: (
            min(1.0, (step + 1) / settings.warmup)
            * (1 + math.cos(math.pi * step / settings.steps))
            / 2
        ),
    )
    losses: list[list[float]] = []
    recent: list[float] = []
    for step in track(range(settings.steps), "arithmetic base model", transient=True):
        rows = slice(step * settings.batch_size, (step + 1) * settings.batch_size)
        logits = model(input_ids=tokens[rows]).logits[:, :-1]
        loss = nn.functional.cross_entropy(
            logits.flatten(0, 1), labels[rows, 1:].flatten(), ignore_index=_IGNORED
        )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        recent.append(loss.item())
        if (step + 1) % _LOGGED_EVERY == 0 or step + 1 == settings.steps:
            losses.append([step + 1, sum(recent) / len(recent)])
            recent.clear()
    model.eval()
    return model, losses


def config(settings: BaseSettings) -> Qwen2Config:
    """The Qwen2 architecture at these sizes, for the built-in tokenizer."""
    return Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": _ROPE_THETA},
        initializer_range=_INITIALIZER_RANGE,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=VOCABULARY.index(EOS),
        pad_token_id=VOCABULARY.index(PAD),
    )


def _texts(settings: BaseSettings, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels of all updates, ``[steps * batch_size, longest]``, padded on the right."""
    encode: PreTrainedTokenizerFast = tokenizer()
    asked = problems(settings.steps * settings.batch_size, seed, "train")
    written = mixture(asked, seed)
    prompts = encode([problem.prompt for problem in asked])["input_ids"]
    completions = encode([text + encode.eos_token for text in written])["input_ids"]
    rows = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
    longest = max(map(len, rows))
    tokens = torch.full((len(rows), longest), encode.pad_token_id)
    labels = torch.full((len(rows), longest), _IGNORED)
    for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        tokens[number, : len(row)] = torch.tensor(row)
        labels[number, len(prompt) : len(row)] = tokens[number, len(prompt) : len(row)]
    return tokens, labels


def check_settings(settings: BaseSettings) -> None:
    for name, value in asdict(settings).items():
        if value <= 0 and name != "weight_decay":
            raise ValueError(f"{name}={value} of the base model must be above 0")
    if settings.hidden_size % (2 * settings.heads) or settings.heads % settings.key_value_heads:
        raise ValueError(
            f"hidden_size={settings.hidden_size} must be a multiple of 2 heads "
            f"({settings.heads} heads), and heads of key_value_heads={settings.key_value_heads}"
        )
