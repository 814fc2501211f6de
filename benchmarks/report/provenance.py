"""What runs were made with: seeds, environments, versions, hardware, commands."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from benchmarks.report.document import Made
from benchmarks.report.grid import NOTHING, Grid
from benchmarks.report.names import algorithm_label
from benchmarks.report.scores import Cell


class Recorded(Protocol):
    """A finished run, of control or of language."""

    @property
    def seed(self) -> int:
        """Of its draws."""

    @property
    def result(self) -> dict[str, Any]:
        """``result.json``."""

    @property
    def config(self) -> dict[str, Any]:
        """``config.json``."""

    @property
    def versions(self) -> dict[str, str]:
        """Packages it was made with."""


def made(runs: Sequence[Recorded], command: str) -> Made:
    """How a table or figure of these runs came about; ``command`` is that of the report."""
    seeds = " ".join(map(str, sorted({run.seed for run in runs})))
    environments = ", ".join(distinct(run.result.get("env_id") for run in runs))
    return Made(
        f"`{command}`: {len(runs)} runs, seeds {seeds}; {environments + '; ' * bool(environments)}"
        f"{' / '.join(versions(runs)) or 'versions not recorded'}; "
        f"{' / '.join(hardware(runs)) or 'hardware not recorded'}.",
        tuple(commands(runs)) or ("not recorded",),
    )


def versions(runs: Iterable[Recorded]) -> list[str]:
    """The distinct sets of package versions."""
    return distinct(_listed(run.versions) for run in runs)


def hardware(runs: Iterable[Recorded]) -> list[str]:
    """The distinct machines."""
    return distinct(_listed(run.config.get("hardware", {})) for run in runs)


def commands(runs: Iterable[Recorded]) -> list[str]:
    """The distinct commands, see :func:`shareable`."""
    return distinct(shareable(run.config.get("command", "")) for run in runs)


def shareable(command: str) -> str:
    """A command with the folders of its machine cut off: ``/home/me/x.hdf5`` becomes ``x.hdf5``.

    Reports are passed on; where a file lay on another's disk helps nobody.
    """
    try:
        words = shlex.split(command)
    except ValueError:  # quotes that do not close: it was recorded without them
        words = command.split()
    return shlex.join(_without_folders(word) for word in words)


def _without_folders(word: str) -> str:
    option, equals, value = word.rpartition("=")
    return option + equals + (Path(value).name if Path(value).is_absolute() else value)


def run_grid(group: Sequence[Cell]) -> Grid:
    """Environment, settings and seeds of every cell."""
    names = ("dataset", "algorithm", "--algo", "environment", "preset", "estimator", "seeds")
    grid = Grid([*names, "settings from"], left=len(names) + 1)
    for cell in group:
        settings = distinct(
            run.config.get("settings", {}).get("settings_from") for run in cell.runs
        )
        grid.rows.append(
            [cell.dataset, algorithm_label(cell.algo), cell.algo]
            + [
                ", ".join(str(value) for value in cell.all(key) if value is not None)
                for key in ("env_id", "preset", "estimator")
            ]
            + [" ".join(str(seed) for seed in cell.seeds), ", ".join(settings) or NOTHING]
        )
    return grid


def distinct(texts: Iterable[str | None]) -> list[str]:
    """Texts that say something, each once, in order."""
    return list(dict.fromkeys(text for text in texts if text))


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {_text(value)}" for key, value in values.items())


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
