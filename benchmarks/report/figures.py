"""Figures of control runs: scores, cost, and training over updates; what all figures share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from benchmarks.report.names import algorithm_label, dataset_label
from benchmarks.report.scores import Cell, algorithms, datasets
from benchmarks.results import FinishedRun
from benchmarks.statistics import MIN_SEEDS, bootstrap_interval

# Greys: cloning; blues: SFT; oranges: iw-SFT; the rest: offline RL.
COLOURS = {
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
TITLE = 11  # font size
UNIT = {"score": "D4RL-normalised score", "return": "mean return"}
_POINTS = 150  # longer series are averaged into this many points
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def style_axes(ax: Axes) -> None:
    """Give axes a light grid and no frame."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.9", lw=0.8)
    ax.set_axisbelow(True)


def choose_colours(group: Sequence[Cell]) -> dict[str, str]:
    """Choose a colour for each algorithm, the same in all figures of the same cells."""
    names = algorithms(group)
    others = [name for name in names if name not in COLOURS]
    shades = colormaps["viridis"]
    extra = {name: to_hex(shades(0.9 * i / len(others))) for i, name in enumerate(others)}
    return {name: COLOURS.get(name) or extra[name] for name in names}


def make_panels(
    names: list[str], height: float, *, share_rows: bool = False
) -> tuple[Figure, dict[str, Axes]]:
    """Make a figure with one panel for each dataset, at most three in a row."""
    columns = 2 if len(names) == 4 else min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(max(5.0, 4.0 * columns), height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=share_rows).flat)
    by_name = dict(zip(names, axes, strict=False))
    for name, ax in by_name.items():
        style_axes(ax)
        ax.set_title(dataset_label(name), fontsize=TITLE)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    return figure, by_name


def add_legend(figure: Figure, colour: Mapping[str, str]) -> None:
    """Show the colours of the algorithms below all panels."""
    handles = [
        Line2D([], [], color=value, lw=2.5, label=algorithm_label(name))
        for name, value in colour.items()
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False
    )


def plot_score(
    ax: Axes,
    y: int,
    values: Sequence[float] | NDArray,
    interval: tuple[float, float] | None,
    colour: str,
) -> None:
    """Plot every seed's score as a dot, the mean as a bar and the interval as a line."""
    ax.barh(y, float(np.mean(values)), height=0.72, color=colour, alpha=0.35, lw=0)
    ax.plot(values, [y + 0.14] * len(values), "o", ms=5, mfc=colour, mec="white", mew=0.8)
    if interval is not None:
        ax.plot(interval, [y - 0.16] * 2, "-|", color="0.15", lw=1.3, ms=5)


def list_names(ax: Axes, names: Sequence[str]) -> None:
    """Write the names on the y axis, from top to bottom."""
    ax.set_yticks(range(len(names)), list(names))
    ax.set_ylim(len(names) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)


def plot_mean(ax: Axes, x: float, cell: Cell, colour: str) -> None:
    """Plot the mean of a cell, and its interval where it has one."""
    if cell.interval is not None:
        ax.plot([x, x], cell.interval, color=colour, lw=1.4, alpha=0.7)
    ax.plot(x, cell.mean, "o", ms=6.5, color=colour, mec="white", mew=0.8)


def scale_log(ax: Axes) -> None:
    """Make the x axis logarithmic, with plain numbers."""
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    # Below two decades the powers of ten alone would leave the axis almost without numbers.
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(_PLAIN)


def series(runs: Sequence[FinishedRun], key: str) -> tuple[NDArray, NDArray]:
    """Steps ``[T]`` at which every run has a value of ``key``, and the values ``[seeds, T]``."""
    rows = [{row["step"]: row[key] for row in run.metrics if key in row} for run in runs]
    steps = sorted(set.intersection(*(set(row) for row in rows)))
    return np.array(steps), np.array([[row[step] for step in steps] for row in rows])


def draw_scores(group: Sequence[Cell]) -> Figure:
    """Draw the scores of all seeds with means and intervals, one panel for each dataset."""
    colour, names = choose_colours(group), algorithms(group)
    figure, axes = make_panels(datasets(group), height=0.75 + 0.34 * len(names), share_rows=True)
    for cell in group:
        ax = axes[cell.dataset]
        plot_score(ax, names.index(cell.algo), cell.values, cell.interval, colour[cell.algo])
        ax.set_xlabel(UNIT[cell.unit])
    for ax in axes.values():
        list_names(ax, list(map(algorithm_label, names)))
        ax.margins(x=0.04)
        ax.axvline(0.0, color="0.6", lw=0.8)
    return figure


def draw_cost(group: Sequence[Cell]) -> Figure:
    """Draw scores against CPU seconds of a run with its reference, one panel for each dataset."""
    colour = choose_colours(group)
    figure, axes = make_panels(datasets(group), height=3.2)
    for cell in group:
        ax = axes[cell.dataset]
        plot_mean(ax, cell.cpu_seconds, cell, colour[cell.algo])
        ax.set_xlabel("CPU seconds of a run, reference included")
        ax.set_ylabel(UNIT[cell.unit])
    for ax in axes.values():
        scale_log(ax)
    add_legend(figure, colour)
    return figure


def draw_learning_curves(group: Sequence[Cell]) -> Figure | None:
    """Draw scores over updates, mean over seeds and its interval; the dot is the last policy."""
    curves = {id(cell): _learning_curve(cell) for cell in group}
    if all(len(steps) < 2 for steps, _ in curves.values()):
        return None
    colour = choose_colours(group)
    figure, axes = make_panels(datasets(group), height=3.0)
    for cell in group:
        ax = axes[cell.dataset]
        steps, values = curves[id(cell)]
        _band(ax, steps, values, colour[cell.algo])
        ax.plot(steps[-1], values[:, -1].mean(), "o", ms=6, color=colour[cell.algo], zorder=3)
        ax.set_ylabel(UNIT[cell.unit])
        ax.set_xlabel("update")
    for dataset, ax in axes.items():
        _scale_updates(ax, dataset, group)
    add_legend(figure, colour)
    return figure


def draw_training_curves(group: Sequence[Cell]) -> Figure | None:
    """Draw log-probability, critics and effective sample size, one column for each dataset."""
    rows = [
        (
            "log_prob",
            "log-likelihood of the batches\n(mean over steps)",
            _logged(group, "log_prob"),
        ),
        ("pred_value", "critic's mean value Q(s, a)", _logged(group, "pred_value")),
        ("ESS", "effective sample size\n(share of the batch)", [c for c in group if _weighted(c)]),
    ]
    rows = [row for row in rows if row[2]]
    if not rows:
        return None
    shown = [cell for _, _, members in rows for cell in members]
    names, colour = datasets(sorted(shown, key=lambda cell: cell.dataset)), choose_colours(group)
    figure = Figure(figsize=(max(5.0, 3.6 * len(names)), 2.7 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(names), squeeze=False)
    for row, (key, label, members) in zip(axes, rows, strict=True):
        for dataset, ax in zip(names, row, strict=True):
            style_axes(ax)
            ax.set_title(dataset_label(dataset), fontsize=TITLE)
            ax.set_xlabel("update")
            for cell in (cell for cell in members if cell.dataset == dataset):
                _band(ax, *series(cell.runs, key), colour[cell.algo])
            _scale_updates(ax, dataset, members)
            if key == "ESS":
                ax.set_ylim(0.0, 1.04)
        row[0].set_ylabel(label)
    present = {cell.algo for cell in shown}
    add_legend(figure, {name: colour[name] for name in colour if name in present})
    return figure


def draw_weight_quantiles(group: Sequence[Cell]) -> Figure | None:
    """Draw quantiles of the importance weights over updates, mean over seeds."""
    shown = [cell for cell in _logged(group, "weight_q50") if _weighted(cell)]
    if not shown:
        return None
    colour, names, algos = choose_colours(group), datasets(shown), algorithms(shown)
    figure = Figure(figsize=(max(5.0, 3.6 * len(names)), 2.6 * len(algos)), layout="constrained")
    axes = figure.subplots(len(algos), len(names), squeeze=False, sharey=True)
    for ax in axes.flat:
        ax.set_axis_off()
    for cell in shown:
        ax = axes[algos.index(cell.algo), names.index(cell.dataset)]
        ax.set_axis_on()
        style_axes(ax)
        mean = {}
        for key in ("q05", "q25", "q50", "q75", "q95"):
            steps, values = series(cell.runs, f"weight_{key}")
            mean[key] = values.mean(axis=0)
        for low, high, alpha in (("q05", "q95", 0.18), ("q25", "q75", 0.35)):
            ax.fill_between(
                steps, mean[low], mean[high], color=colour[cell.algo], alpha=alpha, lw=0
            )
        ax.plot(steps, mean["q50"], color=colour[cell.algo])
        ax.axhline(1.0, color="0.3", lw=0.8, ls=":")
        ax.set_yscale("log")
        ax.set_title(f"{dataset_label(cell.dataset)}, {algorithm_label(cell.algo)}", fontsize=TITLE)
        ax.set_xlabel("update")
        ax.set_ylabel("importance weight")
    for ax in axes.flat:
        low, high = ax.get_ylim()
        ax.yaxis.set_major_formatter(_PLAIN)
        # Below a decade the powers of ten alone would leave the axis without numbers.
        ax.yaxis.set_minor_formatter(_PLAIN if high < 10 * low else NullFormatter())
    grey = [
        Line2D([], [], color="0.35", label="median"),
        Line2D([], [], color="0.35", alpha=0.45, lw=8, label="25 to 75 %"),
        Line2D([], [], color="0.35", alpha=0.2, lw=8, label="5 to 95 %"),
    ]
    figure.legend(handles=grey, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _band(ax: Axes, steps: NDArray, values: NDArray, colour: str) -> None:
    """Plot the mean over seeds, and its bootstrap interval for three seeds or more."""
    size = len(steps) // _POINTS
    if size > 1:
        whole = len(steps) // size * size
        steps = steps[:whole].reshape(-1, size).mean(axis=1)
        values = values[:, :whole].reshape(len(values), -1, size).mean(axis=2)
    if len(values) >= MIN_SEEDS and len(steps):
        ax.fill_between(steps, *bootstrap_interval(values), color=colour, alpha=0.2, lw=0)
    ax.plot(steps, values.mean(axis=0), color=colour, lw=1.6)


def _learning_curve(cell: Cell) -> tuple[NDArray, NDArray]:
    """Scores while training, closed by the last policy's own score at the last step."""
    steps, values = series(cell.runs, "normalized_score" if cell.unit == "score" else "return_mean")
    last = max(run.result["steps"] for run in cell.runs)
    before = steps < last
    return np.append(steps[before], last), np.column_stack([values[:, before], cell.values])


def _scale_updates(ax: Axes, dataset: str, group: Sequence[Cell]) -> None:
    """Make the axis logarithmic where long runs would press the short ones against its start."""
    updates = [run.result["steps"] for c in group if c.dataset == dataset for run in c.runs]
    if updates and max(updates) > 5 * min(updates):
        ax.set_xscale("log")


def _logged(group: Sequence[Cell], key: str) -> list[Cell]:
    """The cells whose runs all logged a metric more than once."""
    return [cell for cell in group if len(series(cell.runs, key)[0]) > 1]


def _weighted(cell: Cell) -> bool:
    """Whether the weights of the runs ever left 1."""
    ess = series(cell.runs, "ESS")[1]
    return ess.size > 0 and bool((ess < 1.0 - 1e-6).any())
