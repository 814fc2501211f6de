"""The paper's numbers, to stand beside our own and never among them."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Number:
    """A published score.

    Attributes:
        score: D4RL-normalised.
        std: over training runs, or None where the paper gives none.
        caveats: what to know before comparing with it.
    """

    score: float
    std: float | None
    caveats: tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """A table of the paper: its label, a note on all of it, and numbers by (dataset, algorithm)."""

    label: str
    note: str
    numbers: dict[tuple[str, str], Number]


@functools.cache
def tables() -> list[Table]:
    """The paper's tables, from ``benchmarks/published.json``."""
    data = json.loads((resources.files("benchmarks") / "published.json").read_text())
    found = []
    for name, entry in data["tables"].items():
        numbers = {
            (row["dataset"], row["algo"]): Number(
                row["score"],
                row.get("std"),
                tuple(data["caveats"][caveat] for caveat in row["caveats"]),
            )
            for row in data["rows"]
            if row["table"] == name
        }
        found.append(Table(entry["label"], entry["note"], numbers))
    return found


def source() -> str:
    """Where the numbers are from."""
    return json.loads((resources.files("benchmarks") / "published.json").read_text())["source"]
