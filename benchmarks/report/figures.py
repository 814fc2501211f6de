"""Figures of the scores: seed by seed, over datasets, against cost and against the weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from benchmarks.axes import style
from benchmarks.report.aggregates import METRICS, Aggregates
from benchmarks.report.drawing import TITLE, UNIT, colours, legend, panels
from benchmarks.report.names import algorithm_label, is_variant
from benchmarks.report.scores import Cell, Estimate, algorithms, datasets
from benchmarks.report.sweep import Setting, last_look


def scores(group: Sequence[Cell]) -> Figure:
    """Every seed's score as a dot, the mean as a bar, the interval as a line; a panel a dataset."""
    colour, names = colours(group), algorithms(group)
    figure, axes = panels(datasets(group), height=0.75 + 0.34 * len(names), share_rows=True)
    for cell in group:
        ax, y = axes[cell.dataset], names.index(cell.algo)
        ax.barh(y, cell.mean, height=0.72, color=colour[cell.algo], alpha=0.35, lw=0)
        dots = np.full(len(cell.runs), y + 0.14)
        ax.plot(cell.values, dots, "o", ms=5, mfc=colour[cell.algo], mec="white", mew=0.8)
        if cell.interval is not None:
            ax.plot(cell.interval, [y - 0.16] * 2, "-|", color="0.15", lw=1.3, ms=5)
        ax.set_xlabel(UNIT[cell.unit])
    for ax in axes.values():
        ax.set_yticks(range(len(names)), list(map(algorithm_label, names)))
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.margins(x=0.04)
        ax.axvline(0.0, color="0.6", lw=0.8)
        ax.grid(axis="y", visible=False)
    return figure


def aggregate_metrics(aggregates: Aggregates, group: Sequence[Cell]) -> Figure | None:
    """rliable's aggregate metrics with 95 % intervals, a panel a metric."""
    if not aggregates.estimates:
        return None
    colour, names = colours(group), list(aggregates.estimates)
    figure = Figure(figsize=(11.0, 1.1 + 0.32 * len(names)), layout="constrained")
    for i, (ax, metric) in enumerate(
        zip(figure.subplots(1, len(METRICS), sharey=True), METRICS, strict=True)
    ):
        estimates = {name: aggregates.estimates[name][i] for name in names}
        _intervals(ax, estimates, colour)
        better = "higher" if metric.higher_is_better else "lower"
        ax.set_title(f"{metric.label}\n({better} is better)", fontsize=TITLE)
        ax.set_xlabel("D4RL-normalised score")
    return figure


def improvement(aggregates: Aggregates, group: Sequence[Cell]) -> Figure | None:
    """Probability of improvement of each candidate over each other algorithm, a panel each."""
    found = aggregates.improvement
    if not found:
        return None
    rows = max(len(estimates) for estimates in found.values())
    figure = Figure(figsize=(5.6 * len(found), 1.1 + 0.32 * rows), layout="constrained")
    for ax, (candidate, estimates) in zip(
        figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True
    ):
        _intervals(ax, estimates, colours(group))
        ax.axvline(0.5, color="0.3", lw=0.8, ls=":")
        ax.set_xlim(-0.02, 1.02)
        ax.set_xlabel(f"P({algorithm_label(candidate)} scores higher than the algorithm)")
    return figure


def profiles(aggregates: Aggregates, group: Sequence[Cell]) -> Figure | None:
    """Share of runs above each score: the algorithms, and beside them the variants."""
    if not aggregates.profiles:
        return None
    names, colour = list(aggregates.profiles), colours(group)
    plain = [name for name in names if not is_variant(name)]
    parts = [part for part in (plain, [name for name in names if is_variant(name)]) if part]
    figure = Figure(figsize=(5.6 * len(parts), 3.8), layout="constrained")
    for ax, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        style(ax)
        for name in part:
            profile = aggregates.profiles[name]
            ax.fill_between(
                profile.thresholds,
                profile.low,
                profile.high,
                step="post",
                color=colour[name],
                alpha=0.15,
                lw=0,
            )
            ax.step(profile.thresholds, profile.share, where="post", color=colour[name], lw=1.6)
        ax.set_ylim(-0.02, 1.02)
        ax.set_xlabel("D4RL-normalised score")
        ax.set_ylabel("share of runs that score higher")
    legend(figure, {name: colour[name] for name in names})
    return figure


def cost(group: Sequence[Cell]) -> Figure:
    """Score against CPU seconds of a run with its reference, a panel a dataset."""
    colour = colours(group)
    figure, axes = panels(datasets(group), height=3.2)
    for cell in group:
        ax = axes[cell.dataset]
        _point(ax, cell.cpu_seconds, cell, colour[cell.algo])
        ax.set_xlabel("CPU seconds of a run, reference included")
        ax.set_ylabel(UNIT[cell.unit])
    for ax in axes.values():
        _log_axis(ax)
    legend(figure, colour)
    return figure


def sweep(rows: Sequence[tuple[Setting | None, Cell]]) -> Figure | None:
    """Score against the effective sample size at the end, a panel a dataset.

    The line is the same algorithm without weights; several are named.
    """
    seen = [(held, cell) for held, cell in rows if held is None or last_look(cell, "ESS")]
    if all(held is None for held, _ in seen):
        return None
    figure, axes = panels(datasets(cell for _, cell in seen), height=3.4)
    lags = {(cell.dataset, held.lag) for held, cell in seen if held is not None}
    lines = [cell.dataset for held, cell in seen if held is None]
    for held, cell in seen:
        ax = axes[cell.dataset]
        if held is None:
            ax.axhline(cell.mean, color=colours([cell])[cell.algo], lw=1.2, ls="--")
            if lines.count(cell.dataset) > 1:
                at = ax.get_yaxis_transform()
                ax.text(0.99, cell.mean, algorithm_label(cell.algo), transform=at, ha="right")
            continue
        ess = float(np.mean(last_look(cell, "ESS")))
        _point(ax, ess, cell, "#1f63a8" if held.target_ess else "#d1440c")
        # The lag is only named where the panel has several.
        several = sum(dataset == cell.dataset for dataset, _ in lags) > 1
        words = f"{held.sharpness}, {held.lag}" if several else held.sharpness
        # Of two sweeps in a panel, the variant tells which is which.
        if sum((other, c.dataset) == (held, cell.dataset) for other, c in seen) > 1:
            words = cell.algo.rpartition("/")[0] or words
        ax.annotate(words, (ess, cell.mean), xytext=(6, 5), textcoords="offset points", fontsize=8)
        ax.set_xlabel("effective sample size at the end (share of the data)")
        ax.set_ylabel(UNIT[cell.unit])
    for ax in axes.values():
        ax.margins(x=0.25)
        _log_axis(ax)
    return figure


def _point(ax: Axes, x: float, cell: Cell, colour: str) -> None:
    """The mean of a cell, and its interval where it has one."""
    if cell.interval is not None:
        ax.plot([x, x], cell.interval, color=colour, lw=1.4, alpha=0.7)
    ax.plot(x, cell.mean, "o", ms=6.5, color=colour, mec="white", mew=0.8)


def _log_axis(ax: Axes) -> None:
    """A logarithmic x axis with plain numbers."""
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    # Below two decades the powers of ten alone would leave the axis almost without numbers.
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 100 * low else (1,)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(plain)


def _intervals(ax: Axes, estimates: dict[str, Estimate], colour: Mapping[str, str]) -> None:
    style(ax)
    for y, (name, estimate) in enumerate(estimates.items()):
        ax.barh(
            y, estimate.high - estimate.low, left=estimate.low, height=0.55, lw=0,
            color=colour[name], alpha=0.5,
        )  # fmt: skip
        ax.plot([estimate.point] * 2, [y - 0.275, y + 0.275], color="black", lw=1.6)
    ax.use_sticky_edges = False
    ax.margins(x=0.06)
    ax.set_yticks(range(len(estimates)), list(map(algorithm_label, estimates)))
    ax.set_ylim(len(estimates) - 0.5, -0.5)
    ax.grid(axis="y", visible=False)
