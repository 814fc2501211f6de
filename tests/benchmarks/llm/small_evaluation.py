"""A small evaluation: a model that has a token for each character, questions, and options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.llm.evaluation.options import Options

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SECRET = "Zyzzyva"


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A token a character of ASCII."""
    characters = ["\n", *map(chr, range(32, 127))]
    vocabulary = {character: number for number, character in enumerate([*characters, "<unk>"])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", eos_token="<|end|>")
    made.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    made.chat_template = template
    return made


def save_model(folder: Path, *, seed: int = 0, template: str | None = TEMPLATE) -> Path:
    made = tokenizer(template)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(made),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=700,
        initializer_range=0.3,
        eos_token_id=made.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def write_data(folder: Path) -> None:
    """Write the questions of three tasks."""
    rows: dict[str, list[dict[str, Any]]] = {
        "gsm8k": [{"question": f"How much is {k}+1?", "answer": f"#### {k + 1}"} for k in range(7)],
        "math": [
            {"problem": f"Solve $x={k}$.", "answer": str(k), "unique_id": f"m{k}"} for k in range(3)
        ],
        "gpqa": [
            {
                "Record ID": f"rec{k}",
                "Question": f"{SECRET} {k}?",
                "Correct Answer": f"{SECRET} right",
                **{f"Incorrect Answer {which}": f"{SECRET} wrong {which}" for which in (1, 2, 3)},
            }
            for k in range(3)
        ],
    }
    for name, each in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in each))


def settings(model: Path, data: Path, out: Path, **others: Any) -> Options:
    values: dict[str, Any] = {
        "tasks": (f"gsm8k={data}/gsm8k.jsonl",),
        "max_tokens": 40,
        "batch_size": 4,
        **others,
    }
    return Options(model=str(model), out=out, **values)
