"""A table as text: for the terminal and for markdown."""

from __future__ import annotations

import itertools
import re
import textwrap
from collections.abc import Iterable, Sequence
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
        notes: Footnotes; note i is marked ``[i + 1]`` in the cells. Notes without a mark belong to
            the last column.
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
        """The table for the terminal, under a title.

        The column ``leave_out`` has no room there. Where that is not enough, the published numbers
        are left out too, and the title says so.
        """
        grouped = self.left > 1
        headings = {
            i: name.replace(", ", ",\n")
            for i, name in enumerate(self.columns)
            if name != leave_out and i >= grouped
        }
        if self.published and self._width(headings) > _TERMINAL:
            for i in range(len(self.columns) - self.published, len(self.columns)):
                del headings[i]
            title += ", published numbers in the report"
        if self._width(headings) > _TERMINAL:
            # Each in as many lines as its column needs to be no wider than its cells.
            for i in headings:
                width = self._widest(i, self.columns[i].split())
                headings[i] = "\n".join(textwrap.wrap(self.columns[i], width))
        parts: list[RenderableType] = [Text(title, style="bold"), self._lines(headings, None)]
        for first, group in itertools.groupby(self.rows, key=lambda row: row[0]):
            if grouped:
                parts.append(Text(first, style="bold cyan"))
            parts.append(self._lines(headings, list(group)))
        shown, marked = self._marks(headings), self._marks(range(len(self.columns)))
        for i, note in enumerate(self.notes):
            mark = f"[{i + 1}]"
            if mark in shown or (mark not in marked and len(self.columns) - 1 in headings):
                parts.append(Text(f"{mark} {note}", style="dim"))
        return Group(*parts)

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

    def _marks(self, columns: Iterable[int]) -> set[str]:
        """The marks of footnotes in these columns."""
        return {m for i in columns for row in self.rows for m in re.findall(r"\[\d+\]", row[i])}

    def _widest(self, i: int, heading: list[str]) -> int:
        """Width of a column under a heading of these lines."""
        return max(map(cell_len, [*heading, *(row[i] for row in self.rows)]))

    def _width(self, headings: dict[int, str]) -> int:
        """Width of a line with the smallest gaps."""
        return sum(self._widest(i, heading.split("\n")) + 1 for i, heading in headings.items())

    def _lines(self, headings: dict[int, str], rows: list[list[str]] | None) -> Table:
        """Some rows, or the headings alone."""
        gap = 2 if self._width(headings) + len(headings) <= _TERMINAL else 1
        table = Table(box=None, show_header=rows is None, padding=(0, gap, 0, 0))
        for i, heading in headings.items():
            table.add_column(
                heading,
                justify="left" if i < self.left else "right",
                vertical="bottom",
                width=self._widest(i, heading.split("\n")),
                no_wrap=True,
            )
        for row in rows or []:
            table.add_row(*(Text(row[i]) for i in headings))
        return table


def interval_text(interval: tuple[float, float] | None, digits: int = 1) -> str:
    """An interval as ``low to high``."""
    return NOTHING if interval is None else " to ".join(f"{end:.{digits}f}" for end in interval)


def _escaped(text: str) -> str:
    """Text that markdown shows as it is."""
    return re.sub(r"([\\`*_<&|])", r"\\\1", text)
