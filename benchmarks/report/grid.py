"""A table as text: for the terminal and for markdown."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

NOTHING = "-"
_TERMINAL = 80  # characters a line that every terminal has


@dataclass
class Grid:
    """A table as text: one list of cells per row.

    Attributes:
        columns: Headings.
        rows: As many cells as there are columns.
        notes: Footnotes; note i is marked ``[i + 1]`` in the cells.
        left: Number of the first columns that hold words, not numbers. Where there are two or
            more, neighbouring rows with the same first cell belong together.
        published: Number of the last columns that hold published numbers.
    """

    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    left: int = 2
    published: int = 0

    def marked(self, text: str, notes: Sequence[str]) -> str:
        """A cell's text with the marks of its footnotes, which are added where they are new."""
        self.notes += [note for note in notes if note not in self.notes]
        marks = "".join(f"[{self.notes.index(note) + 1}]" for note in notes)
        return f"{text} {marks}" if marks else text

    def rich(self, title: str, leave_out: str = "") -> Group:
        """The table for the terminal.

        Args:
            title: Line above the table.
            leave_out: A column that the terminal has no room for. Where that is not enough, the
                published numbers are left out too, and the title says so.
        """
        grouped = self.left > 1
        columns = [i for i, name in enumerate(self.columns) if name != leave_out and i >= grouped]
        if self.published and self._width(self._headings(columns)) > _TERMINAL:
            columns = [i for i in columns if i < len(self.columns) - self.published]
            title += ", published numbers in the report"
        headings = self._headings(columns)
        if self._width(headings) > _TERMINAL:
            headings = {i: self._narrow(i) for i in columns}
        parts: list[RenderableType] = [Text(title, style="bold"), self._lines(headings, None)]
        for first, group in itertools.groupby(self.rows, key=lambda row: row[0]):
            if grouped:
                parts.append(Text(first, style="bold cyan"))
            parts.append(self._lines(headings, list(group)))
        return Group(*parts, *(Text(note, style="dim") for note in self._notes_of(columns)))

    def markdown(self) -> str:
        """The table and its footnotes; published numbers are in italics."""
        ours = len(self.columns) - self.published
        lines = [
            [
                f"*{_escaped(text)}*" if i >= ours and text != NOTHING else _escaped(text)
                for i, text in enumerate(row)
            ]
            for row in (self.columns, *self.rows)
        ]
        lines.insert(1, ["---" if i < self.left else "---:" for i in range(len(self.columns))])
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        notes = "\n".join(f"[{i + 1}] {note}  " for i, note in enumerate(self.notes))
        return f"{table}\n\n{notes}".rstrip()

    def _notes_of(self, columns: Sequence[int]) -> list[str]:
        """The footnotes that belong to these columns."""
        lines = [f"[{i + 1}] {note}" for i, note in enumerate(self.notes)]
        marks = {
            i: set(re.findall(r"\[\d+\]", " ".join(row[i] for row in self.rows)))
            for i in range(len(self.columns))
        }
        # Notes without a mark are on the published columns, which are the last.
        unmarked = {line.split()[0] for line in lines} - set().union(*marks.values())
        marks[len(self.columns) - 1] |= unmarked
        shown = set().union(*(marks[i] for i in columns))
        return [line for line in lines if line.split()[0] in shown]

    def _headings(self, columns: Sequence[int]) -> dict[int, str]:
        """Headings by column, broken at commas."""
        return {i: self.columns[i].replace(", ", ",\n") for i in columns}

    def _narrow(self, i: int) -> str:
        """A heading in as many lines as its column needs to be no wider than its cells."""
        width = max(map(cell_len, [*self.columns[i].split(), *(row[i] for row in self.rows)]))
        return "\n".join(textwrap.wrap(self.columns[i], width))

    def _widths(self, headings: dict[int, str]) -> list[int]:
        return [
            max(map(cell_len, [*heading.split("\n"), *(row[i] for row in self.rows)]))
            for i, heading in headings.items()
        ]

    def _width(self, headings: dict[int, str]) -> int:
        """Width of a line with the smallest gaps."""
        return sum(self._widths(headings)) + len(headings)

    def _lines(self, headings: dict[int, str], rows: list[list[str]] | None) -> Table:
        """Some rows, or the headings alone."""
        gap = 2 if self._width(headings) + len(headings) <= _TERMINAL else 1
        table = Table(box=None, show_header=rows is None, padding=(0, gap, 0, 0))
        for (i, heading), width in zip(headings.items(), self._widths(headings), strict=True):
            table.add_column(
                heading,
                justify="left" if i < self.left else "right",
                vertical="bottom",
                width=width,
                no_wrap=True,
            )
        for row in rows or []:
            table.add_row(*(Text(row[i]) for i in headings))
        return table


def _escaped(text: str) -> str:
    """Text that markdown shows as it is."""
    return re.sub(r"([\\`*_<&|])", r"\\\1", text)
