"""Figures of what happened while training: scores, losses and weights over updates."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import NDArray

from benchmarks.axes import style
from benchmarks.report.drawing import TITLE, UNIT, colours, legend, panels
from benchmarks.report.names import algorithm_label, dataset_label
from benchmarks.report.scores import Cell, algorithms, datasets
from benchmarks.results import FinishedRun
from benchmarks.statistics import MIN_SEEDS, bootstrap_interval

_POINTS = 150  # longer series are averaged into this many points


def learning_curves(group: Sequence[Cell]) -> Figure | None:
    """Score over training steps, mean over seeds and its interval; the dot is the last policy."""
    curves = {id(cell): _learning_curve(cell) for cell in group}
    if all(len(steps) < 2 for steps, _ in curves.values()):
        return None
    colour = colours(group)
    figure, axes = panels(datasets(group), height=3.0)
    for cell in group:
        ax = axes[cell.dataset]
        steps, values = curves[id(cell)]
        _band(ax, steps, values, colour[cell.algo])
        if len(steps):
            ax.plot(steps[-1], values[:, -1].mean(), "o", ms=6, color=colour[cell.algo], zorder=3)
        ax.set_ylabel(UNIT[cell.unit])
        ax.set_xlabel("update")
    for dataset, ax in axes.items():
        _scale_updates(ax, dataset, group)
    legend(figure, colour)
    return figure


def training_curves(group: Sequence[Cell]) -> Figure | None:
    """Log-probability, critics and effective sample size over updates, a column a dataset."""
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
    drawn = [cell for _, _, members in rows for cell in members]
    names, colour = datasets(sorted(drawn, key=lambda cell: cell.dataset)), colours(group)
    figure = Figure(figsize=(max(5.0, 3.6 * len(names)), 2.7 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(names), squeeze=False)
    for row, (key, label, members) in zip(axes, rows, strict=True):
        for dataset, ax in zip(names, row, strict=True):
            style(ax)
            ax.set_title(dataset_label(dataset), fontsize=TITLE)
            ax.set_xlabel("update")
            for cell in (cell for cell in members if cell.dataset == dataset):
                _band(ax, *_series(cell.runs, key), colour[cell.algo])
            _scale_updates(ax, dataset, members)
            if key == "ESS":
                ax.set_ylim(0.0, 1.04)
        row[0].set_ylabel(label)
    present = {cell.algo for cell in drawn}
    legend(figure, {name: colour[name] for name in colour if name in present})
    return figure


def weight_quantiles(group: Sequence[Cell]) -> Figure | None:
    """Quantiles of the importance weights over training steps, mean over seeds."""
    shown = [cell for cell in group if _weighted(cell)]
    shown = [cell for cell in shown if len(_series(cell.runs, "weight_q50")[0]) > 1]
    if not shown:
        return None
    colour, names, algos = colours(group), datasets(shown), algorithms(shown)
    figure = Figure(figsize=(max(5.0, 3.6 * len(names)), 2.6 * len(algos)), layout="constrained")
    axes = figure.subplots(len(algos), len(names), squeeze=False, sharey=True)
    for ax in axes.flat:
        ax.set_axis_off()
    for cell in shown:
        ax = axes[algos.index(cell.algo), names.index(cell.dataset)]
        ax.set_axis_on()
        style(ax)
        mean = {}
        for key in ("q05", "q25", "q50", "q75", "q95"):
            steps, values = _series(cell.runs, f"weight_{key}")
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
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    for ax in axes.flat:
        low, high = ax.get_ylim()
        ax.yaxis.set_major_formatter(plain)
        # Below a decade the powers of ten alone would leave the axis without numbers.
        ax.yaxis.set_minor_formatter(plain if high < 10 * low else NullFormatter())
    grey = [
        Line2D([], [], color="0.35", label="median"),
        Line2D([], [], color="0.35", alpha=0.45, lw=8, label="25 to 75 %"),
        Line2D([], [], color="0.35", alpha=0.2, lw=8, label="5 to 95 %"),
    ]
    figure.legend(handles=grey, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _band(ax: Axes, steps: NDArray, values: NDArray, colour: str) -> None:
    """Mean over seeds, and its bootstrap interval where there are three seeds or more."""
    steps, values = _binned(steps, values)
    if len(values) >= MIN_SEEDS and len(steps):
        ax.fill_between(steps, *bootstrap_interval(values), color=colour, alpha=0.2, lw=0)
    ax.plot(steps, values.mean(axis=0), color=colour, lw=1.6)


def _series(runs: Sequence[FinishedRun], key: str) -> tuple[NDArray, NDArray]:
    """Steps ``[T]`` at which every run has a value of ``key``, and the values ``[seeds, T]``."""
    rows = [{row["step"]: row[key] for row in run.metrics if key in row} for run in runs]
    steps = sorted(set.intersection(*(set(row) for row in rows)))
    return np.array(steps), np.array([[row[step] for step in steps] for row in rows])


def _learning_curve(cell: Cell) -> tuple[NDArray, NDArray]:
    """Scores while training, closed by the last policy's own score at the last step."""
    steps, values = _series(
        cell.runs, "normalized_score" if cell.unit == "score" else "return_mean"
    )
    last = max(run.result["steps"] for run in cell.runs)
    before = steps < last
    return np.append(steps[before], last), np.column_stack([values[:, before], cell.values])


def _scale_updates(ax: Axes, dataset: str, group: Sequence[Cell]) -> None:
    """A logarithmic axis where long runs would press the short ones against its start."""
    updates = [run.result["steps"] for c in group if c.dataset == dataset for run in c.runs]
    if updates and max(updates) > 5 * min(updates):
        ax.set_xscale("log")


def _logged(group: Sequence[Cell], key: str) -> list[Cell]:
    """The cells whose runs all logged a metric more than once."""
    return [cell for cell in group if len(_series(cell.runs, key)[0]) > 1]


def _weighted(cell: Cell) -> bool:
    """Whether the weights of the runs ever left 1."""
    ess = _series(cell.runs, "ESS")[1]
    return ess.size > 0 and bool((ess < 1.0 - 1e-6).any())


def _binned(steps: NDArray, values: NDArray) -> tuple[NDArray, NDArray]:
    size = len(steps) // _POINTS
    if size < 2:
        return steps, values
    kept = len(steps) // size * size
    return (
        steps[:kept].reshape(-1, size).mean(axis=1),
        values[:, :kept].reshape(len(values), -1, size).mean(axis=2),
    )
