"""Runs of one algorithm on one dataset over their seeds: names, order, and statistics."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from baselines import BASELINES
from benchmarks import statistics
from benchmarks.results import SCORE, RecordedRun
from benchmarks.runs import CONFIG
from benchmarks.statistics import MIN_SEEDS, Difference, Scores, t_interval
from iwsft.checkpoint import leaves

# Name of --algo -> the paper's notation where it has one, and the colour, in the order of the
# columns of the paper's tables. Greys: cloning; blues: SFT; oranges: iw-SFT; greens: other weights
# of SFT; the rest: offline RL. All can be seen on white and on a dark page.
ALGORITHMS = {
    "bc": ("BC", "#a0a0a0"),
    "bc-10": ("BC-10%", "#757575"),
    "awac": ("AWAC", "#2a9d6f"),
    "td3-bc": ("TD3+BC", "#8b6fc4"),
    "rebrac": ("ReBRAC", "#b5523b"),
    "cql": ("CQL", "#9c8d00"),
    "iql": ("IQL", "#d46aa5"),
    "dt": ("DT", "#1a9fae"),
    "base": ("base", "#8c8c8c"),
    "sft": ("SFT", "#4ba6dd"),
    "sft-q": ("SFT(Q)", "#2f78c4"),
    "rwr": ("RWR", "#5566b8"),
    "iw-sft": ("iw-SFT", "#d9901e"),
    "iw-sft-hard": ("iw-SFT-hard", "#c2671c"),
    "iw-sft-ema": ("iw-SFT-EMA", "#b8341b"),
    "iw-sft-q": ("iw-SFT(Q)", "#e0561d"),
    "iw-sft-step": ("iw-SFT-step", "#a4703c"),
    "dft": ("DFT", "#5b8c3a"),
    "power": ("power of p", "#7fa650"),
    "chord-phi": ("CHORD-phi", "#3f7d5a"),
    "psft": ("PSFT", "#6f8f2f"),
    "eaft": ("EAFT", "#93a83d"),
    "asft": ("ASFT", "#2f7a4a"),
    "minor-sft": ("MinorSFT", "#4f9b78"),
    "topr": ("TOPR", "#4a8f8f"),
    "nft": ("NFT", "#3c7585"),
    "asymre": ("AsymRE", "#6aa6a0"),
}
_OTHER = "#808080"
# Entry of a control run that is its score where the dataset has no reference scores.
RETURN = "return_mean"
UNDER_TRAINED = "fewer than half of the published updates"
# Metrics of a learning curve, and the equal parts of the updates over which they are averaged.
_CURVES = {"score": SCORE, "Q": "pred_value"}
_PARTS = 10
_THIRD = 4  # the last part less this one from the end spans the last third
_LEAST_CHANGE = 0.01  # of the value
# Settings that are recorded only where they are given, in control and in the training of language.
_UNSET = {"q": None, "target_ess": None, "ties": None, "policy": None}
_UNSET_TRAINING = {"q": None, "reference": None, "normalize_data_weights": False}
# What a run reads, each with its digest where that is recorded.
_SOURCES = ("model", "data", "eval_data", "eval_share")
_DIGESTS = tuple(f"{name}_sha256" for name in _SOURCES)
# Packages that decide what an environment or a verifier does.
_TESTED_BY = ("gymnasium", "mujoco", "gymnasium-robotics", "math-verify")
_SHARE = re.compile(r"bc-(\d+(?:\.\d+)?)")


def base(algo: str) -> str:
    """The algorithm of a variant, ``sft-q`` of ``authors/sft-q``; any other name as it is."""
    return algo.rsplit("/", 1)[-1]


def _family(algo: str) -> str:
    """The entry of ``ALGORITHMS`` of an algorithm, such as ``bc-10`` of ``bc-5``, or its name."""
    return "bc-10" if _SHARE.fullmatch(base(algo)) else base(algo)


def published_steps(run: RecordedRun) -> int:
    """Updates of a published run; the run's own, where it has as many or nothing is published."""
    # What an algorithm of the user's own records is the default of its file. In control, names of
    # methods for language models are free.
    names = BASELINES if "baseline" in run.config.get("settings", {}) else ALGORITHMS
    recorded = run.result.get("published_steps") if _family(run.algo) in names else None
    return int(recorded or run.result["steps"])


def is_variant(algo: str) -> bool:
    """Whether the name is ``VARIANT/algo``."""
    return "/" in algo


def algorithm_label(algo: str) -> str:
    """The paper's notation for an algorithm, its variant in front; unknown names as they are."""
    name = base(algo)
    share = _SHARE.fullmatch(name)
    label = f"BC-{share[1]}%" if share else ALGORITHMS.get(name, (name,))[0]
    return algo.removesuffix(name) + label


def algorithm_colour(algo: str) -> str:
    """The colour of an algorithm in figures; that of others is one grey."""
    return ALGORITHMS[algo][1] if algo in ALGORITHMS else _OTHER


def algorithm_rank(algo: str) -> tuple[int, list[str | float], str]:
    """Sorting key: the known algorithms in their order, each before its variants, then others.

    Numbers in the names of variants count as numbers: k3 is before k10.
    """
    known, name = list(ALGORITHMS), _family(algo)
    rank = known.index(name) if name in known else len(known)
    # Every second part is a number.
    parts = re.split(r"(\d+(?:\.\d+)?)", algo.removesuffix(name))
    return rank, [float(part) if i % 2 else part for i, part in enumerate(parts)], name


def dataset_label(dataset: str) -> str:
    """``a -> b`` for ``a--to--b``, whose reference is cloned on ``a``."""
    return dataset.replace("--to--", " -> ")


@dataclass(frozen=True)
class Cell:
    """The runs of one algorithm on one dataset (or recipe), in the order of their seeds.

    ``score_key`` is the entry of their results that is the score. All agree in their settings;
    ``note`` says in what they differ from other runs of the same names.
    """

    dataset: str
    algo: str
    runs: tuple[RecordedRun, ...]
    score_key: str
    note: str = ""

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
        """95 % interval of the mean over seeds, None for fewer than three or without a spread.

        One seed has the interval over the test's items, where its result gives one.
        """
        if len(self.runs) == 1 and "interval" in self.runs[0].result:
            low, high = self.runs[0].result["interval"]
            return low, high
        return interval_over_seeds(self.values)

    @property
    def under_trained(self) -> bool:
        """Whether a run made fewer than half of the published updates."""
        return any(2 * run.result["steps"] < published_steps(run) for run in self.runs)

    @property
    def moving(self) -> dict[str, tuple[float, float]]:
        """Intervals of the changes of score and Q of a critic that has not levelled off.

        The change is that over the last third of the updates, and its 95 % interval over seeds
        leaves 0 out. Changes of less than 1 % do not count. Without a critic, and with fewer than
        three seeds, there is none.
        """
        curves = [curve_of(run) for run in self.runs]
        changes = {}
        for name in _CURVES if all("Q" in curve for curve in curves) else ():
            ends = [[c.get(name, [None] * _PARTS)[i] for i in (-_THIRD, -1)] for c in curves]
            if any(None in pair for pair in ends):
                continue
            before, after = np.array(ends, np.float64).T
            low, high = map(float, t_interval(after - before))
            large = abs(after.mean() - before.mean()) > _LEAST_CHANGE * abs(after.mean())
            if len(ends) >= MIN_SEEDS and large and not low <= 0 <= high:
                changes[name] = low, high
        return changes

    @property
    def schedule(self) -> dict[str, float]:
        """Learning rate, warm-up and updates of a fine-tuning; empty where none is recorded."""
        tuning = self.runs[0].config.get("settings", {}).get("fine_tuning") or {}
        return {name: tuning[name] for name in ("lr", "warmup", "steps") if name in tuning}

    @property
    def has_reference(self) -> bool:
        """Whether all runs start from a reference policy."""
        return all(run.result.get("reference_cpu_seconds", 0) > 0 for run in self.runs)

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

    def differences(self) -> Iterator[str]:
        """Sentences on what only some seeds recorded, and on versions in which they differ.

        As a rule there is none.
        """
        whole = [run for run in self.runs if run.config]
        if lacking := [str(run.seed) for run in self.runs if whole and not run.config]:
            missing = f"{CONFIG} is missing: seed {', '.join(lacking)}"
            yield f"Seeds differ in their settings ({missing})."
        every = [dict(leaves({"versions": run.versions})) | _settings(run) for run in whole]
        every = [{key: value for key, value in each.items() if value is not None} for each in every]
        for key in dict.fromkeys(itertools.chain(*every)):
            values = [json.dumps(each[key]) if key in each else "not recorded" for each in every]
            if len(distinct := dict.fromkeys(values)) > 1:
                yield f"Seeds differ in {key} ({', '.join(distinct)})."


def curve_of(run: RecordedRun) -> dict[str, list[float | None]]:
    """Score and Q of a run over ten equal parts of its updates, each where it was logged.

    A part has the mean of its rows, None without any.
    """
    recorded: dict[str, list[float | None]] | None = run.result.get("curve")
    if recorded is not None:
        return recorded
    curve: dict[str, list[float | None]] = {}
    for name, key in _CURVES.items():
        rows: list[list[float]] = [[] for _ in range(_PARTS)]
        for row in run.metrics:
            if key in row and 0 < row["step"] <= run.result["steps"]:
                rows[math.ceil(_PARTS * row["step"] / run.result["steps"]) - 1].append(row[key])
        if any(rows):
            curve[name] = [float(f"{np.mean(part):.5g}") if part else None for part in rows]
    return curve


def cells(runs: Sequence[RecordedRun], score_key: str = SCORE) -> list[Cell]:
    """Group runs by dataset (alphabetical) and algorithm (in the paper's order).

    Runs that share a name but not the data, the environment or the unit of the score are of two
    datasets, and those that do not share the settings are of two algorithms. The name belongs to
    the larger part; the name of the other says what differs. The score is the mean return where
    there is no ``score_key``.
    """
    grouped: list[Cell] = []
    ordered = sorted(runs, key=lambda run: (run.dataset, run.seed))
    for dataset, of_dataset in itertools.groupby(ordered, key=lambda run: run.dataset):
        for of_task, apart, note in _parts(list(of_dataset), _task):
            task = f"{dataset} ({apart})" if apart else dataset
            key = RETURN if of_task[0].result.get(score_key) is None else score_key
            tested = versions_note(run.versions for run in of_task if "env_id" in run.result)
            for algo in dict.fromkeys(run.algo for run in of_task):
                for part, difference, own in _parts(
                    [r for r in of_task if r.algo == algo], _settings
                ):
                    variant, _, own_name = algo.rpartition("/")
                    names = (variant, difference.replace("/", "|"), own_name)
                    name = "/".join(filter(None, names))
                    notes = " ".join(filter(None, (own or note, tested)))
                    grouped.append(Cell(task, name, tuple(part), key, notes))
    return sorted(grouped, key=lambda cell: (cell.dataset, algorithm_rank(cell.algo)))


def versions_note(tested: Iterable[Mapping[str, str]]) -> str:
    """A sentence where runs were tested in several versions; empty if they were not."""
    every = list(tested)
    found = {name: sorted({each[name] for each in every if name in each}) for name in _TESTED_BY}
    several = [f"{name} {' and '.join(own)}" for name, own in found.items() if len(own) > 1]
    return f"Not all runs were tested in one version: {', '.join(several)}." if several else ""


def _parts(
    runs: list[RecordedRun], view: Callable[[RecordedRun], dict[str, object]]
) -> Iterator[tuple[list[RecordedRun], str, str]]:
    """Runs that agree in a view; how they differ from the most, short and as a sentence.

    Entries that one of two runs did not record do not count as different.
    """
    views = [view(run) for run in runs]
    texts = [json.dumps(each, sort_keys=True) for each in views]
    usual = dict(views[texts.index(Counter(texts).most_common(1)[0][0])])
    # An entry that most runs did not record may still differ among the others.
    for key in dict.fromkeys(itertools.chain(*views)):
        recorded = [json.dumps(each[key], sort_keys=True) for each in views if key in each]
        usual.setdefault(key, json.loads(Counter(recorded).most_common(1)[0][0]))
    parts: dict[tuple[str, str], list[RecordedRun]] = {}
    for run, own in zip(runs, views, strict=True):
        differ = [
            (key, own[key], usual[key]) for key in own if own[key] != usual.get(key, own[key])
        ]
        name = ", ".join(f"{key} {short(value)}" for key, value, _ in differ)
        pairs = ", ".join(f"{key} {short(a)} (not {short(b)})" for key, a, b in differ)
        note = f"Apart from other runs of the same name: {pairs}." if differ else ""
        parts.setdefault((name, note), []).append(run)
    for words, part in parts.items():
        yield sorted(part, key=lambda run: run.seed), *words


def short(value: object) -> str:
    """A value as text; the beginning of a fingerprint, and the fingerprint of a long text."""
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True)
    if len(text) > 24 and not re.fullmatch("[0-9a-f]+", text):
        text = hashlib.sha256(text.encode()).hexdigest()
    return text if len(text) <= 24 else text[:8]


def datasets(group: Iterable[Cell]) -> list[str]:
    """Datasets of the cells, without repetition, in order."""
    return list(dict.fromkeys(cell.dataset for cell in group))


def algorithms(group: Iterable[Cell]) -> list[str]:
    """Algorithms of the cells, without repetition, in the paper's order."""
    return sorted({cell.algo for cell in group}, key=algorithm_rank)


def runs_of(group: Iterable[Cell]) -> list[RecordedRun]:
    """All runs of the cells."""
    return [run for cell in group for run in cell.runs]


def stack(row: Sequence[Cell]) -> Scores:
    """Scores ``[seeds, datasets]`` of an algorithm; each dataset has the seeds that all have."""
    n = min(len(cell.runs) for cell in row)
    return np.stack([cell.values[:n] for cell in row], axis=1)


def compare(ours: Sequence[Cell], others: Sequence[Cell]) -> Difference | None:
    """Difference of two algorithms on the same datasets; None for fewer than three seeds.

    Their seeds are paired where both start from a reference policy, which is that of the seed. Then
    the interval of Welch would hold the truth too often (``scripts/interval_coverage.py``).
    """
    scores = stack(ours), stack(others)
    if min(map(len, scores)) < MIN_SEEDS:
        return None
    alike = all(a.seeds == b.seeds for a, b in zip(ours, others, strict=True))
    paired = alike and all(cell.has_reference for cell in (*ours, *others))
    return statistics.difference(*scores, paired=paired)


def is_higher(ours: Sequence[Cell], others: Sequence[Cell]) -> bool:
    """Whether the interval of the difference of two algorithms lies above 0."""
    difference = compare(ours, others)
    return difference is not None and difference.settled and difference.estimate.point > 0


def interval_over_seeds(values: NDArray[np.float64], *limits: float) -> tuple[float, float] | None:
    """95 % interval of the mean of ``[seeds]`` within limits.

    It is None for fewer than three seeds, and for equal ones, which tell nothing about the spread.
    """
    if len(values) < MIN_SEEDS or not np.ptp(values):
        return None
    low, high = t_interval(values, *limits)
    return float(low), float(high)


def _task(run: RecordedRun) -> dict[str, object]:
    """What the runs of a dataset must have in common: the data, the test, the score's unit."""
    settings, result = run.config.get("settings", {}), run.result
    # Those of the recipe are recorded by its name alone.
    names = {
        name: settings.get(digest, settings.get(name))
        for name, digest in zip(_SOURCES, _DIGESTS, strict=True)
        if name in settings or "recipe" in settings
    }
    names |= {name: result[name] for name in ("env_id", "n") if name in result}
    if "env_kwargs" in run.config:
        names["env_kwargs"] = run.config["env_kwargs"]
    unit = RETURN if result.get(SCORE) is None else SCORE
    return {"score": result.get("score_name", unit), **names}


def _settings(run: RecordedRun) -> dict[str, object]:
    """What the seeds of a cell must have in common."""
    about = {name: name for name in ("preset", "estimator", "steps")} | {
        "episodes": "eval_episodes"
    }
    settings = run.config.get("settings", {})
    if settings:
        settings = _UNSET | settings
    if "training" in settings:
        settings["training"] = _UNSET_TRAINING | settings["training"]
    apart = (*about, *_task(run), *_DIGESTS, "seed", "settings_from", "max_length")
    own = leaves({key: value for key, value in settings.items() if key not in apart})
    return {name: run.result[key] for key, name in about.items() if key in run.result} | dict(own)
