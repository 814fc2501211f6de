"""The figure that the job ends in: scores by algorithm, and the weights over training."""

from __future__ import annotations

import io
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.axes import style
from benchmarks.llm.algorithms import BASE
from benchmarks.llm.results import Row
from iwsft.files import written_whole

FILE = "results.png"
# Grey: untrained; blues: SFT; oranges and reds: iw-SFT; brown: step by step.
_COLOURS = {
    BASE: "#8c8c8c",
    "sft": "#6db6e8",
    "sft-q": "#1f63a8",
    "iw-sft": "#f2a93b",
    "iw-sft-hard": "#e0701c",
    "iw-sft-ema": "#b8341b",
    "iw-sft-q": "#d46aa5",
    "iw-sft-step": "#8a5a2b",
}


def draw(folder: Path, rows: list[Row]) -> Path:
    """Write ``results.png``; its path."""
    image = io.BytesIO()
    figure(rows).savefig(image, format="png", dpi=130)
    with written_whole(folder / FILE) as partial:
        partial.write_bytes(image.getvalue())
    return folder / FILE


def figure(rows: list[Row]) -> Figure:
    """Scores, effective sample size and largest weight of all rows."""
    drawn = Figure(figsize=(13.0, 0.9 + max(3.0, 0.42 * len(rows))), layout="constrained")
    scores, ess, largest = drawn.subplots(1, 3)
    for ax in (scores, ess, largest):
        style(ax)
    _scores(scores, rows)
    _curves(ess, rows, "ESS")
    ess.set_ylim(0, 1.03)
    ess.set_ylabel("effective share of an update's draws")
    _curves(largest, rows, "weight_max")
    largest.set_yscale("log")
    largest.set_ylabel("largest weight")
    handles, labels = ess.get_legend_handles_labels()
    if handles:
        drawn.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    return drawn


def _scores(ax: Axes, rows: list[Row]) -> None:
    """Every seed a dot, the mean a bar, the interval a line; the base a line through all."""
    for y, row in enumerate(rows):
        colour = _COLOURS.get(row.algo, "#2a9d6f")
        ax.barh(y, row.score, height=0.72, color=colour, alpha=0.35, lw=0)
        ax.plot(row.scores, [y + 0.14] * len(rows[y].scores), "o", ms=5, mfc=colour, mec="white")
        if row.interval is not None:
            ax.plot(row.interval, [y - 0.16] * 2, "-|", color="0.15", lw=1.3, ms=5)
        if row.algo == BASE:
            ax.axvline(row.score, color="0.6", lw=0.8, ls=":")
    ax.set_yticks(range(len(rows)), [row.algo for row in rows])
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_xlabel(rows[0].score_name)
    ax.grid(axis="y", visible=False)


def _curves(ax: Axes, rows: list[Row], name: str) -> None:
    for row in rows:
        if row.curves:
            ax.plot(
                row.curves["step"],
                row.curves[name],
                color=_COLOURS.get(row.algo, "#2a9d6f"),
                lw=1.5,
                label=row.algo,
            )
    ax.set_xlabel("update")
