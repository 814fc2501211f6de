"""Rows of metrics, and a run's log of them as JSON lines; a resumed run has no row twice."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase

from iwsft.files import full_disk_named, write_json_lines
from iwsft.schedule import Schedule

FILE = "metrics.jsonl"
Row = dict[str, float]


class MetricsLog:
    """Appends a JSON object for each row to ``metrics.jsonl`` of a run's folder.

    A row outlives a kill of the process after :meth:`write`, and a stop of the machine after
    :meth:`sync`. ``after`` is the last step to keep: a resumed run writes the later rows again.

    Raises:
        ValueError: A row on disk is not JSON; a last row that a kill cut short is removed.
        OSError: The disk is full.
    """

    def __init__(self, folder: Path, *, after: int = 0) -> None:
        self.folder, self._path = folder, folder / FILE
        try:
            rows = read(self._path) if self._path.exists() else []
        except ValueError as error:
            raise ValueError(f"{self._path} has a row that is not JSON: {error}") from error
        write_json_lines(self._path, (row for row in rows if row["step"] <= after))

    def write(self, row: Row) -> None:
        """Write a row; it has ``step``. NaN and infinity, which JSON lacks, are left out."""
        row = {name: value for name, value in row.items() if math.isfinite(value)}
        with full_disk_named(self._path), self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def sync(self) -> None:
        """Wait until all rows are on the disk itself."""
        with self._path.open("rb") as file:
            os.fsync(file.fileno())


def read(path: Path) -> list[dict[str, float]]:
    """Read the rows of a ``metrics.jsonl``, without a last line that a kill cut short."""
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


def row_of(step: int, out: TensorDictBase, rates: Mapping[str, Any]) -> Row:
    """Return a row of metrics: the sum of the losses, learning rates, and all outputs."""
    scalars = {name: float(value.float().mean()) for name, value in out.detach().items()}
    losses = [name for name in scalars if name.startswith("loss")]
    row: Row = {"step": step, "loss": sum(scalars[name] for name in losses)}
    row |= {f"lr_{name}" if name else "lr": float(lr) for name, lr in rates.items()}
    # A single loss equals the sum.
    omitted = losses if len(rates) == len(losses) == 1 else []
    return row | {name: value for name, value in scalars.items() if name not in omitted}


def check_limits(row: Row, limits: Mapping[str, float], schedules: Mapping[str, Schedule]) -> None:
    """Refuse a loss that is not finite, and an output beyond its limit."""
    step = int(row["step"])
    if not math.isfinite(row["loss"]):
        if step == 1:
            problem = "the loss of the first update is not finite"
            way_out = "look for NaN in the data, and for actions that the policy can't give"
            raise FloatingPointError(f"{problem}; {way_out}")
        raise diverged("the loss is no longer finite", step, schedules)
    for name, limit in limits.items():
        # A loss may leave out the outputs of a network that is not due.
        if name in row and not abs(row[name]) <= limit:
            value = f"{name} is {row[name]:.4g}, beyond its limit ({limit:.4g})"
            raise diverged(f"training has diverged: {value}", step, schedules)


def diverged(problem: str, step: int, schedules: Mapping[str, Schedule]) -> FloatingPointError:
    rates = ", ".join(f"{network.lr:g}" for network in schedules.values())
    return FloatingPointError(
        f"{problem} at update {step}; lower the learning rate ({rates}); the last good checkpoint "
        "is kept"
    )
