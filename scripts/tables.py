"""Write the tables of README and docs from the records in docs/results.

    python -m scripts.tables

A table follows the line that names its records: ``<!-- methods.json -->``, or ``<!-- runs.json
scores -->`` where there are several of the same ones. The commands on the page write the records.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.report.document import Grid
from benchmarks.report.loops import COMPARED, RecordedLoop, loop_grid, seed_grids
from benchmarks.results import CONTROL, RecordedRun, read_runs
from scripts.control_tables import (
    difference_grid,
    draw_grid,
    error_grid,
    factor_grid,
    form_grid,
    gain_grid,
    policy_grid,
    row_grid,
    score_grid,
    source_grid,
    step_grid,
)
from scripts.method_tables import method_grid

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_CONTROL = {
    "scores": score_grid,
    "differences": difference_grid,
    "forms": form_grid,
    "draws": draw_grid,
    "policies": policy_grid,
    "row": row_grid,
}
# Of records that are not of runs.
_MEASURES = {
    "steps": step_grid,
    "sources": source_grid,
    "errors": error_grid,
    "factors": factor_grid,
}
# Records with forms of SFT, by where their data were made.
_FORMS = {
    "AMD": ("runs.json", "walker2d_replay_steps.json"),
    "bundled": ("hopper_replay_mini.json",),
    "Intel": (
        "hopper_medium_expert_draws.json",
        "medium_expert_forms.json",
        "walker2d_replay_forms.json",
        "halfcheetah_replay_forms.json",
        "walker2d_gaits.json",
        "walker2d_one_gait_again.json",
        "noise_sets.json",
    ),
}
# Loops of each record, and the differences that its page shows.
_LOOPS = {
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


def main() -> None:
    """Replace the tables of the pages."""
    for page in PAGES:
        page.write_text(with_tables(page.read_text(), RESULTS))


def with_tables(text: str, results: Path) -> str:
    """The text of a page with the table of each record that it names."""

    def table(match: re.Match[str]) -> str:
        name, kind = match[1], match[2]
        if kind is None:
            grid = method_grid(name, results)
        elif name in _LOOPS:
            grid = _loop_grid(name, kind, results)
        elif kind in _MEASURES:
            grid = _MEASURES[kind](json.loads((results / name).read_text()))
        elif kind == "gains":
            grid = gain_grid(
                [
                    (made, [run for file in files for run in _runs(results / file)])
                    for made, files in _FORMS.items()
                ]
            )
        elif kind == "ratios":
            grid = _speed_grid(results / name)
        else:
            grid = _CONTROL[kind](_runs(results / name))
        mark = " ".join(filter(None, (name, kind)))
        return f"<!-- {mark} -->\n\n{grid.markdown()}\n\n"

    return re.sub(r"<!-- (\S+\.json)(?: (\w+))? -->\n\n(?:\|.*\n)*\n*", table, text)


def _runs(record: Path) -> list[RecordedRun]:
    return read_runs(record, CONTROL)


def _loop_grid(name: str, kind: str, results: Path) -> Grid:
    """Means over seeds of a fact of the rounds, and paired differences, with 95 % intervals.

    Of a single loop it is the table of its rounds.
    """
    records = {record["loop"]: record for record in json.loads((results / name).read_text())}
    if not _LOOPS[name]:
        (record,) = records.values()
        return loop_grid(record["rounds"])
    order = [row for row in _LOOPS[name] if " less " not in row]
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
        [row[i] for i in shown] for row in (grid.columns, *map(rows.__getitem__, _LOOPS[name]))
    ]
    return Grid(picked[0], picked[1:], left=1)


def _speed_grid(record: Path) -> Grid:
    """Rows of a record of ``iwsft speed``, ours beside the peer."""
    grid = Grid(["what", "peer is", "ours", "peer", "peer / ours"], left=2)
    for row in json.loads(record.read_text())["rows"]:
        numbers = f"{row['ours']:,.4g} {row['unit']}", f"{row['peer']:,.4g}", f"{row['ratio']:.2f}"
        grid.rows.append([row["name"], row["peer_name"], *numbers])
    return grid


if __name__ == "__main__":
    main()
