"""Tables as text, the markdown that grows section by section, and the HTML made from it."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.cells import cell_len
from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from benchmarks.results import RecordedRun

NOTHING = "-"
# The colour of text and axes of a figure, which becomes that of the page.
INK = "#010203"
_TERMINAL = 80  # characters a line that every terminal has
_SHORT = 16  # characters a line of a name that are left beside many numbers
_STYLE = Path(__file__).with_name("document.css")
# The page loads nothing from elsewhere, and tells the browser so.
_PAGE = Path(__file__).with_name("document.html")
# So it is in every page, and in no other HTML file by chance.
MARK = "img-src data:; media-src data:"
_SVG_STYLE = Path(__file__).with_name("image.css")


@dataclass
class Grid:
    """A table as text: one list of cells per row.

    Note i is marked ``[i + 1]`` in the cells; notes without a mark belong to the last column.
    """

    columns: list[str]
    rows: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    # Number of the first columns that hold words, not numbers. Where there are two or more,
    # neighbouring rows with the same first cell belong together.
    left: int = 2
    bold: set[tuple[int, int]] = field(default_factory=set)  # row and column of marked cells
    published: int = 0  # number of the last columns, which hold published numbers

    def marked(self, text: str, notes: Sequence[str]) -> str:
        """A cell's text with the marks of its footnotes, which are added where they are new."""
        self.notes += [note for note in notes if note not in self.notes]
        marks = "".join(f"[{self.notes.index(note) + 1}]" for note in notes)
        return f"{text} {marks}" if marks else text

    def rich(self, title: str, leave_out: Collection[str] = ()) -> Group:
        """The table for the terminal, which has no room for some columns and published numbers."""
        grouped, ours = self.left > 1, len(self.columns) - self.published
        # Headings are wrapped to the widths of the cells.
        widths = {
            i: max(map(cell_len, [*name.split(), *(row[i] for row in self.rows)]))
            for i, name in enumerate(self.columns[:ours])
            if name not in leave_out and i >= grouped and i not in self._empty
        }
        # A long name is folded, so that no number is cut.
        numbers = sum(width + 1 for i, width in widths.items() if i >= self.left)
        room = max(_SHORT, _TERMINAL - 1 - numbers)
        widths |= {i: min(width, room) for i, width in widths.items() if i < self.left}
        title += ", published numbers in the report" if self.published else ""
        parts: list[RenderableType] = [Text(title, style="bold"), self._lines(widths, [])]
        for first, group in itertools.groupby(self.rows, key=lambda row: row[0]):
            if grouped:
                parts.append(Text(first, style="bold cyan"))
            parts.append(self._lines(widths, list(group)))
        cells = " ".join(row[i] for row in self.rows for i in widths)
        notes = {f"[{i + 1}]": note for i, note in enumerate(self.notes)}
        parts += [Text(f"{i} {note}", style="dim") for i, note in notes.items() if i in cells]
        return Group(*parts)

    def _lines(self, widths: dict[int, int], rows: list[list[str]]) -> Table:
        """Some rows, or the headings where there are none."""
        gap = 2 if sum(widths.values()) + 2 * len(widths) <= _TERMINAL else 1
        table = Table(box=None, show_header=not rows, padding=(0, gap, 0, 0))
        for i, width in widths.items():
            justify: JustifyMethod = "left" if i < self.left else "right"
            table.add_column(
                self.columns[i], justify=justify, vertical="bottom", overflow="fold", width=width
            )
        for row in rows:
            table.add_row(*(Text(row[i]) for i in widths))
        return table

    def markdown(self) -> str:
        """The table and its footnotes; published numbers are in italics.

        Columns of numbers that are empty are left out.
        """
        ours = len(self.columns) - self.published
        lines = []
        for i, row in enumerate((self.columns, *self.rows)):
            texts = [escaped(text) for text in row]
            texts = [f"**{t}**" if (i - 1, j) in self.bold else t for j, t in enumerate(texts)]
            theirs = [text if text == NOTHING else f"*{text}*" for text in texts[ours:]]
            lines.append(texts[:ours] + theirs)
        lines.insert(1, ["---" if i < self.left else "---:" for i in range(len(self.columns))])
        lines = [[t for j, t in enumerate(line) if j not in self._empty] for line in lines]
        table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
        notes = "\n".join(f"[{i + 1}] {_note(note)}  " for i, note in enumerate(self.notes))
        return f"{table}\n\n{notes}".rstrip()

    @property
    def _empty(self) -> set[int]:
        """The columns without any number or word."""
        columns = enumerate(zip(*self.rows, strict=True))
        return {i for i, column in columns if {*column} == {NOTHING}}


def escaped(text: str) -> str:
    """A text whose characters mean nothing to markdown; marks of footnotes stay ``[1]``."""
    return re.sub(r"([\\`*_<>&|#~$]|\[(?!\d+\](?!\()))", r"\\\1", text)


def _note(text: str) -> str:
    """A footnote, whose <https://...> are links."""
    parts = re.split(r"(<https://[^\s<>]+>)", text)
    return "".join(part if i % 2 else escaped(part) for i, part in enumerate(parts))


def interval_text(interval: tuple[float, float] | None, digits: int = 1) -> str:
    """An interval as ``low to high``."""
    return NOTHING if interval is None else " to ".join(f"{end:.{digits}f}" for end in interval)


def number_text(value: float | None, form: str = ".2f") -> str:
    """A number in a format."""
    return NOTHING if value is None else format(value, form)


class Document:
    """The markdown of a report and its figures; texts may hold `code` and <addresses>."""

    def __init__(self) -> None:
        self._sections: dict[str, list[str]] = {}
        self._blocks: list[str] = []
        self.images: dict[str, bytes] = {}

    def section(self, title: str) -> None:
        """Begin or continue a section; one that stays empty is left out."""
        self._blocks = self._sections.setdefault(title, [])

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._blocks.append(text)

    def bullets(self, items: Iterable[str]) -> None:
        """Add a list."""
        self.text("\n".join(f"- {item}" for item in items))

    def table(self, grid: Grid, caption: str) -> None:
        """Add a table, where it has rows."""
        if grid.rows:
            self._blocks += [caption, grid.markdown()]

    def figure(self, name: str, panels: Mapping[str, Figure], caption: str) -> None:
        """Add a figure, where it has panels; their files are ``name-PANEL.svg``."""
        links: list[str] = []
        for panel, figure in panels.items():
            # Names are the user's, and the page refers to the file.
            file = re.sub("[^A-Za-z0-9.+_-]+", "_", f"{name}-{panel}") + ".svg"
            if file in self.images:
                file = f"{len(links)}-{file}"
            self.images[file] = to_svg(figure)
            alt = escaped(panel).replace("]", "\\]")
            links.append(f"![{alt}]({file})")
        if links:
            self._blocks += [caption, "\n".join(links)]

    def provenance(self, runs: Sequence[RecordedRun]) -> None:
        """Add versions, hardware and commands of these runs."""
        commands = distinct(shareable(run.config.get("command", "")) for run in runs)
        versions = distinct(_listed(run.versions) for run in runs)
        hardware = distinct(_listed(run.config.get("hardware", {})) for run in runs)
        for title, lines in ("Versions", versions), ("Hardware", hardware):
            self.text(f"{title}:")
            self.bullets(map(escaped, lines or ["not recorded"]))
        self.text("Commands, without the folders of absolute paths:")
        self.text("\n".join(["```", *(commands or ["not recorded"]), "```"]))

    def markdown(self, title: str) -> str:
        """The whole page in GitHub's markdown; a section without a title is above the contents."""
        top = self._sections.get("", [])
        filled = {name: blocks for name, blocks in self._sections.items() if name and blocks}
        contents = "\n".join(f"- [{name}](#{_anchor(name)})" for name in filled)
        parts = [f"# {title}", *top, contents]
        for name, blocks in filled.items():
            parts += [f"## {name}", *blocks]
        return "\n\n".join(parts) + "\n"


def to_svg(figure: Figure) -> bytes:
    """Make an image whose text and axes have the colour of the page, light or dark."""
    image = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "iwsft"}):
        figure.savefig(image, format="svg", transparent=True, metadata={"Date": None})
    text = image.getvalue().replace(INK, "currentColor")
    head, tag, body = text[text.index("<svg") :].partition(">")
    fonts = re.sub(r"(font: [\d. a-z]*?[\d.]+px) [^;\"]+", r"\1 system-ui, sans-serif", body)
    return f"{head}{tag}<style>{_SVG_STYLE.read_text()}</style>{fonts}".encode()


def distinct(texts: Iterable[str | None]) -> list[str]:
    """Texts that are not empty, without repetition, in order."""
    return list(dict.fromkeys(filter(None, texts)))


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{key} {value if isinstance(value, str) else json.dumps(value)}"
        for key, value in values.items()
    )


def shareable(command: str) -> str:
    """Remove the folders of a machine from a command: ``/home/me/x.hdf5`` becomes ``x.hdf5``."""
    try:
        words = shlex.split(command)
    except ValueError:  # a quote that is not closed
        words = command.split()
    parts = [word.rpartition("=") for word in words]
    return shlex.join(
        option + equals + (Path(value).name if Path(value).is_absolute() else value)
        for option, equals, value in parts
    )


def check_replaced(marks: Mapping[Path, str]) -> None:
    """Check that files to write replace only those of their kind, which all have a mark in them."""
    for path, mark in marks.items():
        if path.exists() and mark not in path.read_text(errors="replace"):
            raise FileExistsError(f"{path} is not a file of iwsft; choose another --out")


def to_html(markdown: str, images: Mapping[str, bytes], end: str = "") -> str:
    """Make one HTML file of a page of markdown, with its style and its SVG images inside.

    HTML in the page is shown as text. ``end`` is HTML that follows it.
    """
    parser = MarkdownIt("commonmark", {"html": False, "xhtmlOut": False}).enable("table")
    tokens = parser.parse(markdown)
    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            token.attrSet("id", _anchor(tokens[i + 1].content))
        for child in token.children or []:
            if child.type == "image":
                data = base64.b64encode(images[str(child.attrs["src"])]).decode()
                child.attrSet("src", f"data:image/svg+xml;base64,{data}")
    body = parser.renderer.render(_grouped(tokens, parser), parser.options, {})
    body = body.replace("<table>", '<div class="scroll"><table>')
    body = body.replace("</table>", "</table></div>")
    body = body.replace("<p>[1]", '<p class="notes">[1]')
    body = re.sub(r" ((?:\[\d+\])+)((?:</\w+>)?</td>)", r" <sup>\1</sup>\2", body)
    return _PAGE.read_text().format(
        title=escape(tokens[1].content), style=_STYLE.read_text(), body=body + end
    )


def _grouped(tokens: Sequence[Token], parser: MarkdownIt) -> list[Token]:
    """Make headings of rows from the first column of tables that have a second one of words."""
    grouped: list[Token] = []
    left_out, name = range(0), ""
    for i, token in enumerate(tokens):
        # A column of numbers is aligned to the right, by an attribute.
        if token.type == "tr_open" and not tokens[i + 4].attrs:
            left_out = range(i + 1, i + 4)
            if tokens[i + 1].type == "th_open":
                name = ""
            elif tokens[i + 2].content != name:
                name = tokens[i + 2].content
                end = next(j for j, t in enumerate(tokens[i:], i) if t.type == "tr_close")
                shown = parser.renderer.render([tokens[i + 2]], parser.options, {})
                cell = f'<th colspan="{(end - i) // 3 - 1}" scope="rowgroup"><span>{shown}</span>'
                row = f'<tr class="group">{cell}</th></tr>\n'
                grouped.append(Token("html_block", "", 0, content=row))
        if i not in left_out:
            grouped.append(token)
    return grouped


def _anchor(title: str) -> str:
    """The part of an address that leads to a section, as GitHub makes it from the heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
