"""The subjects measured, as a table and a file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import rich
import torch

from benchmarks.report.document import Grid
from benchmarks.runs import hardware, tell, versions
from benchmarks.speed.measure import Check, Comparison
from benchmarks.speed.options import Options
from iwsft.files import write_json


def main(options: Options) -> None:
    """Measure, print the table, write the file, whose rows are there as soon as they are known."""
    # On one thread processor time is wall time, and ratios do not depend on the number of cores.
    torch.set_num_threads(1)
    rows: list[Any] = []
    checks: list[Check] = []
    content: dict[str, Any] = {
        "subject": options.subject,
        "seed": options.seed,
        "settings": {
            "repeats": options.repeats,
            "scale": options.scale,
            "threads": torch.get_num_threads(),
        },
        "versions": versions(),
        "hardware": hardware(options.device if options.subject == "gpu" else "cpu"),
    }
    if options.json is not None:
        check_writable(options.json)
    subject = load(options.subject)
    for figure in subject.measure(options):
        if isinstance(figure, Check):
            checks.append(figure)
        else:
            rows.append(figure)
            tell(str(figure))
        content |= {"rows": [asdict(x) for x in rows], "checks": [asdict(x) for x in checks]}
        if options.json is not None:
            write_json(options.json, content)
    grid = getattr(subject, "table", table)(rows, checks)
    rich.print(grid.rich(f"Speed of {options.subject}"))
    if options.subject == "scaling" and options.json is not None:
        slopes = [asdict(each) for each in subject.growth(rows)]
        write_json(options.json, content | {"slopes": slopes})
        options.json.with_suffix(".svg").write_bytes(subject.plot(rows))


def load(subject: str) -> Any:
    """Return the module of a subject, which has its name in this package."""
    try:
        return import_module(f"benchmarks.speed.{subject}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "tests":
            raise
        problem = f"{subject} uses plain versions and a tokenizer of the folder tests"
        raise ImportError(f"{problem}: run this from the root of a checkout") from error


def check_writable(path: Path) -> None:
    """Check that the file can be written, before minutes of measuring."""
    if path.is_dir():
        raise IsADirectoryError(f"--json {path} is a folder; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"--json {path}: its folder can't be written to; name another")


def table(rows: Sequence[Comparison], checks: Sequence[Check]) -> Grid:
    """Return the rows for a terminal, with the checks below them."""
    cells = []
    for row in rows:
        numbers = f"{row.ours:.4g}", f"{row.peer:.4g}", f"{row.ratio:.2f}"
        cells.append([f"{row.name}\n  against {row.peer_name}", row.unit, *numbers])
    notes = [f"{c.name}: {c.value:.2g} (limit {c.limit:g})" for c in checks]
    return Grid(["what", "unit", "ours", "peer", "peer / ours"], cells, notes)
