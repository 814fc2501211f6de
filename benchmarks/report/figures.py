"""Figures of control runs: scores and training; what all figures share.

A figure is a set of panels, each an image of its own, so that a page can lay them out for a phone.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator
from numpy.typing import NDArray

from benchmarks.report import scores
from benchmarks.report.document import INK
from benchmarks.report.scores import Cell
from benchmarks.results import SCORE, RecordedRun
from benchmarks.statistics import MIN_SEEDS, t_interval

UNIT = {SCORE: "D4RL-normalised score", scores.RETURN: "mean return"}
STYLE: Any = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), INK),
    **dict.fromkeys(("xtick.color", "ytick.color", "grid.color"), INK),
    **{"font.size": 8.5, "axes.titlesize": 9.5, "grid.alpha": 0.15, "axes.axisbelow": True},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True},
    **{"axes.formatter.limits": (-2, 5), "axes.formatter.use_mathtext": True},
}
_WIDTH = 4.0  # of a panel in inches: that of a phone
_POINTS = 150  # longer series are averaged into this many points
# An axis ends where a line leaves the range of the typical one by more than so many times.
_FAR = 10.0

Panels = dict[str, Figure]


def literal(text: str) -> str:
    """A text whose dollars do not begin a formula."""
    return text.replace("$", r"\$")


def make_panel(title: str, height: float, colour: Mapping[str, str] | None = None) -> Axes:
    """Make a figure with one panel, and a legend of algorithms and their colours below it."""
    with rc_context(STYLE):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        ax = figure.subplots()
        # The title may be as wide as the figure, which is wider than the axes.
        figure.suptitle(literal(textwrap.fill(title, 48)), fontsize=9.5)
        ax.locator_params(axis="x", nbins=6)
        if colour:
            labels = {literal(scores.algorithm_label(name)): c for name, c in colour.items()}
            handles = [Line2D([], [], color=c, lw=2.5, label=n) for n, c in labels.items()]
            rows = _add_legend(figure, handles)
            figure.set_figheight(height + 0.18 * rows)
    return ax


def _add_legend(figure: Figure, handles: Sequence[Line2D]) -> int:
    """Show a legend below the panel in as many columns as fit, and return its rows."""
    columns = min(3, len(handles))
    while True:
        legend = figure.legend(
            handles=handles, loc="outside lower center", ncols=columns, fontsize=7.5,
            labelcolor=INK, frameon=False,
        )  # fmt: skip
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            return -(-len(handles) // columns)
        legend.remove()
        columns -= 1


def finish(panels: Mapping[str, Axes]) -> Panels:
    """The figures of all panels that show something, with the labels of the y axes in lines."""
    for ax in panels.values():
        ax.set_ylabel(textwrap.fill(ax.get_ylabel(), 28))
    return {name: cast(Figure, ax.figure) for name, ax in panels.items() if ax.has_data()}


def choose_colours(group: Sequence[Cell]) -> dict[str, str]:
    """Choose a colour for each algorithm, the same in all figures of the same cells."""
    names = scores.algorithms(group)
    others = [name for name in names if name not in scores.ALGORITHMS]
    shades = colormaps["viridis"]
    shares = np.linspace(0.0, 0.9, len(others))
    extra = {name: to_hex(shades(share)) for name, share in zip(others, shares, strict=True)}
    return {name: extra.get(name) or scores.algorithm_colour(name) for name in names}


def clip(ax: Axes, axis: str, *, tight: bool = False) -> None:
    """End an axis, "x" or "y", where a line leaves all others far behind, and mark that line.

    The mark says how far the line reaches. A tight axis ends with the lines, and cuts their bands.
    """
    lines = [line for line in ax.lines if line.get_transform() == ax.transData]
    if tight:  # the dots are ends of lines
        lines = [line for line in lines if line.get_marker() != "o"]
    data = [np.asarray(getattr(line, f"get_{axis}data")(), np.float64) for line in lines]
    ends = np.array([(x.min(), x.max()) for x in data if x.size and np.isfinite(x).all()])
    if len(ends) < 2:
        return
    # The middle half, of few lines without the one that is far.
    ordered, last = np.sort(ends, axis=None), ends.size - 1
    low, high = ordered[math.ceil(last / 4)], ordered[3 * last // 4]
    reach = _FAR * max(high - low, 0.05 * max(abs(low), abs(high)))
    limits = low - reach, high + reach
    near = ends[(ends[:, 0] >= limits[0]) & (ends[:, 1] <= limits[1])]
    if not len(near) or (len(near) == len(ends) and not tight):
        return
    low, high = near[:, 0].min(), near[:, 1].max()
    pad = (0.2 if tight else 0.06) * (high - low) or 1.0
    getattr(ax, f"set_{axis}lim")(low - pad, high + pad)
    for line, values in zip(lines, data, strict=True):
        across = np.asarray(getattr(line, f"get_{'y' if axis == 'x' else 'x'}data")())
        for end, beyond, mark in (
            (high + pad, values > limits[1], "^" if axis == "y" else ">"),
            (low - pad, values < limits[0], "v" if axis == "y" else "<"),
        ):
            if beyond.any():
                at = (float(across[beyond.argmax()]), float(end))
                furthest = values[beyond][np.abs(values[beyond]).argmax()]
                _mark(ax, at if axis == "y" else at[::-1], mark, f"{furthest:.2g}", line)


def _mark(ax: Axes, place: tuple[float, ...], mark: str, text: str, line: Line2D) -> None:
    """Mark the place where a line leaves the panel, with a text towards the inside."""
    x, y = place
    ax.plot([x], [y], mark, color=line.get_color(), ms=7, clip_on=False, zorder=5)
    offset, side = ((-6, 5), "right") if mark == ">" else ((6, 5 if mark == "v" else -5), "left")
    ax.annotate(text, (x, y), offset, textcoords="offset points", fontsize=7, ha=side, color=INK)


def plot_score(ax: Axes, y: int, cell: Cell, colour: str) -> None:
    """Plot every seed's score as a dot, the mean as a bar and the interval as a line."""
    values = cell.values
    ax.barh(y, cell.mean, height=0.72, color=colour, alpha=0.35, lw=0)
    ax.plot(values, [y + 0.14] * len(values), "o", ms=4.5, color=colour)
    if cell.interval is not None:
        ax.plot(cell.interval, [y - 0.16] * 2, "-|", color=INK, lw=1.1, ms=5, mew=1.0)


def list_names(ax: Axes, names: Iterable[str]) -> None:
    """Write the names on the y axis, from top to bottom."""
    labels = [literal(textwrap.fill(name, 30)) for name in names]
    lines = max((label.count("\n") for label in labels), default=0)
    figure = cast(Figure, ax.figure)
    figure.set_figheight(figure.get_figheight() + 0.13 * lines * len(labels))
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)


def scale_log(ax: Axes, axis: str) -> None:
    """Make an axis, "x" or "y", logarithmic if its data span a decade, with plain numbers."""
    i = "xy".index(axis)
    low, high = (ax.dataLim.minposx, ax.dataLim.minposy)[i], ax.dataLim.max[i]
    if high < 10 * low:
        return
    getattr(ax, f"set_{axis}scale")("log")
    # Below two decades the powers of ten alone would leave the axis almost without numbers.
    ticks = LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,))
    (ax.xaxis, ax.yaxis)[i].set_major_locator(ticks)
    (ax.xaxis, ax.yaxis)[i].set_major_formatter(lambda value, _: f"{value:,.10g}")
    (ax.xaxis, ax.yaxis)[i].set_minor_locator(NullLocator())


def series(runs: Sequence[RecordedRun], key: str) -> tuple[NDArray, NDArray]:
    """Steps ``[T]`` at which every run has a value of ``key``, and the values ``[seeds, T]``."""
    rows = [{row["step"]: row[key] for row in run.metrics if key in row} for run in runs]
    steps = sorted(set.intersection(*(set(row) for row in rows)))
    return np.array(steps), np.array([[row[step] for step in steps] for row in rows])


def _by_dataset(group: Sequence[Cell]) -> dict[str, list[Cell]]:
    return {name: [c for c in group if c.dataset == name] for name in scores.datasets(group)}


def draw_scores(group: Sequence[Cell]) -> Panels:
    """Draw the scores of all seeds with means and intervals, one panel for each dataset."""
    colour, panels = choose_colours(group), {}
    for dataset, part in _by_dataset(group).items():
        ax = make_panel(scores.dataset_label(dataset), 0.8 + 0.25 * len(part))
        for y, cell in enumerate(part):
            plot_score(ax, y, cell, colour[cell.algo])
        marks = [" †" * cell.under_trained for cell in part]
        names = [scores.algorithm_label(cell.algo) for cell in part]
        list_names(ax, map(str.__add__, names, marks))
        ax.margins(x=0.04)
        ax.axvline(0.0, color=INK, alpha=0.4, lw=0.8)
        ax.set_xlabel(UNIT[part[0].score_key])
        clip(ax, "x")
        panels[dataset] = ax
    return finish(panels)


def draw_learning_curves(group: Sequence[Cell]) -> Panels:
    """Draw scores over updates, mean over seeds and its interval; the dot is the last policy.

    Algorithms without a point before the last have no curve.
    """
    panels = {}
    for dataset, part in _by_dataset(group).items():
        curves = {}
        for cell in part:
            steps, values = series(cell.runs, cell.score_key)
            # The last policy's own score closes the curve.
            last = max(run.result["steps"] for run in cell.runs)
            before = steps < last
            if before.any():
                closed = np.column_stack([values[:, before], cell.values])
                curves[cell.algo] = np.append(steps[before], last), closed
        if not curves:
            continue
        colour = {name: c for name, c in choose_colours(group).items() if name in curves}
        ax = make_panel(scores.dataset_label(dataset), 2.5, colour)
        for algo, (steps, values) in curves.items():
            _band(ax, steps, values, colour[algo])
            ax.plot(steps[-1], values[:, -1].mean(), "o", ms=5, color=colour[algo], zorder=3)
        ax.set(ylabel=UNIT[part[0].score_key], xlabel="update")
        _scale_updates(ax, part)
        panels[dataset] = ax
    return finish(panels)


def draw_training_curves(group: Sequence[Cell]) -> Panels:
    """Draw log-probability, critics and effective sample size, a panel for each and dataset."""
    labels = {
        "log_prob": "log-likelihood of the batches (mean over steps)",
        "pred_value": "critic's mean value Q(s, a)",
        "ESS": "effective sample size (share of the batch)",
    }
    panels = {}
    for key, label in labels.items():
        cells = [c for c in logged(group, key) if key != "ESS" or _weighted(c)]
        for dataset, part in _by_dataset(cells).items():
            colour = {cell.algo: choose_colours(group)[cell.algo] for cell in part}
            ax = make_panel(scores.dataset_label(dataset), 2.4, colour)
            for cell in part:
                _band(ax, *series(cell.runs, key), colour[cell.algo])
            ax.set(xlabel="update", ylabel=label)
            _scale_updates(ax, part)
            if key == "ESS":
                ax.set_ylim(0.0, 1.04)
            panels[f"{key}-{dataset}"] = ax
    return finish(panels)


def _band(ax: Axes, steps: NDArray, values: NDArray, colour: str) -> None:
    """Plot the mean over seeds, and its 95 % interval for three seeds or more."""
    size = len(steps) // _POINTS
    if size > 1:
        whole = len(steps) // size * size
        steps = steps[:whole].reshape(-1, size).mean(axis=1)
        values = values[:, :whole].reshape(len(values), -1, size).mean(axis=2)
    if len(values) >= MIN_SEEDS and len(steps):
        ax.fill_between(steps, *t_interval(values), color=colour, alpha=0.2, lw=0)
    ax.plot(steps, values.mean(axis=0), color=colour, lw=1.4)


def _scale_updates(ax: Axes, group: Sequence[Cell]) -> None:
    """End the axis where a curve explodes; a logarithmic one keeps long runs beside short ones."""
    updates = [run.result["steps"] for cell in group for run in cell.runs]
    if updates and max(updates) > 5 * min(updates):
        scale_log(ax, "x")
    clip(ax, "y", tight=True)


def logged(group: Sequence[Cell], key: str) -> list[Cell]:
    """The cells whose runs all logged a metric more than once."""
    return [cell for cell in group if len(series(cell.runs, key)[0]) > 1]


def _weighted(cell: Cell) -> bool:
    """Whether the weights of the runs ever left 1."""
    ess = series(cell.runs, "ESS")[1]
    return ess.size > 0 and bool((ess < 1.0 - 1e-6).any())
