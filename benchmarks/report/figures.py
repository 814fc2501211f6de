"""Figures of control runs: scores, cost, training, weights; what all figures share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from benchmarks.report import scores
from benchmarks.report.scores import Cell
from benchmarks.report.tables import WeightRow, last_weights
from benchmarks.results import SCORE, RecordedRun
from benchmarks.statistics import MIN_SEEDS, t_interval

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
UNIT = {SCORE: "D4RL-normalised score", scores.RETURN: "mean return"}
_POINTS = 150  # longer series are averaged into this many points
_PLAIN = FuncFormatter(lambda value, _: f"{value:g}")


def literal(text: str) -> str:
    """A text whose dollars do not begin a formula."""
    return text.replace("$", r"\$")


def make_axes(
    rows: int, columns: int, size: tuple[float, float], *, sharey: bool = False
) -> tuple[Figure, NDArray[Any]]:
    """Make a figure with axes ``[rows, columns]``, which have a light grid and no frame."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=sharey)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(color="0.9", lw=0.8)
        ax.set_axisbelow(True)
    return figure, axes


def make_panels(
    names: list[str], height: float, *, share_rows: bool = False
) -> tuple[Figure, dict[str, Axes]]:
    """Make a figure with one panel for each dataset, at most three in a row."""
    columns = 2 if len(names) == 4 else min(3, len(names))
    rows = -(-len(names) // columns)
    size = (max(5.0, 4.0 * columns), height * rows)
    figure, axes = make_axes(rows, columns, size, sharey=share_rows)
    for ax in axes.flat[len(names) :]:
        ax.set_axis_off()
    by_name = dict(zip(names, axes.flat, strict=False))
    for name, ax in by_name.items():
        ax.set_title(literal(scores.dataset_label(name)), fontsize=TITLE)
    return figure, by_name


def choose_colours(group: Sequence[Cell]) -> dict[str, str]:
    """Choose a colour for each algorithm, the same in all figures of the same cells."""
    names = scores.algorithms(group)
    others = [name for name in names if name not in COLOURS]
    shades = colormaps["viridis"]
    extra = {name: to_hex(shades(0.9 * i / len(others))) for i, name in enumerate(others)}
    return {name: COLOURS.get(name) or extra[name] for name in names}


def add_legend(figure: Figure, handles: Sequence[Artist], most: int = 6) -> None:
    """Show a legend below all panels, with at most so many columns."""
    columns = min(most, len(handles))
    figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False)


def add_colours(figure: Figure, colour: Mapping[str, str]) -> None:
    """Show the colours of the algorithms below all panels."""
    labels = {literal(scores.algorithm_label(name)): c for name, c in colour.items()}
    add_legend(figure, [Line2D([], [], color=c, lw=2.5, label=n) for n, c in labels.items()])


def plot_score(ax: Axes, y: int, cell: Cell, colour: str) -> None:
    """Plot every seed's score as a dot, the mean as a bar and the interval as a line."""
    values = cell.values
    ax.barh(y, cell.mean, height=0.72, color=colour, alpha=0.35, lw=0)
    ax.plot(values, [y + 0.14] * len(values), "o", ms=5, mfc=colour, mec="white", mew=0.8)
    if cell.interval is not None:
        ax.plot(cell.interval, [y - 0.16] * 2, "-|", color="0.15", lw=1.3, ms=5)


def list_names(ax: Axes, names: Iterable[str]) -> None:
    """Write the names on the y axis, from top to bottom."""
    labels = list(map(literal, names))
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(len(labels) - 0.5, -0.5)
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


def series(runs: Sequence[RecordedRun], key: str) -> tuple[NDArray, NDArray]:
    """Steps ``[T]`` at which every run has a value of ``key``, and the values ``[seeds, T]``."""
    rows = [{row["step"]: row[key] for row in run.metrics if key in row} for run in runs]
    steps = sorted(set.intersection(*(set(row) for row in rows)))
    return np.array(steps), np.array([[row[step] for step in steps] for row in rows])


def draw_scores(group: Sequence[Cell]) -> Figure:
    """Draw the scores of all seeds with means and intervals, one panel for each dataset."""
    colour, names = choose_colours(group), scores.algorithms(group)
    figure, axes = make_panels(
        scores.datasets(group), height=0.75 + 0.34 * len(names), share_rows=True
    )
    for cell in group:
        ax = axes[cell.dataset]
        plot_score(ax, names.index(cell.algo), cell, colour[cell.algo])
        ax.set_xlabel(UNIT[cell.score_key])
    for ax in axes.values():
        list_names(ax, map(scores.algorithm_label, names))
        ax.margins(x=0.04)
        ax.axvline(0.0, color="0.6", lw=0.8)
    return figure


def draw_cost(group: Sequence[Cell]) -> Figure:
    """Draw scores against CPU seconds of a run with its reference, one panel for each dataset."""
    colour = choose_colours(group)
    figure, axes = make_panels(scores.datasets(group), height=3.2)
    for cell in group:
        ax = axes[cell.dataset]
        plot_mean(ax, cell.cpu_seconds, cell, colour[cell.algo])
        ax.set(xlabel="CPU seconds of a run, reference included", ylabel=UNIT[cell.score_key])
    for ax in axes.values():
        scale_log(ax)
    add_colours(figure, colour)
    return figure


def draw_learning_curves(group: Sequence[Cell]) -> Figure | None:
    """Draw scores over updates, mean over seeds and its interval; the dot is the last policy."""
    colour = choose_colours(group)
    figure, axes = make_panels(scores.datasets(group), height=3.0)
    longest = 0
    for cell in group:
        ax = axes[cell.dataset]
        steps, values = series(cell.runs, cell.score_key)
        # The last policy's own score closes the curve.
        last = max(run.result["steps"] for run in cell.runs)
        before = steps < last
        longest = max(longest, int(before.sum()))
        closed = np.column_stack([values[:, before], cell.values])
        _band(ax, np.append(steps[before], last), closed, colour[cell.algo])
        ax.plot(last, cell.mean, "o", ms=6, color=colour[cell.algo], zorder=3)
        ax.set(ylabel=UNIT[cell.score_key], xlabel="update")
    for dataset, ax in axes.items():
        _scale_updates(ax, dataset, group)
    add_colours(figure, colour)
    return figure if longest else None


def draw_training_curves(group: Sequence[Cell]) -> Figure | None:
    """Draw log-probability, critics and effective sample size, one column for each dataset."""
    likelihood = "log-likelihood of the batches\n(mean over steps)"
    lines = [
        ("log_prob", likelihood, _logged(group, "log_prob")),
        ("pred_value", "critic's mean value Q(s, a)", _logged(group, "pred_value")),
        ("ESS", "effective sample size\n(share of the batch)", list(filter(_weighted, group))),
    ]
    lines = [line for line in lines if line[2]]
    if not lines:
        return None
    shown = [cell for *_, rows in lines for cell in rows]
    names, colour = sorted(set(scores.datasets(shown))), choose_colours(group)
    size = (max(5.0, 3.6 * len(names)), 2.7 * len(lines))
    figure, axes = make_axes(len(lines), len(names), size)
    for row, (key, label, rows) in zip(axes, lines, strict=True):
        for dataset, ax in zip(names, row, strict=True):
            ax.set_title(literal(scores.dataset_label(dataset)), fontsize=TITLE)
            ax.set_xlabel("update")
            for cell in (cell for cell in rows if cell.dataset == dataset):
                _band(ax, *series(cell.runs, key), colour[cell.algo])
            _scale_updates(ax, dataset, rows)
            if key == "ESS":
                ax.set_ylim(0.0, 1.04)
        row[0].set_ylabel(label)
    add_colours(figure, {name: colour[name] for name in scores.algorithms(shown)})
    return figure


def draw_weight_quantiles(group: Sequence[Cell]) -> Figure | None:
    """Draw quantiles of the importance weights over updates, mean over seeds."""
    shown = [cell for cell in _logged(group, "weight_q50") if _weighted(cell)]
    if not shown:
        return None
    colour, names, algos = choose_colours(group), scores.datasets(shown), scores.algorithms(shown)
    size = (max(5.0, 3.6 * len(names)), 2.6 * len(algos))
    figure, axes = make_axes(len(algos), len(names), size, sharey=True)
    for ax in axes.flat:
        ax.set_axis_off()
    for cell in shown:
        ax, shade = axes[algos.index(cell.algo), names.index(cell.dataset)], colour[cell.algo]
        ax.set_axis_on()
        for low, high, alpha in (("q05", "q95", 0.18), ("q25", "q75", 0.35)):
            steps, _ = series(cell.runs, f"weight_{low}")
            ends = [series(cell.runs, f"weight_{q}")[1].mean(axis=0) for q in (low, high)]
            ax.fill_between(steps, *ends, color=shade, alpha=alpha, lw=0)
        steps, medians = series(cell.runs, "weight_q50")
        ax.plot(steps, medians.mean(axis=0), color=shade)
        ax.axhline(1.0, color="0.3", lw=0.8, ls=":")
        ax.set(yscale="log", xlabel="update", ylabel="importance weight")
        ax.set_title(literal(", ".join(cell.labels)), fontsize=TITLE)
    for ax in axes.flat:
        low, high = ax.get_ylim()
        ax.yaxis.set_major_formatter(_PLAIN)
        # Below a decade the powers of ten alone would leave the axis without numbers.
        ax.yaxis.set_minor_formatter(_PLAIN if high < 10 * low else NullFormatter())
    looks = (("median", 1.0, 1.5), ("25 to 75 %", 0.45, 8.0), ("5 to 95 %", 0.2, 8.0))
    grey = [Line2D([], [], color="0.35", alpha=a, lw=w, label=text) for text, a, w in looks]
    add_legend(figure, grey)
    return figure


def draw_sweep(rows: Sequence[WeightRow]) -> Figure | None:
    """Draw scores against the effective sample size at the end, one panel for each dataset.

    The dashed line is the same algorithm without weights; several lines in a panel are named.
    """
    rows = [(setting, c) for setting, c in rows if not setting or last_weights(c, "ESS")]
    weighted = [(setting, cell) for setting, cell in rows if setting]
    plain = [cell for setting, cell in rows if not setting]
    if not weighted:
        return None
    figure, axes = make_panels(scores.datasets(cell for _, cell in rows), height=3.4)
    for cell in plain:
        ax = axes[cell.dataset]
        ax.axhline(cell.mean, color=choose_colours([cell])[cell.algo], lw=1.2, ls="--")
        if sum(other.dataset == cell.dataset for other in plain) > 1:
            at = ax.get_yaxis_transform()
            name = literal(scores.algorithm_label(cell.algo))
            ax.text(0.99, cell.mean, name, transform=at, ha="right")
    for setting, cell in weighted:
        ax = axes[cell.dataset]
        ess, target = float(np.mean(last_weights(cell, "ESS"))), setting.target_ess
        plot_mean(ax, ess, cell, "#1f63a8" if target else "#d1440c")
        panel = [other for other, c in weighted if c.dataset == cell.dataset]
        words = f"ESS {target:g}" if target else f"k {setting.temperature:g}"
        # The lag is named only where the panel has several.
        if len({other.lag for other in panel}) > 1:
            words = f"{words}, {setting.lag}"
        # Where the panel has two sweeps, the variant tells which is which.
        if panel.count(setting) > 1:
            words = literal(cell.algo.rpartition("/")[0]) or words
        ax.annotate(words, (ess, cell.mean), xytext=(6, 5), textcoords="offset points", fontsize=8)
        ax.set_xlabel("effective sample size at the end (share of the data)")
        ax.set_ylabel(UNIT[cell.score_key])
    for ax in axes.values():
        ax.margins(x=0.25)
        scale_log(ax)
    return figure


def _band(ax: Axes, steps: NDArray, values: NDArray, colour: str) -> None:
    """Plot the mean over seeds, and its 95 % interval for three seeds or more."""
    size = len(steps) // _POINTS
    if size > 1:
        whole = len(steps) // size * size
        steps = steps[:whole].reshape(-1, size).mean(axis=1)
        values = values[:, :whole].reshape(len(values), -1, size).mean(axis=2)
    if len(values) >= MIN_SEEDS and len(steps):
        ax.fill_between(steps, *t_interval(values), color=colour, alpha=0.2, lw=0)
    ax.plot(steps, values.mean(axis=0), color=colour, lw=1.6)


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
