"""A small Qwen2 model with a tokenizer, as a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

sys.path.append(str(Path(__file__).parents[2] / "language"))

from chat_tokenizers import byte_level


@pytest.fixture(scope="session")
def tiny_qwen2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights, ChatML, and the tokens of Qwen2.5 that recipes ask for."""
    folder = tmp_path_factory.mktemp("tiny-qwen2")
    tokenizer = byte_level(pad="<|fim_pad|>")
    torch.manual_seed(0)
    config = Qwen2Config(
        # Rounded up, as vocabularies of models are.
        vocab_size=-(-len(tokenizer) // 64) * 64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
