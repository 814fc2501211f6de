"""Tables of the loops, in docs/loop.md."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.report import loops as report
from benchmarks.report.document import Grid
from benchmarks.report.loops import COMPARED, RecordedLoop, seed_grids

# Loops of each record, and the differences that its page shows.
LOOPS = {
    "loop_arithmetic.json": (
        *("sft", "iw-sft", "iw-sft-step", "dft"),
        *("iw-sft less sft", "iw-sft-step less sft", "dft less sft"),
    ),
    "loop_arithmetic_8e-4.json": ("sft", "iw-sft", "iw-sft less sft"),
    "loop_arithmetic_wide.json": ("sft", "iw-sft", "iw-sft less sft"),
    # A single loop.
    "loop_gsm8k.json": (),
    "loop_hopper.json": (
        *("sft-q", "iw-sft-q", "iw-sft-q-ess0.4", "cloned-ess0.4"),
        *("iw-sft-q less sft-q", "iw-sft-q-ess0.4 less sft-q"),
        "cloned-ess0.4 less iw-sft-q-ess0.4",
    ),
}


def loop_grid(name: str, kind: str, results: Path) -> Grid:
    """Means over seeds of a fact of the rounds, and paired differences, with 95 % intervals.

    Of a single loop it is the table of its rounds.
    """
    if not LOOPS[name]:
        (record,) = json.loads((results / name).read_text())
        return report.loop_grid(record["rounds"])
    records = {record["loop"]: record for record in json.loads((results / name).read_text())}
    order = [row for row in LOOPS[name] if " less " not in row]
    loops = [
        RecordedLoop(loop, record, record["rounds"])
        for algo in order
        for loop, record in sorted(records.items())
        if loop.rpartition("/")[0] == algo
    ]
    grid = seed_grids(loops)[COMPARED[kind]]
    rows = {row[0].partition(" (")[0]: row for row in grid.rows}
    # Of many rounds, every second one.
    columns = range(len(grid.columns))
    shown = columns if len(columns) < 8 else [0, *columns[:0:-2][::-1]]
    picked = [
        [row[i] for i in shown] for row in (grid.columns, *map(rows.__getitem__, LOOPS[name]))
    ]
    return Grid(picked[0], picked[1:], left=1)
