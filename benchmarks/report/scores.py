"""Scores over seeds: mean, deviation and bootstrap interval of each dataset and algorithm."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from benchmarks.report.runs import Run

# Fewer seeds carry neither a deviation nor an interval.
MIN_SEEDS = 3
_RESAMPLES = 10_000

# The order of rows, bars and legends.
ALGORITHMS = (
    "bc",
    "bc-10",
    "sft",
    "sft-q",
    "iw-sft",
    "iw-sft-q",
    "iw-sft-step",
    "awac",
    "td3-bc",
    "cql",
    "iql",
    "dt",
)


def bootstrap_interval(values: NDArray[np.float64]) -> tuple[NDArray, NDArray]:
    """95 % percentile-bootstrap interval of the mean over the first axis.

    The resamples are the same at every call: the same values give the same interval.

    Args:
        values: ``[n, ...]``, one row a seed.

    Returns:
        Lower and upper bound, ``[...]``.
    """
    n = len(values)
    draws = np.random.default_rng(0).integers(n, size=(_RESAMPLES, n))
    share = np.stack([(draws == row).mean(axis=1) for row in range(n)], axis=1)  # [resamples, n]
    low, high = np.percentile(np.tensordot(share, values, axes=1), [2.5, 97.5], axis=0)
    return low, high


@dataclass(frozen=True)
class Cell:
    """The runs of one algorithm on one dataset, one a seed.

    Attributes:
        dataset: its name.
        algo: the algorithm, see :attr:`benchmarks.report.runs.Run.algo`.
        runs: by seed.
        unit: ``"score"`` (D4RL-normalised), or ``"return"`` where the dataset has no reference.
    """

    dataset: str
    algo: str
    runs: tuple[Run, ...]
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

    def all(self, key: str) -> list[object]:
        """The distinct values of ``key`` in the results, in the order of the seeds."""
        distinct: list[object] = []
        for run in self.runs:
            if run.result.get(key) not in distinct:
                distinct.append(run.result.get(key))
        return distinct


def cells(runs: Sequence[Run]) -> list[Cell]:
    """Group runs by dataset (alphabetical) and algorithm (in the order of ``ALGORITHMS``)."""
    grouped: dict[tuple[str, str], list[Run]] = {}
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


def algorithm_rank(algo: str) -> tuple[int, bool, str]:
    """Sorting key: the known algorithms in their order, each before its variants, then others."""
    name = algo.rsplit("/", 1)[-1]
    known = ALGORITHMS.index(name) if name in ALGORITHMS else len(ALGORITHMS)
    return known, name != algo, algo


def datasets(group: Iterable[Cell]) -> list[str]:
    """Datasets of the cells, each once, in order."""
    return list(dict.fromkeys(cell.dataset for cell in group))


def algorithms(group: Iterable[Cell]) -> list[str]:
    """Algorithms of the cells, each once, in the order of ``ALGORITHMS``."""
    return sorted({cell.algo for cell in group}, key=algorithm_rank)


def uneven(group: Iterable[Cell]) -> list[str]:
    """One line for each cell whose seeds were not run alike, saying in what they differ."""
    lines = []
    for cell in group:
        held = [_held(run) for run in cell.runs]
        for key in dict.fromkeys(key for one in held for key in one):
            texts = dict.fromkeys(json.dumps(one.get(key), sort_keys=True) for one in held)
            if len(texts) > 1:
                lines.append(
                    f"{cell.dataset}, {cell.algo}: seeds differ in {key} ({', '.join(texts)})"
                )
    return lines


def _held(run: Run) -> dict[str, object]:
    """What the seeds of a cell must have in common."""
    keys = ("preset", "estimator", "steps", "episodes", "env_id", "versions")
    settings = run.config.get("settings", {})
    return {key: run.result.get(key) for key in keys} | {
        key: value for key, value in settings.items() if key not in (*keys, "seed")
    }
