"""Write the tables of README and docs from the records in docs/results.

    python -m scripts.tables

A table follows the line that names its records: ``<!-- methods.json -->``, or ``<!-- runs.json
scores -->`` where there are several of the same ones. The commands on the page write the records.
"""

from __future__ import annotations

import re
from pathlib import Path

from benchmarks.results import CONTROL, read_runs
from scripts.control_tables import difference_grid, draw_grid, form_grid, score_grid
from scripts.loop_tables import LOOPS, loop_grid
from scripts.method_tables import method_grid

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results"
PAGES = [
    ROOT / name for name in ("README.md", "docs/loop.md", "docs/methods.md", "docs/results.md")
]
_CONTROL = {
    "scores": score_grid,
    "differences": difference_grid,
    "forms": form_grid,
    "draws": draw_grid,
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
        elif name in LOOPS:
            grid = loop_grid(name, kind, results)
        else:
            grid = _CONTROL[kind](read_runs(results / name, CONTROL))
        mark = " ".join(filter(None, (name, kind)))
        return f"<!-- {mark} -->\n\n{grid.markdown()}\n\n"

    return re.sub(r"<!-- (\S+\.json)(?: (\w+))? -->\n\n(?:\|.*\n)*\n*", table, text)


if __name__ == "__main__":
    main()
