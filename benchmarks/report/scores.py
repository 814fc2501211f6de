"""Scores over seeds: mean, deviation and bootstrap interval of each dataset and algorithm."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.report.names import algorithm_label, algorithm_rank, dataset_label
from benchmarks.results import FinishedRun
from benchmarks.statistics import MIN_SEEDS, bootstrap_interval


@dataclass(frozen=True)
class Estimate:
    """A point estimate with its 95 % interval."""

    point: float
    low: float
    high: float


@dataclass(frozen=True)
class Cell:
    """The runs of one algorithm on one dataset, one a seed.

    Attributes:
        dataset: its name.
        algo: the algorithm, see :attr:`benchmarks.results.FinishedRun.algo`.
        runs: by seed.
        unit: ``"score"`` (D4RL-normalised), or ``"return"`` where the dataset has no reference.
    """

    dataset: str
    algo: str
    runs: tuple[FinishedRun, ...]
    unit: str

    @property
    def values(self) -> NDArray[np.float64]:
        """Score, or mean return, of the last policy of each seed ``[seeds]``."""
        if self.unit == "return":
            return np.array([run.result["return_mean"] for run in self.runs], dtype=np.float64)
        return np.array([run.score for run in self.runs], dtype=np.float64)

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    @property
    def mean(self) -> float:
        return float(self.values.mean())

    @property
    def std(self) -> float | None:
        """Standard deviation over seeds (n - 1), None for fewer than three."""
        return float(self.values.std(ddof=1)) if len(self.runs) >= MIN_SEEDS else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Bootstrap interval of the mean over seeds, None for fewer than three."""
        if len(self.runs) < MIN_SEEDS:
            return None
        low, high = bootstrap_interval(self.values)
        return float(low), float(high)

    @property
    def success_rates(self) -> NDArray[np.float64]:
        """Share of successful episodes of each seed that recorded it ``[at most seeds]``."""
        rates = [run.result.get("success_rate") for run in self.runs]
        return np.array([rate for rate in rates if rate is not None], dtype=np.float64)

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of a run with its reference policy, mean over seeds."""
        keys = ("cpu_seconds", "reference_cpu_seconds")
        return float(np.mean([sum(run.result.get(key, 0.0) for key in keys) for run in self.runs]))

    def all(self, key: str) -> list[Any]:
        """The distinct values of ``key`` in the results, in the order of the seeds."""
        distinct: list[Any] = []
        for run in self.runs:
            if run.result.get(key) not in distinct:
                distinct.append(run.result.get(key))
        return distinct

    def differences(self) -> list[str]:
        """In what the seeds were not run alike, such as ``steps (100, 7)``; empty as a rule."""
        held = [_held(run) for run in self.runs]
        found = []
        for key in dict.fromkeys(key for one in held for key in one):
            texts = dict.fromkeys(json.dumps(one.get(key), sort_keys=True) for one in held)
            if len(texts) > 1:
                found.append(f"{key} ({', '.join(texts)})")
        return found


def cells(runs: Sequence[FinishedRun]) -> list[Cell]:
    """Group runs by dataset (alphabetical) and algorithm (in the paper's order)."""
    grouped: dict[tuple[str, str], list[FinishedRun]] = {}
    for run in runs:
        grouped.setdefault((run.dataset, run.algo), []).append(run)
    without = {run.dataset for run in runs if run.score is None}
    return [
        Cell(
            dataset,
            algo,
            tuple(sorted(members, key=lambda run: run.seed)),
            "return" if dataset in without else "score",
        )
        for (dataset, algo), members in sorted(
            grouped.items(), key=lambda item: (item[0][0], algorithm_rank(item[0][1]))
        )
    ]


def datasets(group: Iterable[Cell]) -> list[str]:
    """Datasets of the cells, each once, in order."""
    return list(dict.fromkeys(cell.dataset for cell in group))


def algorithms(group: Iterable[Cell]) -> list[str]:
    """Algorithms of the cells, each once, in the paper's order."""
    return sorted({cell.algo for cell in group}, key=algorithm_rank)


def runs_of(group: Iterable[Cell]) -> list[FinishedRun]:
    """All runs of the cells."""
    return [run for cell in group for run in cell.runs]


def uneven(group: Iterable[Cell]) -> list[str]:
    """One line for each thing in which the seeds of a cell were not run alike."""
    return [
        f"{dataset_label(cell.dataset)}, {algorithm_label(cell.algo)}: seeds differ in {difference}"
        for cell in group
        for difference in cell.differences()
    ]


def _held(run: FinishedRun) -> dict[str, object]:
    """What the seeds of a cell must have in common."""
    keys = ("preset", "estimator", "steps", "published_steps", "episodes", "env_id")
    held = {key: run.result.get(key) for key in keys} | {"versions": run.versions}
    settings = {
        key: value
        for key, value in run.config.get("settings", {}).items()
        if key not in (*held, "seed")
    }
    return _flat(held | settings)


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, object]:
    """Dictionaries in a dictionary as ``outer.inner`` keys."""
    flat: dict[str, object] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
