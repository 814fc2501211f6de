"""The one reader of run folders: `<benchmark>/<dataset>/<algo>/seed-<k>/` below a folder."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
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
class RecordedRun:
    """A run on disk. ``result``, ``config`` and ``metrics`` are empty where the file is missing.

    ``variant`` names the folders between the folder that was read and the benchmark's, such as
    ``authors`` of ``runs/authors/d4rl/...``; it is empty for ``runs/d4rl/...``. Without a result,
    the folder's name tells dataset, algorithm and seed.
    """

    folder: Path
    variant: str
    dataset: str  # or the recipe of a language run
    algo: str  # runs of a variant are an algorithm of their own, ``variant/algo``
    seed: int
    result: dict[str, Any]
    config: dict[str, Any]
    metrics: list[dict[str, float]]

    @property
    def versions(self) -> dict[str, str]:
        """Packages that trained and scored the run."""
        return {**self.config.get("versions", {}), **self.result.get("versions", {})}

    @property
    def step(self) -> int:
        """Last update that it logged, 0 for none."""
        return int(self.metrics[-1]["step"]) if self.metrics else 0

    @property
    def steps(self) -> int | None:
        """Updates of a whole run without its reference policy, where ``config.json`` says so."""
        settings = self.config.get("settings", {})
        parts = ("fine_tuning", "cloning", "baseline")
        return next((settings[part].get("steps") for part in parts if part in settings), None)


def read_runs(folder: str | Path, benchmark: str) -> list[RecordedRun]:
    """Read all finished runs of a benchmark below ``folder``, sorted by path.

    Args:
        folder: Folder that ``--out`` of the runs named, or a part of it.
        benchmark: ``CONTROL`` or ``LANGUAGE``.

    Raises:
        ResultsError: A file is not what a run writes, or two folders hold the same run.
    """
    runs: dict[tuple[str, str, int], RecordedRun] = {}
    for run in _read_all(Path(folder), benchmark):
        key = run.dataset, run.algo, run.seed
        if run.result and key in runs:
            name = f"{run.dataset}, {run.algo}, seed {run.seed}"
            folders = f"{run.folder} and {runs[key].folder}"
            raise ResultsError(f"{folders} hold the same run ({name}): remove one of them")
        if run.result:
            runs[key] = run
    return list(runs.values())


def unfinished_runs(folder: str | Path, benchmark: str) -> list[RecordedRun]:
    """Read all runs below ``folder`` that have no result: cut off, failed, or still running."""
    return [run for run in _read_all(Path(folder), benchmark) if not run.result]


def _read_all(root: Path, benchmark: str) -> Iterator[RecordedRun]:
    """Read all runs of a benchmark."""
    for folder in _folders(root):
        kind, dataset, algo, seed = folder.absolute().parts[-4:]
        result = _read_json(folder / RESULT)
        _check_entries(folder / RESULT, {"benchmark": kind, **result}, {"benchmark": str})
        # The entries decide, as folders may be copied under another name.
        if result.get("benchmark", kind) != benchmark:
            continue
        number = int(seed.removeprefix("seed-"))
        if (folder / RESULT).exists():
            _check_result(folder / RESULT, result, benchmark)
            dataset, algo, number = result["dataset"], result["algo"], result["seed"]
        config = _read_json(folder / CONFIG)
        # A language run without its command is damaged; control's older runs may lack it.
        if result and benchmark == LANGUAGE and (folder / CONFIG).exists():
            _check_entries(folder / CONFIG, config, _CONFIG)
        path = folder / metrics.FILE
        rows = _parse(path, metrics.read) if path.exists() else []
        parts = folder.relative_to(root).parts[:-4]
        variant, name = "/".join(parts), "/".join((*parts, algo))
        yield RecordedRun(folder, variant, dataset, name, number, result, config, rows)


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


def _check_result(path: Path, result: dict[str, Any], benchmark: str) -> None:
    _check_entries(path, result, _REQUIRED[benchmark])
    for key in ("normalized_score", "return_mean", "score"):
        value = result.get(key)
        number = isinstance(value, _NUMBER) and not isinstance(value, bool)
        if value is not None and not (number and math.isfinite(value)):
            raise ResultsError(f"{path}: {key!r} is {value!r}, not a number")
    rate = result.get("success_rate")
    if rate is not None and not (isinstance(rate, _NUMBER) and 0 <= rate <= 1):
        raise ResultsError(f"{path}: 'success_rate' is {rate!r}, not a share of the episodes")


def _check_entries(path: Path, content: dict[str, Any], kinds: _Kinds) -> None:
    for key, kind in kinds.items():
        if not isinstance(content.get(key), kind):
            wrong = f"{key!r} is {content.get(key, 'missing')!r}"
            raise ResultsError(f"{path}: {wrong}; remove the folder and run again")


def _read_json(path: Path) -> dict[str, Any]:
    """The object of a file, empty without the file."""
    value = _parse(path, lambda path: json.loads(path.read_text())) if path.exists() else {}
    if not isinstance(value, dict):
        raise ResultsError(f"{path} holds no JSON object: remove its folder and run again")
    return value


def _parse(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        way_out = "mend it, or remove its folder and run again"
        raise ResultsError(f"{path} is not JSON ({error}): {way_out}") from error
