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
class Cell:
    """The control runs of one algorithm on one dataset, one per seed.

    Attributes:
        dataset: Name of the dataset.
        algo: The algorithm, see :attr:`benchmarks.results.FinishedRun.algo`.
        runs: The runs, by seed.
        unit: ``"score"`` (D4RL-normalised), or ``"return"`` where the dataset has no reference.
    """

    dataset: str
    algo: str
    runs: tuple[FinishedRun, ...]
    unit: str

    @property
    def values(self) -> NDArray[np.float64]:
        """Score, or mean return, of the last policy of each seed ``[seeds]``."""
        key = "return_mean" if self.unit == "return" else "normalized_score"
        return np.array([run.result[key] for run in self.runs], dtype=np.float64)

    @property
    def seeds(self) -> list[int]:
        """The seeds, in order."""
        return [run.seed for run in self.runs]

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return float(self.values.mean())

    @property
    def std(self) -> float | None:
        """Standard deviation over seeds (n - 1), None for fewer than three."""
        return float(self.values.std(ddof=1)) if len(self.runs) >= MIN_SEEDS else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """Bootstrap interval of the mean over seeds, None for fewer than three."""
        return interval_over_seeds(self.values)

    @property
    def success_rates(self) -> NDArray[np.float64]:
        """Share of successful episodes of each seed that recorded it ``[at most seeds]``."""
        rates = [run.result.get("success_rate") for run in self.runs]
        return np.array([rate for rate in rates if rate is not None], dtype=np.float64)

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of a run with its reference policy, mean over seeds."""
        return cpu_seconds(self.runs)

    def distinct(self, key: str) -> list[Any]:
        """The distinct values of ``key`` in the results, in the order of the seeds."""
        values: list[Any] = []
        for run in self.runs:
            if run.result.get(key) not in values:
                values.append(run.result.get(key))
        return values

    def differences(self) -> list[str]:
        """Settings in which the seeds differ, such as ``steps (100, 7)``; empty as a rule."""
        settings = [_shared_settings(run) for run in self.runs]
        lines = []
        for key in dict.fromkeys(key for values in settings for key in values):
            texts = dict.fromkeys(
                json.dumps(values.get(key), sort_keys=True) for values in settings
            )
            if len(texts) > 1:
                lines.append(f"{key} ({', '.join(texts)})")
        return lines


def cells(runs: Sequence[FinishedRun]) -> list[Cell]:
    """Group control runs by dataset (alphabetical) and algorithm (in the paper's order)."""
    groups: dict[tuple[str, str], list[FinishedRun]] = {}
    for run in runs:
        groups.setdefault((run.dataset, run.algo), []).append(run)
    without = {run.dataset for run in runs if run.result.get("normalized_score") is None}
    return [
        Cell(
            dataset,
            algo,
            tuple(sorted(groups[dataset, algo], key=lambda run: run.seed)),
            "return" if dataset in without else "score",
        )
        for dataset, algo in sorted(groups, key=lambda name: (name[0], algorithm_rank(name[1])))
    ]


def datasets(group: Iterable[Cell]) -> list[str]:
    """Datasets of the cells, without repetition, in order."""
    return list(dict.fromkeys(cell.dataset for cell in group))


def algorithms(group: Iterable[Cell]) -> list[str]:
    """Algorithms of the cells, without repetition, in the paper's order."""
    return sorted({cell.algo for cell in group}, key=algorithm_rank)


def runs_of(group: Iterable[Cell]) -> list[FinishedRun]:
    """All runs of the cells."""
    return [run for cell in group for run in cell.runs]


def uneven(group: Iterable[Cell]) -> list[str]:
    """One line for each setting in which the seeds of a cell differ."""
    return [
        f"{dataset_label(cell.dataset)}, {algorithm_label(cell.algo)}: seeds differ in {difference}"
        for cell in group
        for difference in cell.differences()
    ]


def interval_over_seeds(values: NDArray[np.float64]) -> tuple[float, float] | None:
    """Bootstrap interval of the mean of ``[seeds]``, None for fewer than three."""
    if len(values) < MIN_SEEDS:
        return None
    low, high = bootstrap_interval(values)
    return float(low), float(high)


def cpu_seconds(runs: Sequence[FinishedRun]) -> float:
    """CPU seconds of a run with its reference, mean over the runs."""
    keys = ("cpu_seconds", "reference_cpu_seconds")
    return float(np.mean([sum(run.result.get(key, 0.0) for key in keys) for run in runs]))


def _shared_settings(run: FinishedRun) -> dict[str, object]:
    """What the seeds of a cell must have in common."""
    keys = ("preset", "estimator", "steps", "published_steps", "episodes", "env_id")
    shared = {key: run.result.get(key) for key in keys} | {"versions": run.versions}
    settings = run.config.get("settings", {})
    own = {key: value for key, value in settings.items() if key not in (*shared, "seed")}
    return _flat(shared | own)


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, object]:
    """Dictionaries in a dictionary as ``outer.inner`` keys."""
    flat: dict[str, object] = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
