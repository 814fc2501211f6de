"""Time and memory against the plain way, in one run: ratio above 1 means faster or smaller.

python -m benchmarks.speed control
python -m benchmarks.speed control --dataset halfcheetah-mixed.hdf5 --json control.json
"""

from __future__ import annotations

import importlib
import importlib.util
import platform
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.d4rl.plan import hardware, write_json
from benchmarks.speed.measure import Check, DisagreementError, Options, Row, Scale

# A subject is a file of its name beside this one, with measure(Options) -> Iterator[Row | Check].
Subject = Literal["control", "baselines", "language"]
_PACKAGES = ("torch", "tensordict", "torchrl", "gymnasium", "mujoco", "numpy")


@dataclass(frozen=True)
class Arguments:
    """What to measure, and how long to take over it."""

    subject: tyro.conf.Positional[Subject]
    """Whose speed."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """Also write the rows, versions, hardware and settings here."""
    dataset: Annotated[Path | None, tyro.conf.arg(metavar="FILE.hdf5")] = None
    """Dataset in D4RL's layout; by default synthetic data of the paper's shape."""
    repeats: int = 3
    """Repeats of each way, in turn; the median counts."""
    scale: Scale = "paper"
    """Sizes of the paper, or small ones that only show that everything runs."""
    seed: int = 0
    """Of data, parameters and draws."""


def main(arguments: Arguments) -> None:
    """Measure, print the table, write the file."""
    if importlib.util.find_spec(f"benchmarks.speed.{arguments.subject}") is None:
        there = [s for s in get_args(Subject) if importlib.util.find_spec(f"benchmarks.speed.{s}")]
        raise SystemExit(
            f"error: the measurements of {arguments.subject!r} come in a later version; there are "
            f"those of {', '.join(there)}"
        )
    if arguments.repeats < 1:
        raise SystemExit(f"error: --repeats {arguments.repeats}: one is the least")
    options = Options(arguments.dataset, arguments.scale, arguments.repeats, arguments.seed)
    # One thread, so that processor time is wall time and ratios do not hang on the core count.
    torch.set_num_threads(1)
    rows: list[Row] = []
    checks: list[Check] = []
    log = Console(stderr=True)
    try:
        for found in importlib.import_module(f"benchmarks.speed.{arguments.subject}").measure(
            options
        ):
            if isinstance(found, Row):
                rows.append(found)
                log.print(f"{found.ratio:8.2f} x  {found.name}", highlight=False)
            else:
                checks.append(found)
    except (DisagreementError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error
    Console().print(table(rows, checks))
    if arguments.json is not None:
        write_json(arguments.json, report(arguments, rows, checks))


def report(arguments: Arguments, rows: list[Row], checks: list[Check]) -> dict[str, Any]:
    """Contents of the JSON file."""
    dataset = arguments.dataset
    return {
        "subject": arguments.subject,
        "seed": arguments.seed,
        "settings": {
            "dataset": None if dataset is None else dataset.name,
            "repeats": arguments.repeats,
            "scale": arguments.scale,
            "threads": torch.get_num_threads(),
        },
        "versions": {"python": platform.python_version(), **{p: version(p) for p in _PACKAGES}},
        "hardware": hardware("cpu"),
        "rows": [asdict(row) for row in rows],
        "checks": [asdict(check) for check in checks],
    }


def table(rows: list[Row], checks: list[Check]) -> Table:
    """The rows for a terminal, the checks below."""
    out = Table(caption="\n".join(f"{c.name}: {c.value:.2g} (limit {c.limit:g})" for c in checks))
    out.add_column("")
    for heading in ("ours", "peer", "peer / ours"):
        out.add_column(heading, justify="right")
    out.add_column("unit")
    out.add_column("peer is")
    for row in rows:
        figures = (f"{row.ours:.4g}", f"{row.peer:.4g}", f"{row.ratio:.2f}")
        out.add_row(row.name, *figures, row.unit, row.peer_name)
    return out


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="python -m benchmarks.speed", description=__doc__))
