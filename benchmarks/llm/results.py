"""Results of a recipe's runs, and what they come to over seeds."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.llm.algorithms import NAMES
from benchmarks.llm.options import LanguageRun
from benchmarks.runs import CONFIG, RESULT, write_json
from benchmarks.statistics import MIN_SEEDS, bootstrap_interval
from iwsft import metrics
from iwsft.checkpoint import CheckpointError

FILE = "results.json"
# Numbers of a recipe's test that stand in the table.
_SHARE = "share_"


@dataclass(frozen=True)
class Result:
    """A finished run.

    Attributes:
        result: ``result.json``.
        config: ``config.json``.
        rows: of ``metrics.jsonl``; empty where nothing was trained.
    """

    result: dict[str, Any]
    config: dict[str, Any]
    rows: list[dict[str, float]]

    @property
    def seed(self) -> int:
        return self.result["seed"]

    @property
    def versions(self) -> dict[str, str]:
        """Packages that the run was made with."""
        return self.config["versions"]


@dataclass(frozen=True)
class Row:
    """An algorithm over its seeds.

    Attributes:
        algo: its name.
        seeds: in order.
        scores: of each.
        score: their mean.
        interval: 95 %: over seeds (bootstrap) where they are three or more; of one run, that of its
            test; None for two.
        score_name: what is scored.
        steps: updates.
        ess: mean over updates, over draws; None where nothing was trained.
        ess_min: the least of all updates.
        weight_max: the largest weight.
        cpu_seconds: of a run, its reference included.
        shares: chances of kinds of answers, where the test tells them.
        curves: by name, ``[updates]``: means over seeds, with ``step`` beside them.
    """

    algo: str
    seeds: list[int]
    scores: list[float]
    score: float
    interval: tuple[float, float] | None
    score_name: str
    steps: int
    ess: float | None
    ess_min: float | None
    weight_max: float | None
    cpu_seconds: float
    shares: dict[str, float]
    curves: dict[str, list[float]]


def read(folder: Path) -> list[Result]:
    """All finished runs of a recipe's folder.

    Raises:
        CheckpointError: a file that is not what a run writes.
    """
    found = []
    for path in sorted(folder.glob(f"*/seed-*/{RESULT}")):
        try:
            result, config = (
                json.loads((path.parent / name).read_text()) for name in (RESULT, CONFIG)
            )
            rows = metrics.read(path.parent / metrics.FILE) if result["steps"] else []
            result["algo"], result["seed"], result["score"], result["interval"], result["n"]
            config["versions"], config["hardware"], config["command"]
        except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path.parent} is not what a run writes ({type(error).__name__}: {error}); "
                "remove it and run again"
            ) from error
        found.append(Result(result, config, rows))
    return found


def unfinished(folder: Path) -> list[Path]:
    """Runs of a recipe's folder that have begun and have no result."""
    begun = sorted(path.parent for path in folder.glob(f"*/seed-*/{CONFIG}"))
    return [run for run in begun if not (run / RESULT).exists()]


def recipe_folders(root: Path) -> list[Path]:
    """Folders ``llm/RECIPE`` at or below ``root`` in which runs have begun."""
    top = root.absolute()
    found = {path.parents[2] for path in top.rglob(f"seed-*/{CONFIG}")}
    # Not that of a folder within a recipe's: it would bring in runs that lie elsewhere.
    return sorted(
        f for f in found if f.parent.name == LanguageRun.benchmark and f.is_relative_to(top)
    )


def summarise(results: list[Result]) -> list[Row]:
    """A row an algorithm, in the order of their names' list."""
    by_name: dict[str, list[Result]] = {name: [] for name in NAMES}
    for each in results:
        by_name.setdefault(each.result["algo"], []).append(each)
    return [
        _row(name, sorted(group, key=lambda each: int(each.result["seed"])))
        for name, group in by_name.items()
        if group
    ]


def write(folder: Path, rows: list[Row]) -> Path:
    """Write the rows, curves apart, as JSON; its path."""
    held = [asdict(row) for row in rows]
    for row in held:
        del row["curves"]
    write_json(folder / FILE, {"rows": held})
    return folder / FILE


def _row(algo: str, group: list[Result]) -> Row:
    held = [each.result for each in group]
    scores = [float(result["score"]) for result in held]
    trained = [result for result in held if "ESS" in result]
    shares = [name for name in held[0] if name.startswith(_SHARE)]
    return Row(
        algo=algo,
        seeds=[result["seed"] for result in held],
        scores=scores,
        score=float(np.mean(scores)),
        interval=_interval(scores, held[0]["interval"]),
        score_name=held[0]["score_name"],
        steps=held[0]["steps"],
        ess=float(np.mean([r["ESS"] for r in trained])) if trained else None,
        ess_min=min(r["ESS_min"] for r in trained) if trained else None,
        weight_max=max(r["weight_max"] for r in trained) if trained else None,
        cpu_seconds=float(
            np.mean([r["cpu_seconds"] + r.get("reference_cpu_seconds", 0.0) for r in held])
        ),
        shares={
            name.removeprefix(_SHARE): float(np.mean([result[name] for result in held]))
            for name in shares
        },
        curves=_curves(group),
    )


def _interval(scores: list[float], own: list[float]) -> tuple[float, float] | None:
    if len(scores) == 1:
        return own[0], own[1]
    if len(scores) < MIN_SEEDS:
        return None
    low, high = bootstrap_interval(np.array(scores))
    return float(low), float(high)


def _curves(group: list[Result]) -> dict[str, list[float]]:
    """Over the updates that all seeds logged."""
    logged = [{row["step"]: row for row in each.rows if "loss" in row} for each in group]
    steps = sorted(set.intersection(*(set(rows) for rows in logged)))
    if not steps:
        return {}
    means = {
        name: [float(np.mean([rows[step][name] for rows in logged])) for step in steps]
        for name in ("loss", "ESS", "weight_max")
    }
    return {"step": [float(step) for step in steps], **means}
