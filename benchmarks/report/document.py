"""A document: markdown that grows section by section, and the HTML that is made from it."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from matplotlib.figure import Figure

from benchmarks.report.grid import Grid
from benchmarks.results import FinishedRun

# Title of the section with the commands of all runs.
COMMANDS = "How these numbers were made"
_DPI = 110
_STYLE = Path(__file__).with_name("document.css")
# The page loads nothing from elsewhere, and tells the browser so.
_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
{body}</body>
</html>
"""


class Document:
    """The markdown of a report and its figures.

    Texts may hold `code` and <addresses>.
    """

    def __init__(self, command: str) -> None:
        self._command = command
        self._sections: dict[str, list[str]] = {}
        self._blocks: list[str] = []
        self._made = ""
        self.images: dict[str, bytes] = {}

    def section(self, title: str, runs: Sequence[FinishedRun]) -> None:
        """Begin or continue a section with tables and figures of these runs.

        A section that stays empty is left out.
        """
        self._blocks = self._sections.setdefault(title, [])
        about = [
            f"{len(runs)} runs, seeds {' '.join(map(str, sorted({run.seed for run in runs})))}",
            ", ".join(distinct(run.result.get("env_id") for run in runs)),
            " / ".join(version_lines(runs)) or "versions not recorded",
            " / ".join(hardware_lines(runs)) or "hardware not recorded",
        ]
        self._made = (
            f"*`{self._command}`: {'; '.join(filter(None, about))}. "
            f"The [commands of the runs](#{_anchor(COMMANDS)}) are below.*"
        )

    def text(self, text: str) -> None:
        """Add a paragraph."""
        self._blocks.append(text)

    def bullets(self, items: Iterable[str]) -> None:
        """Add a list."""
        self.text("\n".join(f"- {item}" for item in items))

    def table(self, grid: Grid, caption: str) -> None:
        """Add a table, where it has rows."""
        if grid.rows:
            self._blocks += [caption, grid.markdown(), self._made]

    def figure(self, name: str, figure: Figure | None, caption: str) -> None:
        """Add a figure, where there is one; ``name`` is its file."""
        if figure is not None:
            image = io.BytesIO()
            figure.savefig(image, dpi=_DPI, format="png", bbox_inches="tight")
            self.images[name] = image.getvalue()
            self._blocks += [f"![{caption}]({name})", caption, self._made]

    def provenance(self, runs: Sequence[FinishedRun]) -> None:
        """Add versions, hardware and commands of these runs."""
        commands = distinct(shareable(run.config.get("command", "")) for run in runs)
        self.text("Versions:")
        self.bullets(version_lines(runs) or ["not recorded"])
        self.text("Hardware:")
        self.bullets(hardware_lines(runs) or ["not recorded"])
        self.text("Commands, without the folders of absolute paths:")
        self.text("\n".join(["```", *(commands or ["not recorded"]), "```"]))

    def markdown(self, title: str) -> str:
        """The whole page in GitHub's markdown, with its contents."""
        sections = {name: blocks for name, blocks in self._sections.items() if blocks}
        contents = "\n".join(f"- [{name}](#{_anchor(name)})" for name in sections)
        parts = [f"# {title}", contents]
        for name, blocks in sections.items():
            parts += [f"## {name}", *blocks]
        return "\n\n".join(parts) + "\n"


def distinct(texts: Iterable[str | None]) -> list[str]:
    """Texts that are not empty, without repetition, in order."""
    return list(dict.fromkeys(filter(None, texts)))


def version_lines(runs: Iterable[FinishedRun]) -> list[str]:
    """The distinct sets of package versions."""
    return distinct(_listed(run.versions) for run in runs)


def hardware_lines(runs: Iterable[FinishedRun]) -> list[str]:
    """The distinct machines."""
    return distinct(_listed(run.config.get("hardware", {})) for run in runs)


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


def to_html(markdown: str, images: Mapping[str, bytes]) -> str:
    """Make one HTML file of a page of markdown, with its style and its images inside.

    HTML in the page is shown as text. The images are PNG files by the names that the page has.
    """
    parser = MarkdownIt("commonmark", {"html": False, "xhtmlOut": False}).enable("table")
    tokens = parser.parse(markdown)
    group = None
    for i, token in enumerate(tokens):
        if token.type == "heading_open":
            token.attrSet("id", _anchor(tokens[i + 1].content))
        for child in token.children or []:
            if child.type == "image":
                data = base64.b64encode(images[str(child.attrs["src"])]).decode()
                child.attrSet("src", f"data:image/png;base64,{data}")
        # Where two columns hold words, the rows with the same first cell are a group.
        if token.type == "tr_open" and tokens[i + 4].type == "td_open":
            first, second = tokens[i + 2], tokens[i + 4]
            if "style" not in second.attrs and first.content != group:
                group = first.content
                token.attrSet("class", "first")
    body = parser.renderer.render(tokens, parser.options, {})
    body = body.replace("<table>", '<div class="scroll"><table>')
    body = body.replace("</table>", "</table></div>")
    return _PAGE.format(title=escape(tokens[1].content), style=_STYLE.read_text(), body=body)


def _anchor(title: str) -> str:
    """The part of an address that leads to a section, as GitHub makes it from the heading."""
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")
