"""SHA-256 of tensors and plain values, and of files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Where an object is in memory, in its text.
_ADDRESS = re.compile(r" at 0x[0-9a-fA-F]+")
# Endings of files of a model's weights.
WEIGHTS = (".safetensors", ".bin")
# Endings and names of its other files that decide a result: configs, tokenizer, templates, code.
_DECISIVE = (".json", ".jinja", ".model", ".tiktoken", ".py", "vocab.txt", "merges.txt")


def fingerprint(entries: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hex) of names, dtypes, shapes and values, in the order of the names.

    Values that are not tensors count by their ``repr``.
    """
    digest = hashlib.sha256()
    for name, value in sorted(entries.items()):
        if not isinstance(value, Tensor):
            digest.update(f"{name} {value!r}\n".encode())
            continue
        digest.update(f"{name} {value.dtype} {list(value.shape)}\n".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        # As bytes: numpy has no bfloat16.
        digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def text_of(value: Any) -> str:
    """Return the ``repr`` of a setting without addresses, the same in every process."""
    return _ADDRESS.sub("", repr(value))


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_sha256(folder: Path, *, without: str) -> dict[str, str]:
    """Return the SHA-256 of each file below a folder, by its path there, but for one name."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != without]
    # Files of a large model are many; hashing leaves the interpreter free.
    with ThreadPoolExecutor(8) as pool:
        digests = [*pool.map(file_sha256, paths)]
    return dict(zip((str(path.relative_to(folder)) for path in paths), digests, strict=True))


def model_sha256(folder: Path, _seen: Sequence[Path] = ()) -> str:
    """Return the SHA-256 of a model's folder: its weights, configs, tokenizer and chat templates.

    Weight files count by name, size and 16 blocks spread over each, the others whole. A card and
    folders below do not count, but for further chat templates. The base of adapters counts, too,
    where it is a folder.
    """
    digest = hashlib.sha256()
    templates = folder.glob("additional_chat_templates/*.jinja")
    for path in (*sorted(folder.iterdir()), *sorted(templates)):
        if path.suffix in WEIGHTS:
            # All of 65 GB would take minutes; training changes every block.
            size = path.stat().st_size
            digest.update(f"{path.name} {size}\n".encode())
            with path.open("rb") as file:
                for number in range(16):
                    file.seek(max(0, size - 2**16) * number // 15)
                    digest.update(file.read(2**16))
        elif path.name.endswith(_DECISIVE) and path.is_file():
            digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    base = _base_of(folder)
    if base is not None and base.resolve() not in {folder.resolve(), *_seen}:
        digest.update(model_sha256(base, (*_seen, folder.resolve())).encode())
    return digest.hexdigest()


def _base_of(adapters: Path) -> Path | None:
    """Return the folder of the model that adapters belong to, if there is one."""
    # Without the file there are none; transformers tells of a damaged one.
    with suppress(FileNotFoundError, ValueError, LookupError, TypeError):
        config = json.loads((adapters / "adapter_config.json").read_text())
        base = Path(config["base_model_name_or_path"])
        return base if base.is_dir() else None
    return None
