"""Figures of a report, drawn without a display; one colour an algorithm in all of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter
from numpy.typing import NDArray

from benchmarks.report.aggregates import METRICS, Aggregates, Estimate
from benchmarks.report.runs import Run
from benchmarks.report.scores import (
    ALGORITHMS,
    MIN_SEEDS,
    Cell,
    algorithms,
    bootstrap_interval,
    datasets,
)

_COLOURS = dict(
    zip(
        ALGORITHMS,
        # Greys: cloning; blues: SFT; oranges: iw-SFT; the rest: baselines with a critic.
        ["#a6a6a6", "#595959", "#6db6e8", "#1f63a8", "#f2a93b", "#d1440c", "#8a5a2b"]
        + ["#2a9d6f", "#8b6fc4", "#b5a300", "#d46aa5", "#20b5c2"],
        strict=True,
    )
)
_VARIANT_COLOURS = ["#7f3c8d", "#11a579", "#e73f74", "#80ba5a", "#008695", "#cf1c90", "#4b4b8f"]
_TITLE = 11
_POINTS = 150  # longer series are averaged into this many points
_LABEL = {"score": "D4RL-normalised score", "return": "mean return"}


def _colours(group: Sequence[Cell]) -> dict[str, str]:
    names = algorithms(group)
    others = [name for name in names if name not in _COLOURS]
    extra = {name: _VARIANT_COLOURS[i % len(_VARIANT_COLOURS)] for i, name in enumerate(others)}
    return {name: _COLOURS.get(name) or extra[name] for name in names}


def scores(group: Sequence[Cell]) -> Figure:
    """Every seed's score as a dot, the mean as a bar, the interval as a line; a panel a dataset."""
    colour, names = _colours(group), algorithms(group)
    figure, axes = _panels(datasets(group), height=0.75 + 0.34 * len(names), share_rows=True)
    for cell in group:
        ax, y = axes[cell.dataset], names.index(cell.algo)
        ax.barh(y, cell.mean, height=0.72, color=colour[cell.algo], alpha=0.35, lw=0)
        dots = np.full(len(cell.runs), y + 0.14)
        ax.plot(cell.values, dots, "o", ms=5, mfc=colour[cell.algo], mec="white", mew=0.8)
        if cell.interval is not None:
            ax.plot(cell.interval, [y - 0.16] * 2, "-|", color="0.15", lw=1.3, ms=5)
        ax.set_xlabel(_LABEL[cell.unit])
    for ax in axes.values():
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.margins(x=0.04)
        ax.axvline(0.0, color="0.6", lw=0.8)
        ax.grid(axis="y", visible=False)
    return figure


def learning_curves(group: Sequence[Cell]) -> Figure | None:
    """Score over training steps, mean over seeds and its interval; the dot is the last policy."""
    curves = {id(cell): _learning_curve(cell) for cell in group}
    if all(len(steps) < 2 for steps, _ in curves.values()):
        return None
    colour = _colours(group)
    figure, axes = _panels(datasets(group), height=3.0)
    for cell in group:
        ax = axes[cell.dataset]
        steps, values = curves[id(cell)]
        _band(ax, steps, values, colour[cell.algo])
        if len(steps):
            ax.plot(steps[-1], values[:, -1].mean(), "o", ms=6, color=colour[cell.algo], zorder=3)
        ax.set_ylabel(_LABEL[cell.unit])
        ax.set_xlabel("training step")
    _legend(figure, colour)
    return figure


def training_curves(group: Sequence[Cell]) -> Figure | None:
    """Loss and effective sample size over training steps, a column a dataset."""
    rows = [
        ("loss", "loss", [cell for cell in group if len(_series(cell.runs, "loss")[0]) > 1]),
        ("ESS", "effective sample size\n(share of the batch)", [c for c in group if _weighted(c)]),
    ]
    rows = [row for row in rows if row[2]]
    if not rows:
        return None
    names, colour = datasets(group), _colours(group)
    figure = Figure(figsize=(max(5.0, 3.6 * len(names)), 2.7 * len(rows)), layout="constrained")
    axes = figure.subplots(len(rows), len(names), squeeze=False)
    for row, (key, label, members) in zip(axes, rows, strict=True):
        for dataset, ax in zip(names, row, strict=True):
            _style(ax)
            ax.set_title(dataset, fontsize=_TITLE)
            ax.set_xlabel("training step")
            for cell in (cell for cell in members if cell.dataset == dataset):
                _band(ax, *_series(cell.runs, key), colour[cell.algo])
            if key == "ESS":
                ax.set_ylim(0.0, 1.04)
        row[0].set_ylabel(label)
    drawn = {cell.algo for _, _, members in rows for cell in members}
    _legend(figure, {name: colour[name] for name in colour if name in drawn})
    return figure


def weight_quantiles(group: Sequence[Cell]) -> Figure | None:
    """Quantiles of the importance weights over training steps, mean over seeds."""
    shown = [cell for cell in group if _weighted(cell)]
    shown = [cell for cell in shown if len(_series(cell.runs, "weight_q50")[0]) > 1]
    if not shown:
        return None
    colour, names, algos = _colours(group), datasets(shown), algorithms(shown)
    figure = Figure(figsize=(max(5.0, 3.6 * len(names)), 2.6 * len(algos)), layout="constrained")
    axes = figure.subplots(len(algos), len(names), squeeze=False, sharey=True)
    for ax in axes.flat:
        ax.set_axis_off()
    for cell in shown:
        ax = axes[algos.index(cell.algo), names.index(cell.dataset)]
        ax.set_axis_on()
        _style(ax)
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
        ax.set_title(f"{cell.dataset}, {cell.algo}", fontsize=_TITLE)
        ax.set_xlabel("training step")
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


def aggregate_metrics(aggregates: Aggregates, group: Sequence[Cell]) -> Figure | None:
    """rliable's aggregate metrics with 95 % intervals, a panel a metric."""
    if not aggregates.estimates:
        return None
    colour, names = _colours(group), list(aggregates.estimates)
    figure = Figure(figsize=(11.0, 1.1 + 0.32 * len(names)), layout="constrained")
    for i, (ax, metric) in enumerate(
        zip(figure.subplots(1, len(METRICS), sharey=True), METRICS, strict=True)
    ):
        estimates = {name: aggregates.estimates[name][i] for name in names}
        _intervals(ax, estimates, colour)
        better = "higher" if metric.higher_is_better else "lower"
        ax.set_title(f"{metric.label}\n({better} is better)", fontsize=_TITLE)
        ax.set_xlabel("D4RL-normalised score")
    return figure


def improvement(aggregates: Aggregates, group: Sequence[Cell]) -> Figure | None:
    """Probability of improvement of the candidate over each other algorithm."""
    if not aggregates.improvement:
        return None
    estimates = aggregates.improvement
    figure = Figure(figsize=(6.0, 1.1 + 0.32 * len(estimates)), layout="constrained")
    ax = figure.subplots()
    _intervals(ax, estimates, _colours(group))
    ax.axvline(0.5, color="0.3", lw=0.8, ls=":")
    ax.set_xlim(-0.02, 1.02)
    ax.set_xlabel(f"P({aggregates.candidate} scores higher than the algorithm)")
    return figure


def _intervals(ax: Axes, estimates: dict[str, Estimate], colour: dict[str, str]) -> None:
    _style(ax)
    for y, (name, estimate) in enumerate(estimates.items()):
        ax.barh(
            y, estimate.high - estimate.low, left=estimate.low, height=0.55, lw=0,
            color=colour[name], alpha=0.5,
        )  # fmt: skip
        ax.plot([estimate.point] * 2, [y - 0.275, y + 0.275], color="black", lw=1.6)
    ax.use_sticky_edges = False
    ax.margins(x=0.06)
    ax.set_yticks(range(len(estimates)), list(estimates))
    ax.set_ylim(len(estimates) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)


def _panels(
    names: list[str], height: float, *, share_rows: bool = False
) -> tuple[Figure, dict[str, Axes]]:
    """One panel a dataset, at most three in a row."""
    columns = 2 if len(names) == 4 else min(3, len(names))
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(max(5.0, 4.0 * columns), height * rows), layout="constrained")
    axes = list(figure.subplots(rows, columns, squeeze=False, sharey=share_rows).flat)
    panels = dict(zip(names, axes, strict=False))
    for name, ax in panels.items():
        _style(ax)
        ax.set_title(name, fontsize=_TITLE)
    for ax in axes[len(names) :]:
        ax.set_axis_off()
    return figure, panels


def _style(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(color="0.9", lw=0.8)
    ax.set_axisbelow(True)


def _legend(figure: Figure, colour: dict[str, str]) -> None:
    handles = [Line2D([], [], color=value, lw=2.5, label=name) for name, value in colour.items()]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False
    )


def _band(ax: Axes, steps: NDArray, values: NDArray, colour: str) -> None:
    """Mean over seeds, and its bootstrap interval where there are three seeds or more."""
    steps, values = _binned(steps, values)
    if len(values) >= MIN_SEEDS and len(steps):
        ax.fill_between(steps, *bootstrap_interval(values), color=colour, alpha=0.2, lw=0)
    ax.plot(steps, values.mean(axis=0), color=colour, lw=1.6)


def _series(runs: Sequence[Run], key: str) -> tuple[NDArray, NDArray]:
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
