"""The files of a report: HTML in one piece, markdown with its figures beside it, runs as JSON."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.report import content, html, language, markdown
from benchmarks.report.provenance import shareable
from benchmarks.report.records import records
from benchmarks.report.scores import cells
from benchmarks.results import CONTROL, ResultsError, read_runs, unfinished_runs
from iwsft.files import written_whole

PAGE = "index.html"
MARKDOWN = "report.md"
RECORDS = "runs.json"
_DPI = 110


def write_report(folder: Path, out: Path) -> Path:
    """Read the runs below ``folder`` and write the pages and the figures into ``out``.

    Figures of an earlier report there that this one does not have are removed.

    Returns:
        The HTML page.

    Raises:
        ResultsError: there is no finished run, or a file of a run cannot be read.
    """
    runs, unfinished = read_runs(folder, CONTROL), unfinished_runs(folder, CONTROL)
    recipes = language.read_recipes(folder)
    if not runs and not any(recipe.runs for recipe in recipes):
        begun = len(unfinished) + sum(len(recipe.unfinished) for recipe in recipes)
        raise ResultsError(
            f"no finished run below {folder} ({begun} unfinished): a run is a folder "
            "d4rl/DATASET/ALGO/seed-K or llm/RECIPE/ALGO/seed-K with a result.json, as "
            "`python -m benchmarks.d4rl` and `python -m benchmarks.llm` write it"
        )
    command = shareable(f"python -m benchmarks.report {shlex.quote(str(folder))}")
    document = content.report(cells(runs), unfinished, recipes, command)
    images = {picture.name: _png(picture.figure) for picture in document.pictures}
    written = {
        **images,
        MARKDOWN: markdown.render(document, document.sections[-1]).encode(),
        RECORDS: records(runs, recipes).encode(),
        PAGE: html.render(document, images).encode(),
    }
    for name, text in written.items():
        with written_whole(out / name) as partial:
            partial.write_bytes(text)
    earlier = {*content.PICTURES, *(path.name for path in out.glob(language.PICTURES))}
    for name in earlier - set(images):
        (out / name).unlink(missing_ok=True)
    return out / PAGE


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, dpi=_DPI, format="png", bbox_inches="tight")
    return file.getvalue()
