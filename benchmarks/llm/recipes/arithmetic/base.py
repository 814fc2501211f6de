"""The base model: a small Qwen2 decoder trained on the strategies from scratch; its tokenizer."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer

from benchmarks.llm.models import make_once
from benchmarks.llm.recipes.arithmetic import BaseSettings
from benchmarks.llm.recipes.arithmetic.task import ANSWER, STRATEGIES, mixture, problems
from iwsft.fingerprint import fingerprint
from iwsft.progress import Progress

# Tokens of prompt and completion at most; the longest have 33.
CONTEXT = 64
PAD, EOS = "<pad>", "<eos>"
_WORDS = (*(strategy.marker for strategy in STRATEGIES.values()), ANSWER)
_TERMS = tuple(f"{sign}{digit}" for sign in "+-" for digit in range(1, 10))
_BASE = (PAD, EOS, *"0123456789=")
VOCABULARY = (*_BASE, *_WORDS, *_TERMS)
# Prompt and completion are back to back; only the completion is trained on.
_CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)
_IGNORED = -100


def base_model(folder: Path, *, seed: int, settings: BaseSettings) -> Path:
    """Train the base model, or find it in the cache; the defaults take 70 seconds of a CPU core.

    Its folder is named by a key of the settings, the seed, the texts and the versions of torch and
    transformers. ``record.json`` there says how it was trained.
    """

    def make(home: Path) -> dict[str, Any]:
        start = time.process_time()
        model, losses = train(settings, seed)
        spent = time.process_time() - start
        model.save_pretrained(home)
        tokenizer().save_pretrained(home)
        return {
            "settings": asdict(settings),
            "seed": seed,
            "parameters": model.num_parameters(),
            "losses": losses,
            "cpu_seconds": round(spent, 1),
        }

    examples = problems(64, seed, "train")
    key = fingerprint(
        {
            **asdict(settings),
            "config": config(settings).to_json_string(),
            "seed": seed,
            # The code that writes the texts can't be hashed, the texts can.
            "texts": list(zip(examples, mixture(examples, seed), strict=True)),
            "vocabulary": VOCABULARY,
            "versions": (torch.__version__, version("transformers")),
        }
    )
    home = Path(folder) / f"arithmetic-base-{key[:16]}"
    return make_once(home, make)


def train(settings: BaseSettings, seed: int) -> tuple[Qwen2ForCausalLM, list[list[float]]]:
    """Train with AdamW on the completions; also ``[[update, mean loss since the last], ...]``."""
    tokens, labels = _texts(settings, seed)
    # The caller's own generator does not depend on whether the model was in the cache.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2ForCausalLM(config(settings))
    model.train()
    optimizer = torch.optim.AdamW(
        model.parameters(), settings.lr, (0.9, 0.95), weight_decay=settings.weight_decay, fused=True
    )

    def rate(step: int) -> float:
        cosine = 1 + math.cos(math.pi * step / settings.steps)
        return min(1.0, (step + 1) / settings.warmup) * cosine / 2

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    losses: list[list[float]] = []
    recent: list[float] = []
    with Progress() as progress:
        for step in progress.track(range(settings.steps), description="arithmetic base model"):
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
            if (step + 1) % 50 == 0 or step + 1 == settings.steps:
                losses.append([step + 1, sum(recent) / len(recent)])
                recent.clear()
    model.eval()
    return model, losses


def config(settings: BaseSettings) -> Qwen2Config:
    """Describe the Qwen2 architecture at these sizes, for the built-in tokenizer."""
    return Qwen2Config(
        vocab_size=len(VOCABULARY),
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.key_value_heads,
        max_position_embeddings=CONTEXT,
        # Tables of digits are learnt in a sudden drop of the loss; a larger start and shorter
        # wavelengths than language models have bring it earlier.
        rope_parameters={"rope_type": "default", "rope_theta": 10.0},
        initializer_range=0.08,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=VOCABULARY.index(EOS),
        pad_token_id=VOCABULARY.index(PAD),
    )


def _texts(settings: BaseSettings, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens and labels of all updates, ``[steps * batch_size, longest]``, padded on the right."""
    encode = tokenizer()
    examples = problems(settings.steps * settings.batch_size, seed, "train")
    texts = mixture(examples, seed)
    prompts = encode([problem.prompt for problem in examples])["input_ids"]
    completions = encode([text + EOS for text in texts])["input_ids"]
    pairs = list(zip(prompts, completions, strict=True))
    tokens = [torch.tensor(prompt + completion) for prompt, completion in pairs]
    labels = [torch.tensor([_IGNORED] * len(prompt) + completion) for prompt, completion in pairs]
    padding = VOCABULARY.index(PAD)
    return (
        nn.utils.rnn.pad_sequence(tokens, batch_first=True, padding_value=padding),
        nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=_IGNORED),
    )


def tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of 35 tokens with pad, eos and a chat template, without bos.

    Its tokens are digits, signed digits, and the strategies' words. Nothing merges across a
    boundary: the tokens of prompt + completion are those of the prompt and then those of the
    completion. It is for texts of this task; other characters have no token and are dropped.
    """
    # The class that AutoTokenizer takes with a Qwen2 config, whatever tokenizer was saved there.
    tokens = Qwen2Tokenizer(
        vocab={token: index for index, token in enumerate(_BASE)},
        merges=[],
        # The default would be a token more.
        unk_token=None,  # type: ignore[arg-type]
        eos_token=EOS,
        pad_token=PAD,
        chat_template=_CHAT_TEMPLATE,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_max_length=CONTEXT,
    )
    tokens.add_tokens([AddedToken(token, normalized=False) for token in (*_WORDS, *_TERMS)])
    return tokens
