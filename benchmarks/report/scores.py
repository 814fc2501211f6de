"""Runs of one algorithm on one dataset over their seeds: names, order, and statistics."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.results import RecordedRun
from benchmarks.statistics import MIN_SEEDS, t_interval

# Name of --algo -> the paper's notation where it has one, in the order of its tables' columns.
ALGORITHMS = {
    "bc": "BC",
    "bc-10": "BC-10%",
    "awac": "AWAC",
    "td3-bc": "TD3+BC",
    "cql": "CQL",
    "iql": "IQL",
    "dt": "DT",
    "base": "base",
    "sft": "SFT",
    "sft-q": "SFT(Q)",
    "iw-sft": "iw-SFT",
    "iw-sft-hard": "iw-sft-hard",
    "iw-sft-ema": "iw-sft-ema",
    "iw-sft-q": "iw-SFT(Q)",
    "iw-sft-step": "iw-SFT-step",
}
# Entries of a control run's result that may be its score.
SCORE, RETURN = "normalized_score", "return_mean"
_VERSION = re.compile(r"-v\d+$")
_SHARE = re.compile(r"bc-(\d+(?:\.\d+)?)")


def base(algo: str) -> str:
    """The algorithm of a variant, ``sft-q`` of ``authors/sft-q``; any other name as it is."""
    return algo.rsplit("/", 1)[-1]


def is_variant(algo: str) -> bool:
    """Whether the name is ``VARIANT/algo``."""
    return "/" in algo


def algorithm_label(algo: str) -> str:
    """The paper's notation for an algorithm, its variant in front; unknown names as they are."""
    name = base(algo)
    share = _SHARE.fullmatch(name)
    label = f"BC-{share[1]}%" if share else ALGORITHMS.get(name, name)
    return algo.removesuffix(name) + label


def algorithm_rank(algo: str) -> tuple[int, list[str | float], str]:
    """Sorting key: the known algorithms in their order, each before its variants, then others.

    Numbers in the names of variants count as numbers: k3 is before k10.
    """
    known = list(ALGORITHMS)
    name = "bc-10" if _SHARE.fullmatch(base(algo)) else base(algo)
    rank = known.index(name) if name in known else len(known)
    # Every second part is a number.
    parts = re.split(r"(\d+(?:\.\d+)?)", algo.removesuffix(name))
    return rank, [float(part) if i % 2 else part for i, part in enumerate(parts)], name


def dataset_label(dataset: str) -> str:
    """``kitchen-partial -> complete`` for ``kitchen-partial-v0--to--kitchen-complete-v0``.

    Versions and first words are left out where all agree. Names without pre-training data stay as
    they are.
    """
    before, to, after = dataset.partition("--to--")
    if not to:
        return dataset
    names = [before, *after.split("+")]
    versions = {version[0] if (version := _VERSION.search(name)) else "" for name in names}
    if len(versions) == 1:
        names = [name.removesuffix(*versions) for name in names]
    family = names[0].split("-")[0] + "-"
    return f"{names[0]} -> {' + '.join(name.removeprefix(family) for name in names[1:])}"


@dataclass(frozen=True)
class Cell:
    """The runs of one algorithm on one dataset (or recipe), in the order of their seeds.

    ``score_key`` is the entry of their results that is the score.
    """

    dataset: str
    algo: str
    runs: tuple[RecordedRun, ...]
    score_key: str

    @property
    def labels(self) -> list[str]:
        """Names of the dataset and the algorithm for a table."""
        return [dataset_label(self.dataset), algorithm_label(self.algo)]

    @property
    def values(self) -> NDArray[np.float64]:
        """Score of the last policy of each seed ``[seeds]``."""
        return np.array([run.result[self.score_key] for run in self.runs], dtype=np.float64)

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
        """95 % interval of the mean over seeds, None for fewer than three.

        One seed has the interval over the test's items, where its result gives one.
        """
        if len(self.runs) == 1 and "interval" in self.runs[0].result:
            low, high = self.runs[0].result["interval"]
            return low, high
        return interval_over_seeds(self.values)

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

    def distinct(self, key: str) -> list[Any]:
        """The distinct values of ``key`` in the results, in the order of the seeds."""
        return list(dict.fromkeys(run.result.get(key) for run in self.runs))

    def differences(self) -> list[str]:
        """Settings in which the seeds differ, such as ``steps (100, 7)``; empty as a rule."""
        settings = [_shared_settings(run) for run in self.runs]
        lines = []
        for key in dict.fromkeys(itertools.chain(*settings)):
            texts = dict.fromkeys(json.dumps(s.get(key), sort_keys=True) for s in settings)
            if len(texts) > 1:
                lines.append(f"{key} ({', '.join(texts)})")
        return lines


def cells(runs: Sequence[RecordedRun], score_key: str = SCORE) -> list[Cell]:
    """Group runs by dataset (alphabetical) and algorithm (in the paper's order).

    The score of a dataset is the mean return where one of its runs has no ``score_key``.
    """
    groups: dict[tuple[str, str], list[RecordedRun]] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        groups.setdefault((run.dataset, run.algo), []).append(run)
    without = {run.dataset for run in runs if run.result.get(score_key) is None}
    names = sorted(groups, key=lambda name: (name[0], algorithm_rank(name[1])))
    return [
        Cell(*name, tuple(groups[name]), RETURN if name[0] in without else score_key)
        for name in names
    ]


def datasets(group: Iterable[Cell]) -> list[str]:
    """Datasets of the cells, without repetition, in order."""
    return list(dict.fromkeys(cell.dataset for cell in group))


def algorithms(group: Iterable[Cell]) -> list[str]:
    """Algorithms of the cells, without repetition, in the paper's order."""
    return sorted({cell.algo for cell in group}, key=algorithm_rank)


def runs_of(group: Iterable[Cell]) -> list[RecordedRun]:
    """All runs of the cells."""
    return [run for cell in group for run in cell.runs]


def uneven(group: Iterable[Cell]) -> list[str]:
    """One line for each setting in which the seeds of a cell differ."""
    return [
        f"{', '.join(cell.labels)}: seeds differ in {difference}"
        for cell in group
        for difference in cell.differences()
    ]


def interval_over_seeds(values: NDArray[np.float64], *limits: float) -> tuple[float, float] | None:
    """95 % interval of the mean of ``[seeds]`` within limits, None for fewer than three."""
    if len(values) < MIN_SEEDS:
        return None
    low, high = t_interval(values, *limits)
    return float(low), float(high)


def _shared_settings(run: RecordedRun) -> dict[str, object]:
    """What the seeds of a cell must have in common."""
    keys = ("preset", "estimator", "steps", "published_steps", "episodes", "env_id")
    shared = {key: run.result.get(key) for key in keys} | {"versions": run.versions}
    shared["env_kwargs"] = run.config.get("env_kwargs", {})
    settings = run.config.get("settings", {})
    own = {key: value for key, value in settings.items() if key not in (*shared, "seed")}
    return _flat(shared | own)


def _flat(nested: dict[str, Any], prefix: str = "") -> dict[str, object]:
    """Dictionaries in a dictionary as ``outer.inner`` keys."""
    flat: dict[str, object] = {}
    for key, value in nested.items():
        inner = isinstance(value, dict)
        flat |= _flat(value, f"{prefix}{key}.") if inner else {prefix + key: value}
    return flat
