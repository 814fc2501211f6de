"""Which files of a model's folder its digest covers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from iwsft.fingerprint import model_sha256

# What transformers, sentencepiece and authors of models write there, and may change by itself.
DECISIVE = (
    *("model.safetensors", "pytorch_model.bin", "model.safetensors.index.json"),
    *("config.json", "generation_config.json", "adapter_config.json", "modeling_own.py"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "qwen.tiktoken"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja"),
)
IDLE = ("README.md", "LICENSE.txt", ".gitattributes", "gsm8k/result.json", "runs/config.json")


def write(folder: Path, **changed: bytes) -> Path:
    for name in (*DECISIVE, *IDLE):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(changed.get(name, name.encode()))
    return folder


@pytest.mark.parametrize("name", DECISIVE)
def test_every_file_that_decides_a_result_counts(tmp_path: Path, name: str) -> None:
    before = model_sha256(write(tmp_path))
    assert model_sha256(write(tmp_path, **{name: name.upper().encode()})) != before
    (tmp_path / name).unlink()
    assert model_sha256(tmp_path) != before
    (tmp_path / name).write_bytes(name.encode())
    assert model_sha256(tmp_path) == before


def test_the_base_of_adapters_counts(tmp_path: Path) -> None:
    base, adapters = write(tmp_path / "base"), write(tmp_path / "adapters")
    config = adapters / "adapter_config.json"
    config.write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = model_sha256(adapters)
    (base / "model.safetensors").write_bytes(b"other")
    changed = model_sha256(adapters)
    assert changed != before
    # A damaged file does not leave the base out of the digest.
    (base / "model.safetensors").unlink()
    (base / "model.safetensors").symlink_to("nowhere")
    with pytest.raises(FileNotFoundError):
        model_sha256(adapters)


def test_adapters_that_name_themselves_or_each_other_have_a_digest(tmp_path: Path) -> None:
    one, other = write(tmp_path / "one"), write(tmp_path / "other")
    for base in (one, other):
        (one / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
        (other / "adapter_config.json").write_text(
            json.dumps({"base_model_name_or_path": str(one)})
        )
        before = model_sha256(one)
        (one / "model.safetensors").write_bytes(str(base).encode())
        assert model_sha256(one) != before


def test_cards_and_runs_beside_a_model_do_not_count(tmp_path: Path) -> None:
    before = model_sha256(write(tmp_path))
    for name in IDLE:
        (tmp_path / name).write_bytes(b"other")
    assert model_sha256(tmp_path) == before
