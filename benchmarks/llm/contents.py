"""What a run's model and rows hold, which may change or move under their names."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.llm.models import SMOLLM2, commit_of
from benchmarks.llm.recipes import load_recipe
from benchmarks.llm.recipes.chat import split_source
from benchmarks.llm.run import Run
from benchmarks.runs import CONFIG
from iwsft.datasets.text.sources import dataset_commit
from iwsft.fingerprint import WEIGHTS, file_sha256, fingerprint, folder_sha256, model_sha256


def contents_of(run: Run) -> dict[str, str]:
    """What a run's model and rows hold, which may change under their names: for ``config.json``.

    That is the digest of a file or folder, and the commit of a model or dataset of the hub: that of
    the run, else the newest.
    """
    recipe, contents = load_recipe(run.dataset), {}
    for name in ("model", "data", "eval_data"):
        given = getattr(run.options, name)
        source = given or getattr(recipe, name, None)
        if source in (None, SMOLLM2):
            continue
        place, _, config = (source, None, None) if name == "model" else split_source(source)
        if (path := Path(place).expanduser()).exists():
            # What comes with the package is known by its version.
            if given is not None:
                contents[f"{name}_sha256"] = _content_sha256(path, model=name == "model")
            continue
        commit = run.commits.get(name)
        if commit is None:
            commit = commit_of(place) if name == "model" else dataset_commit(place, config)
        if commit is not None:
            contents[f"{name}_commit"] = commit
    return contents


def recorded_settings(run: Run) -> dict[str, Any]:
    """The settings in the ``config.json`` of a run; empty where it has none that can be read."""
    try:
        settings: dict[str, Any] = json.loads((run.folder / CONFIG).read_text())["settings"]
    except (OSError, ValueError, LookupError, TypeError):
        # The claim tells what is wrong with it.
        return {}
    return settings


def moved_sources(run: Run, contents: Mapping[str, str]) -> dict[str, str]:
    """The recorded names of model and rows that have the same contents under their names of now.

    So a run continues where its files or the working directory are other ones.
    """
    before, names = recorded_settings(run), dict[str, str]()
    for name in ("model", "data", "eval_data"):
        key, given = f"{name}_sha256", getattr(run.options, name)
        if key not in contents or before.get(key) != contents[key]:
            continue
        known = before.get(name, given)
        # Another split of the same folder has other rows.
        if name == "model" or split_source(known)[1:] == split_source(given)[1:]:
            names[name] = known
    return names


def changed_source(run: Run) -> Path | None:
    """The model or the rows that have changed since the claim, such as while a run was at work."""
    recorded = recorded_settings(run)
    for name in ("model", "data", "eval_data"):
        digest, source = recorded.get(f"{name}_sha256"), getattr(run.options, name)
        if digest is None or source is None:
            continue
        is_model = name == "model"
        path = Path(source if is_model else split_source(source)[0]).expanduser()
        if path.exists() and _content_sha256(path, model=is_model) != digest:
            return path
    return None


def _content_sha256(path: Path, *, model: bool) -> str:
    """SHA-256 of a file, of a model's folder, or of all files of another folder."""
    if path.is_file():
        return file_sha256(path)
    # Without weights it holds a GGUF file.
    if model and any(file.suffix in WEIGHTS for file in path.iterdir()):
        return model_sha256(path)
    return fingerprint(folder_sha256(path, without=""))
