"""A tiny Qwen2 of random weights, as a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from tests.datasets.text.chat_tokenizers import byte_level


def decoder(tokenizer: Any, **own: Any) -> Qwen2ForCausalLM:
    """Random weights, with the special tokens of a tokenizer."""
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **own,
    )
    return Qwen2ForCausalLM(config)


def write(folder: Path, *, context: int = 2048, dtype: torch.dtype = torch.float32) -> Path:
    """Write a model with ChatML and the tokens of Qwen2.5 that recipes ask for."""
    tokenizer = byte_level(pad="<|fim_pad|>")
    model = decoder(
        tokenizer,
        # Rounded up, as vocabularies of models are.
        vocab_size=-(-len(tokenizer) // 64) * 64,
        max_position_embeddings=context,
        tie_word_embeddings=True,
        bos_token_id=None,
    )
    model.to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
