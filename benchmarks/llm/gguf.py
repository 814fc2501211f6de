"""GGUF files (llama.cpp's format) -> folders that transformers loads and saves."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.llm.kept import file_sha256, kept

_MAGIC = b"GGUF"


def converted(file: Path, cache: Path) -> Path:
    """A folder with the model and tokenizer of a GGUF file, in float32 safetensors.

    Quantised weights are dequantised, which float32 holds without rounding. transformers trains
    such a model but won't save it, so it is saved once here and kept.

    Args:
        file: with the tokenizer in it, as llama.cpp writes it.
        cache: the folder stands in here, under the content of the file and the version of
            transformers.

    Raises:
        FileNotFoundError: no such file.
        ImportError: the package ``gguf`` is not installed.
        ValueError: a file that is no GGUF, is damaged, or holds a model that is not known; or a
            kept folder that is damaged.
        OSError: the folder can't be written.
    """
    _check(file)
    # What the converter makes of a file may change with it.
    name = f"gguf-{file_sha256(file)[:16]}-transformers-{version('transformers')}"
    return kept(cache / name, lambda home: _convert(file, home), remake="run again")


def _check(file: Path) -> None:
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    with file.open("rb") as opened:
        if opened.read(len(_MAGIC)) != _MAGIC:
            raise ValueError(f"{file} is no GGUF file, or a damaged one; fetch it again")
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"reading {file.name} needs the package gguf: pip install gguf"
        ) from error


def _convert(file: Path, home: Path) -> Mapping[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # Readers of binary data stumble in many ways; the one of tokens raises bare Exceptions.
    except Exception as error:
        raise ValueError(
            f"{file} can't be read ({first_line(error)}): it is damaged, or holds an architecture "
            "that transformers does not read from GGUF; fetch it again, or take the model in "
            "safetensors"
        ) from error
    model, report = found
    check_whole(str(file), report)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    # safetensors tells of a full disk in an error of its own.
    if shutil.disk_usage(home).free < size:
        raise OSError(errno.ENOSPC, f"{size / 1e9:.2g} GB are needed", str(home))
    config = model.config
    del config.quantization_config
    config.name_or_path = ""
    # A model that is not marked as quantised; its own weights are never made.
    with torch.device("meta"):
        plain = type(model)(config)
    plain.save_pretrained(home, state_dict=model.state_dict())
    tokenizer.save_pretrained(home)
    return {
        "file": file.name,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }


def check_whole(name: str, report: Mapping[str, Any]) -> None:
    """Refuse weights that lack a part, which transformers makes up at random.

    Args:
        name: of the model, for the error.
        report: what ``from_pretrained`` gives with ``output_loading_info=True``.

    Raises:
        ValueError: naming the missing weights.
    """
    missing = sorted(report["missing_keys"])
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise ValueError(
            f"{name} has no weights for {', '.join(missing[:3])}{more}, which would start at "
            "random: it is damaged, or was saved without its output layer or as another kind of "
            "model; take or save the whole causal language model"
        )


def first_line(error: BaseException) -> str:
    """The first line of an error: transformers tells long stories."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
