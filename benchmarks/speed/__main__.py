"""Time and memory against the plain way, in one run: ratio above 1 means faster or smaller.

python -m benchmarks.speed control
python -m benchmarks.speed control --dataset halfcheetah-mixed.hdf5 --json control.json
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from benchmarks.runs import hardware, versions, write_json
from benchmarks.speed.measure import Check, Comparison, DisagreementError, Options


@dataclass(frozen=True, kw_only=True)
class Arguments(Options):
    """What to measure, and how thoroughly."""

    subject: tyro.conf.Positional[Literal["control", "baselines", "language"]]
    """Part of the library whose speed is measured."""
    json: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """File for the rows, versions, hardware and settings."""


def main(arguments: Arguments) -> None:
    """Measure, print the table, write the file."""
    # On one thread processor time is wall time, and ratios do not depend on the number of cores.
    torch.set_num_threads(1)
    log = Console(stderr=True)
    rows: list[Comparison] = []
    checks: list[Check] = []
    try:
        if arguments.json is not None:
            check_writable(arguments.json)
        for figure in measure(arguments):
            if isinstance(figure, Check):
                checks.append(figure)
            else:
                rows.append(figure)
                log.print(f"{figure.ratio:8.2f} x  {figure.name}", highlight=False)
        Console().print(table(rows, checks))
        if arguments.json is not None:
            content: dict[str, Any] = {
                "subject": arguments.subject,
                "seed": arguments.seed,
                "settings": {
                    "dataset": arguments.dataset and arguments.dataset.name,
                    "repeats": arguments.repeats,
                    "scale": arguments.scale,
                    "threads": torch.get_num_threads(),
                },
                "versions": versions(),
                "hardware": hardware("cpu"),
                "rows": [asdict(row) for row in rows],
                "checks": [asdict(check) for check in checks],
            }
            write_json(arguments.json, content)
    except (DisagreementError, ImportError, OSError, ValueError) as error:
        raise SystemExit(f"error: {error}") from error


def measure(arguments: Arguments) -> Iterator[Comparison | Check]:
    """Yield the rows and checks of the subject, the module of its name in this package."""
    try:
        module = import_module(f"benchmarks.speed.{arguments.subject}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "tests":
            raise
        raise ImportError(
            f"{arguments.subject} is compared with the plain versions in tests/oracles: run this "
            "from the root of a checkout"
        ) from error
    yield from module.measure(arguments)


def check_writable(path: Path) -> None:
    """Check that the file can be written, before minutes of measuring."""
    if path.is_dir():
        raise IsADirectoryError(f"--json {path} is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"--json {path}: its folder can't be written to; name another")


def table(rows: list[Comparison], checks: list[Check]) -> Table:
    """Return the rows for a terminal, with the checks below them."""
    out = Table(caption="\n".join(f"{c.name}: {c.value:.2g} (limit {c.limit:g})" for c in checks))
    out.add_column("what, and the peer below")
    for heading in ("ours", "peer", "peer / ours"):
        out.add_column(heading, justify="right", no_wrap=True)
    out.add_column("unit", max_width=12)
    for row in rows:
        names = f"{row.name}\n[dim]  {row.peer_name}[/dim]"
        figures = (f"{row.ours:.4g}", f"{row.peer:.4g}", f"{row.ratio:.2f}")
        out.add_row(names, *figures, row.unit)
    return out


if __name__ == "__main__":
    main(tyro.cli(Arguments, prog="python -m benchmarks.speed", description=__doc__))
