"""The one reader of run folders: `<benchmark>/<dataset>/<algo>/seed-<k>/` below a folder."""

from __future__ import annotations

import json
import math
import os
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.runs import CONFIG, RESULT
from benchmarks.stopping import one_line, printable_text
from iwsft import metrics

CONTROL, LANGUAGE, EVALUATION = "d4rl", "llm", "llm-evaluation"
SCORE = "normalized_score"  # of a control run's result
_IDENTITY = ("dataset", "algo", "seed", "preset", "estimator")
_TEXTS = ("env_id", "preset", "estimator")
_NUMBER = (int, float)
_NAMED = re.compile(r"seed-(\d+)(-|$)")  # a copy may have the name seed-<k>-old
_Name = tuple[str, str, str, int]  # benchmark, dataset, algorithm, seed
_Kinds = dict[str, type | tuple[type, ...]]
_ANY: _Kinds = {"dataset": str, "algo": str, "seed": int, "steps": int, "cpu_seconds": _NUMBER}
# What a benchmark's `result.json` must hold.
_REQUIRED: dict[str, _Kinds] = {
    CONTROL: {**_ANY, "episodes": int, "return_mean": _NUMBER, "wall_seconds": _NUMBER},
    LANGUAGE: {**_ANY, "score": _NUMBER, "score_name": str, "interval": list, "n": int},
}
_LEAST = {"seed": 0, "steps": 0, "episodes": 1, "n": 1, "cpu_seconds": 0, "wall_seconds": 0}
_EVALUATED: _Kinds = {"task": str, "title": str, "model": str, "questions": int, "n": int}
_EVALUATED |= {"avg": _NUMBER, "avg_interval": list, "maj": _NUMBER, "pass_at": dict}
# Entries of `config.json` that the report reads; language runs need all but the settings.
_CONFIG: _Kinds = {"settings": dict, "versions": dict, "hardware": dict, "command": str}
_CONFIG |= {"env_kwargs": dict}
_NEEDED = {name: _CONFIG[name] for name in ("versions", "hardware", "command")}


class ResultsError(ValueError):
    """A folder without runs, or a file that is not what a run writes; the message names it."""


@dataclass(frozen=True)
class RecordedRun:
    """A run on disk. ``result``, ``config`` and ``metrics`` are empty where the file is missing.

    ``variant`` names the folders between the folder that was read and the benchmark's, such as
    ``authors`` of ``runs/authors/d4rl/...``, or further ones below that; it is empty for
    ``runs/d4rl/DATASET/ALGO/...``. Its files tell dataset, algorithm and seed; where they are
    damaged, the folder's name does.
    """

    folder: Path
    variant: str
    dataset: str  # of a language run its recipe; those of a variant are ``variant/recipe``
    algo: str  # runs of control of a variant are an algorithm of their own, ``variant/algo``
    seed: int
    result: dict[str, Any]
    config: dict[str, Any]
    metrics: list[dict[str, float]]
    damage: str = ""  # what is wrong with its files; then all three are empty
    is_copy: bool = False  # of a finished run

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
        return _steps(self.config.get("settings", {}))

    @property
    def at_home(self) -> bool:
        """Whether the folder's name is that of the run."""
        names = self.result.get("dataset"), self.result.get("algo"), f"seed-{self.seed}"
        return self.folder.absolute().parts[-3:] == names


def read_all(folder: str | Path, benchmark: str) -> tuple[list[RecordedRun], list[RecordedRun]]:
    """Read the runs of a benchmark, ``CONTROL`` or ``LANGUAGE``, sorted by path.

    ``folder`` is what ``--out`` of the runs named, a part of it, or the ``runs.json`` of a report.
    It raises a ``ResultsError`` without such a folder, or where two folders hold the same run.

    Returns:
        The finished runs; and the others: cut off, failed, running, damaged, copies, or of folders
        that are not named ``seed-<k>``.
    """
    root = Path(folder)
    runs = list(_read_all(root, benchmark))
    # No two trainings take the same seconds to the last digit.
    contents = [json.dumps({**run.result, "seed": None}, sort_keys=True) for run in runs]
    originals: dict[str, RecordedRun] = {}
    # Where a folder's name is not that of the run in it, the folder is the copy.
    pairs = zip(contents, runs, strict=True)
    for content, run in sorted(pairs, key=lambda x: (not x[1].at_home, not _named(x[1].folder))):
        originals.setdefault(content, run)
    finished: dict[tuple[str, str, int], RecordedRun] = {}
    others = []
    for content, run in zip(contents, runs, strict=True):
        key, first = (run.dataset, run.algo, run.seed), originals[content]
        if not run.result:
            others.append(run)
        elif first is not run:
            damage = f"{run.folder} holds a copy of the run in {first.folder}"
            copy = replace(run, result={}, config={}, metrics=[], damage=damage, is_copy=True)
            others.append(copy)
        elif root.is_dir() and not _named(run.folder):
            damage = f"{run.folder} holds a run, and is not named seed-{run.seed}: rename it"
            others.append(replace(run, result={}, config={}, metrics=[], damage=damage))
        elif key in finished:
            name = f"{run.dataset}, {run.algo}, seed {run.seed}"
            folders = f"{run.folder} and {finished[key].folder}"
            raise ResultsError(f"{folders} hold the same run ({name}): remove one of them")
        else:
            finished[key] = run
    return list(finished.values()), others


def read_runs(folder: str | Path, benchmark: str) -> list[RecordedRun]:
    """Read the finished runs of a benchmark, see :func:`read_all`."""
    return read_all(folder, benchmark)[0]


def read_evaluations(folder: str | Path) -> list[dict[str, Any]]:
    """Read the results of ``benchmarks.llm evaluate`` at or below a folder, by model and task.

    A damaged one has the entry ``damage`` alone.
    """
    evaluations = []
    for path in (place / RESULT for place in folders_below(Path(folder))):
        if path.parent.name.startswith("seed-") or not path.exists():
            continue
        try:
            result = read_json(path)
            if result.get("benchmark") == EVALUATION:
                _check_entries(path, result, _EVALUATED)
                _check_entries(path, {"settings": {}, **result}, {"settings": dict})
                if not _is_interval(ends := result["avg_interval"]):
                    raise ResultsError(f"{path}: 'avg_interval' is {ends!r}, not two in order")
                evaluations.append(result)
        except (ResultsError, OSError) as error:
            evaluations.append({"damage": one_line(error)})
    return sorted(evaluations, key=lambda e: (e.get("model", ""), e.get("task", "")))


def _read_all(root: Path, benchmark: str) -> Iterator[RecordedRun]:
    """Read all runs of a benchmark; a damaged one is known by its folder's name."""
    if root.is_file():
        yield from _read_records(root, benchmark)
        return
    for folder, (kind, dataset, algo, number) in _folders(root).items():
        *above, home = folder.relative_to(root).parts[:-3] or ("",)
        if home != kind and kind in above:
            # Folders are between that of the benchmark and the run's own.
            own = (kind, dataset, algo)
            above = [part for part in folder.relative_to(root).parts[:-1] if part not in own]
        result, config = dict[str, Any](), dict[str, Any]()
        rows, damage = list[dict[str, float]](), ""
        try:
            result = read_json(folder / RESULT)
            _check_entries(folder / RESULT, {"benchmark": kind, **result}, {"benchmark": str})
            if result.get("benchmark", kind) != benchmark:
                continue
            if (folder / RESULT).exists():
                _check_result(folder / RESULT, result, benchmark)
            config = read_json(folder / CONFIG)
            for name, value in config.items():
                if name in _CONFIG and not isinstance(value, _CONFIG[name]):
                    raise ResultsError(f"{folder / CONFIG}: {name!r} is {value!r}")
            # A language run without its command is damaged; control's older runs may lack it.
            if result and benchmark == LANGUAGE and (folder / CONFIG).exists():
                _check_entries(folder / CONFIG, config, _NEEDED)
            _check_same_run(folder, result, config)
            rows = _read_metrics(folder / metrics.FILE)
        except (ResultsError, OSError) as error:
            if kind in {CONTROL, LANGUAGE} - {benchmark}:
                continue
            result, config, rows, damage = {}, {}, [], one_line(error)
        variant = printable("/".join(above))
        names = _names(benchmark, variant, printable(dataset), printable(algo))
        yield RecordedRun(folder, variant, *names, number, result, config, rows, damage)


def _read_records(path: Path, benchmark: str) -> Iterator[RecordedRun]:
    """Read the runs that a report recorded; they have no metrics."""
    records = _parse(path)
    if not isinstance(records, list) or not all(isinstance(each, dict) for each in records):
        raise ResultsError(
            f"{path} is not the runs.json of a report: pass that, or a folder of runs"
        )
    for record in records:
        if record.get("benchmark") == benchmark:
            _check_result(path, record, benchmark)
            variant = record.pop("variant", "")
            config = {name: record.pop(name) for name in _CONFIG if record.get(name) is not None}
            names = _names(benchmark, variant, record["dataset"], record["algo"])
            yield RecordedRun(path, variant, *names, record["seed"], record, config, [])


def _names(benchmark: str, variant: str, dataset: str, algo: str) -> tuple[str, str]:
    """Dataset and algorithm of a run, see :class:`RecordedRun`."""
    before = f"{variant}/" if variant else ""
    return (before + dataset, algo) if benchmark == LANGUAGE else (dataset, before + algo)


def printable(value: Any) -> Any:
    """A value whose texts are those of :func:`printable_text`."""
    if isinstance(value, str):
        return printable_text(value)
    if isinstance(value, dict):
        return {printable(key): printable(entry) for key, entry in value.items()}
    return [printable(entry) for entry in value] if isinstance(value, list) else value


def _folders(root: Path) -> dict[Path, _Name]:
    """The folders of runs, with the names of the runs in them."""
    if not root.is_dir():
        raise ResultsError(f"{root} is not a folder: pass the folder that --out of the runs named")
    # The rounds of a loop are in its own table.
    own = (path for path in folders_below(root) if not _of_round(path.relative_to(root)))
    found = {path: name for path in own if (name := _name(path)) is not None}
    # A link to a run has its name, wherever the run is.
    linked = {path.resolve() for path in found if _named(path) and path.is_symlink()}
    return {
        path: name for path, name in found.items() if _named(path) or path.resolve() not in linked
    }


def _of_round(path: Path) -> bool:
    return any(re.fullmatch(r"round-\d+", part) for part in path.parts)


def _named(folder: Path) -> re.Match[str] | None:
    """The seed in the name of a run's folder; None for another name."""
    return _NAMED.match(folder.name)


def _name(folder: Path) -> _Name | None:
    """Benchmark, dataset, algorithm and seed of the run in a folder, None where none is in it.

    Its files tell them, as folders may be copied under another name; where these are damaged, the
    folder's name does.
    """
    for file in (RESULT, CONFIG):
        with suppress(ResultsError, OSError):
            content = read_json(folder / file)
            about: Any = [content.get(key) for key in ("benchmark", *_IDENTITY[:3])]
            kind, dataset, algo, seed = about
            texts = kind in (CONTROL, LANGUAGE) and isinstance(dataset, str)
            if texts and isinstance(algo, str) and _is_number(seed, least=0):
                return kind, dataset, algo, int(seed)
    named = _named(folder)
    if named is None or not any((folder / f).exists() for f in (CONFIG, RESULT, metrics.FILE)):
        return None
    kind, dataset, algo = ("", "", "", *folder.absolute().parts)[-4:-1]
    return kind, dataset, algo, int(named[1])


def folders_below(root: Path) -> list[Path]:
    """All folders at or below one, sorted; what is behind links is there, too, and once."""
    found, seen, later = list[Path](), set[tuple[int, int]](), deque([root])
    while later:
        # What is there by itself comes before what links lead to.
        for place, names, _ in os.walk(later.popleft()):
            found.append(Path(place))
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in seen:
                names.clear()
            seen.add((status.st_dev, status.st_ino))
            later += filter(Path.is_symlink, (Path(place, name) for name in names))
    return sorted(found)


def _check_result(path: Path, result: dict[str, Any], benchmark: str) -> None:
    _check_entries(path, result, _REQUIRED[benchmark])

    def check(name: str, what: str, fits: Callable[[Any], bool]) -> None:
        value = result.get(name)
        if value is not None and not fits(value):
            raise ResultsError(f"{path}: {name!r} is {value!r}, not {what}")

    for name, least in _LEAST.items():
        check(name, f"a number from {least}", partial(_is_number, least=least))
    for name in _TEXTS:
        check(name, "a text", lambda text: isinstance(text, str))
    check(SCORE, "a number", _is_number)
    check("success_rate", "a share of the episodes", lambda x: _is_number(x) and 0 <= x <= 1)
    check("interval", "two numbers in order", _is_interval)
    for name, of_episodes in ((SCORE, "episode_scores"), ("return_mean", "episode_returns")):
        values = result.get(of_episodes)
        if values is not None and not _is_mean(result.get(name), values):
            problem = f"{name!r} is {result.get(name)!r}, not the mean of {of_episodes!r}"
            raise ResultsError(f"{path}: {problem}")


def _is_interval(ends: Any) -> bool:
    numbers = isinstance(ends, list) and len(ends) == 2 and all(map(_is_number, ends))
    return numbers and bool(ends[0] <= ends[1])


def _is_mean(mean: Any, values: Any) -> bool:
    numbers = isinstance(values, list) and values and all(map(_is_number, [mean, *values]))
    # Around 0 the mean is the rounding of larger numbers.
    return bool(numbers) and abs(sum(values) / len(values) - mean) <= 1e-6 * max(map(abs, values))


def _check_same_run(folder: Path, result: dict[str, Any], config: dict[str, Any]) -> None:
    """Check that a result is of the run that ``config.json`` describes."""
    settings = config.get("settings", {})
    pairs = {name: (result.get(name), config.get(name)) for name in _IDENTITY}
    pairs["steps"] = result.get("steps"), _steps(settings)
    for name, (ours, theirs) in pairs.items():
        if None not in (ours, theirs) and ours != theirs:
            problem = f"{name!r} is {ours!r} in {RESULT} and {theirs!r} in {CONFIG}"
            raise ResultsError(f"{folder} mixes two runs ({problem}): run it again")


def _steps(settings: dict[str, Any]) -> int | None:
    """Updates that the settings of a control run ask for."""
    parts = [settings[name] for name in ("fine_tuning", "cloning", "baseline") if name in settings]
    return parts[0].get("steps") if parts and isinstance(parts[0], dict) else None


def _is_number(value: Any, least: float = -math.inf) -> bool:
    number = isinstance(value, _NUMBER) and not isinstance(value, bool) and math.isfinite(value)
    return number and bool(value >= least)


def _check_entries(path: Path, content: dict[str, Any], kinds: _Kinds) -> None:
    for key, kind in kinds.items():
        value = content.get(key, "missing")
        if not isinstance(value, kind) or (kind == _NUMBER and not _is_number(value)):
            raise ResultsError(f"{path}: {key!r} is {value!r}; remove the folder and run again")


def as_records(records: Iterable[Mapping[str, Any]]) -> str:
    """The text of a file of records: a JSON array with a line for each."""
    lines = ",\n".join(map(json.dumps, records))
    return f"[\n{lines}\n]\n"


def read_json(path: Path) -> dict[str, Any]:
    """The object of a file, empty without the file."""
    value = _parse(path) if path.exists() else {}
    if not isinstance(value, dict):
        raise ResultsError(f"{path} holds no JSON object: remove its folder and run again")
    return value


def _read_metrics(path: Path) -> list[dict[str, float]]:
    rows = _parse(path, metrics.read) if path.exists() else []
    for row in rows:
        numbers = isinstance(row, dict) and all(isinstance(x, _NUMBER) for x in row.values())
        if not numbers or not _is_number(row.get("step")):
            raise ResultsError(f"{path} has a row that is not of numbers with a step: {row!r}")
    return rows


def _parse(path: Path, read: Callable[[Path], Any] | None = None) -> Any:
    # A pipe would wait for its writer.
    if not path.is_file():
        raise ResultsError(f"{path} is not a file; remove it")
    try:
        return printable(json.loads(path.read_text()) if read is None else read(path))
    except (ValueError, RecursionError) as error:
        way_out = "mend it, or remove its folder and run again"
        raise ResultsError(f"{path} is not JSON ({error}): {way_out}") from error
