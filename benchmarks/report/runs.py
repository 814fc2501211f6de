"""Runs on disk: `<benchmark>/<dataset>/<algo>/seed-<k>/` below a folder."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from iwsft import metrics

_BENCHMARK = "d4rl"
_REQUIRED: dict[str, type | tuple[type, ...]] = {
    "dataset": str,
    "algo": str,
    "seed": int,
    "steps": int,
    "episodes": int,
    "return_mean": (int, float),
    "wall_seconds": (int, float),
    "cpu_seconds": (int, float),
}


class ReportError(ValueError):
    """A run folder that no report can be made of; the message names the file."""


@dataclass(frozen=True)
class Run:
    """One finished run.

    Attributes:
        folder: where it lies.
        variant: folders between the folder that was read and the benchmark's, such as ``authors``
            of ``runs/authors/d4rl/...``; empty for ``runs/d4rl/...``.
        result: ``result.json``.
        config: ``config.json``; empty where the file is missing.
        metrics: rows of ``metrics.jsonl``; empty where the file is missing.
    """

    folder: Path
    variant: str
    result: dict[str, Any]
    config: dict[str, Any]
    metrics: list[dict[str, float]]

    @property
    def dataset(self) -> str:
        return self.result["dataset"]

    @property
    def algo(self) -> str:
        """The algorithm; runs of a variant are an algorithm of their own, ``variant/algo``."""
        return "/".join(filter(None, (self.variant, self.result["algo"])))

    @property
    def seed(self) -> int:
        return self.result["seed"]

    @property
    def score(self) -> float | None:
        """D4RL-normalised score of the last policy, mean over its episodes."""
        return self.result.get("normalized_score")

    @property
    def versions(self) -> dict[str, str]:
        """Packages that the run was trained and scored with."""
        return {**self.config.get("versions", {}), **self.result.get("versions", {})}


@dataclass(frozen=True)
class Unfinished:
    """A run without a result: cut off, failed, or not done yet.

    Attributes:
        folder: where it lies.
        dataset: of the folder's name, as are ``algo`` (see :attr:`Run.algo`) and ``seed``.
        step: updates that it logged last; 0 for none.
        steps: updates that it was to do, where its ``config.json`` says so.
    """

    folder: Path
    dataset: str
    algo: str
    seed: int
    step: int
    steps: int | None


def read_runs(folder: str | Path) -> list[Run]:
    """Read all finished control runs below ``folder``, sorted by path.

    Raises:
        ReportError: a file is not what a run writes, or two folders hold the same run.
    """
    root = Path(folder)
    found: dict[tuple[str, str, int], Run] = {}
    for run_folder in _folders(root):
        if not (run_folder / "result.json").exists():
            continue
        result = _read_json(run_folder / "result.json")
        # A folder that is read may lie within the benchmark's own, so names of folders won't do.
        if result.get("benchmark") != _BENCHMARK:
            continue
        run = _read_run(run_folder, result, root)
        key = (run.dataset, run.algo, run.seed)
        if key in found:
            raise ReportError(
                f"{run_folder} and {found[key].folder} hold the same run ({run.dataset}, "
                f"{run.algo}, seed {run.seed}): remove one of them"
            )
        found[key] = run
    return list(found.values())


def unfinished_runs(folder: str | Path) -> list[Unfinished]:
    """Control runs below ``folder`` without ``result.json``, sorted by path.

    Raises:
        ReportError: a file is not what a run writes.
    """
    root = Path(folder)
    found = []
    for path in _folders(root):
        benchmark, dataset, algo, seed = path.absolute().parts[-4:]
        if benchmark != _BENCHMARK or (path / "result.json").exists():
            continue
        config = path / "config.json"
        rows = _read_metrics(path / metrics.FILE)
        found.append(
            Unfinished(
                folder=path,
                dataset=dataset,
                algo="/".join(filter(None, (_variant(path, root), algo))),
                seed=int(seed.removeprefix("seed-")),
                step=int(rows[-1]["step"]) if rows else 0,
                steps=_planned(_read_json(config)) if config.exists() else None,
            )
        )
    return found


def _planned(config: dict[str, Any]) -> int | None:
    """Updates of the training of a run, the reference's apart."""
    settings = config.get("settings", {})
    for part in ("fine_tuning", "cloning", "baseline"):
        if part in settings:
            return settings[part].get("steps")
    return None


def _variant(folder: Path, root: Path) -> str:
    return "/".join(folder.relative_to(root).parts[:-4])


def _folders(root: Path) -> list[Path]:
    if not root.is_dir():
        raise ReportError(f"{root} is not a folder: pass the folder that --out of the runs named")
    return sorted(path for path in (root, *root.rglob("seed-*")) if _is_run(path))


def _is_run(path: Path) -> bool:
    # The reference policies of the runs lie beside them, in folders seed-<k>-<key>.
    return re.fullmatch(r"seed-\d+", path.name) is not None and any(
        (path / name).exists() for name in ("config.json", "result.json", metrics.FILE)
    )


def _read_run(folder: Path, result: dict[str, Any], root: Path) -> Run:
    for key, kind in _REQUIRED.items():
        if not isinstance(result.get(key), kind):
            raise ReportError(
                f"{folder / 'result.json'}: {key!r} is {result.get(key, 'missing')!r}; "
                "remove the folder and run again"
            )
    for key in ("normalized_score", "return_mean"):
        value = result.get(key)
        if value is not None and not (isinstance(value, (int, float)) and math.isfinite(value)):
            raise ReportError(f"{folder / 'result.json'}: {key!r} is {value!r}, not a number")
    rate = result.get("success_rate")
    if rate is not None and not (isinstance(rate, (int, float)) and 0 <= rate <= 1):
        raise ReportError(
            f"{folder / 'result.json'}: 'success_rate' is {rate!r}, not a share of the episodes"
        )
    config = folder / "config.json"
    return Run(
        folder=folder,
        variant=_variant(folder, root),
        result=result,
        config=_read_json(config) if config.exists() else {},
        metrics=_read_metrics(folder / metrics.FILE),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ReportError(
            f"{path} is not JSON ({error}): remove its folder and run again"
        ) from error
    if not isinstance(value, dict):
        raise ReportError(f"{path} holds no JSON object: remove its folder and run again")
    return value


def _read_metrics(path: Path) -> list[dict[str, float]]:
    if not path.exists():
        return []
    try:
        return metrics.read(path)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ReportError(
            f"{path} has a row that is not JSON ({error}): remove the row, or the folder"
        ) from error
