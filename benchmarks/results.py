"""The one reader of run folders: `<benchmark>/<dataset>/<algo>/seed-<k>/` below a folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.runs import CONFIG, RESULT
from iwsft import metrics

CONTROL, LANGUAGE = "d4rl", "llm"
_NUMBER = (int, float)
_Kinds = dict[str, type | tuple[type, ...]]
_ANY: _Kinds = {"dataset": str, "algo": str, "seed": int, "steps": int, "cpu_seconds": _NUMBER}
# What a benchmark's `result.json` must hold.
_REQUIRED: dict[str, _Kinds] = {
    CONTROL: {**_ANY, "episodes": int, "return_mean": _NUMBER, "wall_seconds": _NUMBER},
    LANGUAGE: {**_ANY, "score": _NUMBER, "score_name": str, "interval": list, "n": int},
}
_CONFIG: _Kinds = {"versions": dict, "hardware": dict, "command": str}


class ResultsError(ValueError):
    """A run folder that cannot be read; the message names the file."""


@dataclass(frozen=True)
class RunFolder:
    """A run on disk.

    ``variant`` names the folders between the folder that was read and the benchmark's, such as
    ``authors`` of ``runs/authors/d4rl/...``; it is empty for ``runs/d4rl/...``.
    """

    folder: Path
    variant: str
    dataset: str  # or the recipe of a language run
    algo: str  # runs of a variant are an algorithm of their own, ``variant/algo``
    seed: int


@dataclass(frozen=True)
class FinishedRun(RunFolder):
    """A run with a result; ``config`` and ``metrics`` are empty where the file is missing."""

    result: dict[str, Any]
    config: dict[str, Any]
    metrics: list[dict[str, float]]

    @property
    def versions(self) -> dict[str, str]:
        """Packages that trained and scored the run."""
        return {**self.config.get("versions", {}), **self.result.get("versions", {})}


@dataclass(frozen=True)
class UnfinishedRun(RunFolder):
    """A run without a result: it was cut off, it failed, or it is still running.

    Dataset, algorithm and seed are those of the folder's name.
    """

    step: int  # last update that it logged, 0 for none
    steps: int | None  # updates of a whole run, where ``config.json`` says so


def read_runs(folder: str | Path, benchmark: str) -> list[FinishedRun]:
    """Read all finished runs of a benchmark below ``folder``, sorted by path.

    Args:
        folder: Folder that ``--out`` of the runs named, or a part of it.
        benchmark: ``CONTROL`` or ``LANGUAGE``.

    Raises:
        ResultsError: A file is not what a run writes, or two folders hold the same run.
    """
    root = Path(folder)
    runs: dict[tuple[str, str, int], FinishedRun] = {}
    for path in _folders(root):
        if not (path / RESULT).exists():
            continue
        result = _read_json(path / RESULT)
        # The entry decides, as folders may be copied under another name.
        if result.get("benchmark", path.absolute().parts[-4]) != benchmark:
            continue
        run = _read_run(path, result, root, benchmark)
        key = run.dataset, run.algo, run.seed
        if key in runs:
            raise ResultsError(
                f"{path} and {runs[key].folder} hold the same run ({run.dataset}, {run.algo}, "
                f"seed {run.seed}): remove one of them"
            )
        runs[key] = run
    return list(runs.values())


def unfinished_runs(folder: str | Path, benchmark: str) -> list[UnfinishedRun]:
    """Read all runs of a benchmark below ``folder`` that have no result, sorted by path.

    Raises:
        ResultsError: A file is not what a run writes.
    """
    root = Path(folder)
    runs = []
    for path in _folders(root):
        kind, dataset, algo, seed = path.absolute().parts[-4:]
        if kind != benchmark or (path / RESULT).exists():
            continue
        rows = _read_metrics(path)
        step = int(rows[-1]["step"]) if rows else 0
        settings = _read_config(path).get("settings", {})
        # Those of the training, without those of its reference policy.
        parts = ("fine_tuning", "cloning", "baseline")
        steps = next((settings[part].get("steps") for part in parts if part in settings), None)
        (variant, name), number = _names(path, root, algo), int(seed.removeprefix("seed-"))
        runs.append(UnfinishedRun(path, variant, dataset, name, number, step, steps))
    return runs


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        raise ResultsError(f"{root} is not a folder: pass the folder that --out of the runs named")
    return sorted(
        path
        for path in (root, *root.rglob("seed-*"))
        # The reference policies of the runs are in folders seed-<k>-<key>.
        if re.fullmatch(r"seed-\d+", path.name)
        and any((path / name).exists() for name in (CONFIG, RESULT, metrics.FILE))
    )


def _names(folder: Path, root: Path, algo: str) -> tuple[str, str]:
    """The variant of a folder, and the name of its algorithm with the variant in front."""
    parts = folder.relative_to(root).parts[:-4]
    return "/".join(parts), "/".join((*parts, algo))


def _read_run(folder: Path, result: dict[str, Any], root: Path, benchmark: str) -> FinishedRun:
    path = folder / RESULT
    _check_entries(path, result, _REQUIRED[benchmark])
    for key in ("normalized_score", "return_mean", "score"):
        value = result.get(key)
        if value is not None and not (isinstance(value, _NUMBER) and math.isfinite(value)):
            raise ResultsError(f"{path}: {key!r} is {value!r}, not a number")
    rate = result.get("success_rate")
    if rate is not None and not (isinstance(rate, _NUMBER) and 0 <= rate <= 1):
        raise ResultsError(f"{path}: 'success_rate' is {rate!r}, not a share of the episodes")
    config, rows = _read_config(folder), _read_metrics(folder)
    # A language run without its command is damaged; control's older runs may lack it.
    if benchmark == LANGUAGE and (folder / CONFIG).exists():
        _check_entries(folder / CONFIG, config, _CONFIG)
    variant, name = _names(folder, root, result["algo"])
    dataset, seed = result["dataset"], result["seed"]
    return FinishedRun(folder, variant, dataset, name, seed, result, config, rows)


def _check_entries(path: Path, content: dict[str, Any], kinds: _Kinds) -> None:
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind):
            wrong = f"{key!r} is {content.get(key, 'missing')!r}"
            raise ResultsError(f"{path}: {wrong}; remove the folder and run again")


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    return _read_json(path) if path.exists() else {}


def _read_json(path: Path) -> dict[str, Any]:
    value = _parse(path, lambda path: json.loads(path.read_text()))
    if not isinstance(value, dict):
        raise ResultsError(f"{path} holds no JSON object: remove its folder and run again")
    return value


def _read_metrics(folder: Path) -> list[dict[str, float]]:
    path = folder / metrics.FILE
    return _parse(path, metrics.read) if path.exists() else []


def _parse(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ResultsError(
            f"{path} is not JSON ({error}): mend it, or remove its folder and run again"
        ) from error
