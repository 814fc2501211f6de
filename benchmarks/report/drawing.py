"""What all figures of a report share: colours, panels, legends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.axes import style
from benchmarks.report.names import algorithm_label, dataset_label
from benchmarks.report.scores import Cell, algorithms

# Greys: cloning; blues: SFT; oranges: iw-SFT; the rest: offline RL.
_COLOURS = {
    "bc": "#a6a6a6",
    "bc-10": "#595959",
    "sft": "#6db6e8",
    "sft-q": "#1f63a8",
    "iw-sft": "#f2a93b",
    "iw-sft-q": "#d1440c",
    "iw-sft-step": "#8a5a2b",
    "awac": "#2a9d6f",
    "td3-bc": "#8b6fc4",
    "cql": "#b5a300",
    "iql": "#d46aa5",
    "dt": "#20b5c2",
}
TITLE = 11
UNIT = {"score": "D4RL-normalised score", "return": "mean return"}


def colours(group: Sequence[Cell]) -> dict[str, str]:
    """One colour an algorithm, the same in all figures of the same cells."""
    names = algorithms(group)
    others = [name for name in names if name not in _COLOURS]
    shades = colormaps["viridis"]
    extra = {name: to_hex(shades(0.9 * i / len(others))) for i, name in enumerate(others)}
    return {name: _COLOURS.get(name) or extra[name] for name in names}


def panels(
    names: list[str], height: float, *, share_rows: bool = False
) -> tuple[Figure, dict[str, Axes]]:
    """One panel a dataset, at most three in a row."""
    columns = 2 if len(names) == 4 else min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(max(5.0, 4.0 * columns), height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=share_rows).flat)
    found = dict(zip(names, axes, strict=False))
    for name, ax in found.items():
        style(ax)
        ax.set_title(dataset_label(name), fontsize=TITLE)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    return figure, found


def legend(figure: Figure, colour: Mapping[str, str]) -> None:
    """The colours of the algorithms, below all panels."""
    handles = [
        Line2D([], [], color=value, lw=2.5, label=algorithm_label(name))
        for name, value in colour.items()
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False
    )
