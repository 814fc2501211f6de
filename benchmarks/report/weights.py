"""Settings of the importance weights that runs were made with, and the scores that they gave."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from benchmarks.report.figures import UNIT, choose_colours, make_panels, plot_mean, scale_log
from benchmarks.report.grid import NOTHING, Grid, interval_text
from benchmarks.report.scores import Cell, algorithm_label, algorithm_rank, base, datasets
from benchmarks.report.tables import FEW_SEEDS
from benchmarks.results import FinishedRun

# Algorithms with weights on trajectories, and the same algorithms with all weights 1.
_UNWEIGHTED = {"iw-sft": "sft", "iw-sft-q": "sft-q"}
# What may differ within a sweep: the seed, the weights, and the learning rate, which is published
# for each algorithm.
_FREE = ("algo", "seed", "target_ess", "sync_every", "fine_tuning", "settings_from")
# Metric of a row of metrics.jsonl -> heading.
_METRICS = {
    "ESS": "ESS",
    "weight_q05": "weight, 5 %",
    "weight_q50": "50 %",
    "weight_q95": "95 %",
    "pareto_k": "Pareto k-hat",
    "weighted_return": "mean return under the weights",
}


@dataclass(frozen=True)
class Setting:
    """Settings with which the weights of a run were made."""

    temperature: float  # factor k of the mean log-ratio; 0 where a target ESS decides it
    target_ess: float  # effective sample size as a share of the batch; 0 for none
    sync_every: int  # updates between hard syncs of q; 0 for a moving average
    alpha: float  # decay of the moving average; 0 for hard syncs

    @property
    def lag(self) -> str:
        """How q follows the policy."""
        return f"sync every {self.sync_every}" if self.sync_every else f"average, {self.alpha:g}"


_Row = tuple[Setting | None, Cell]


def _setting_of(run: FinishedRun) -> Setting | None:
    """Setting of a run's weights, from its ``config.json``; None where it has none."""
    settings = run.config.get("settings", {})
    row = settings.get("fine_tuning")
    if base(run.algo) not in _UNWEIGHTED or row is None:
        return None
    target = settings.get("target_ess") or 0.0
    by_sync = run.result.get("estimator") == "steps"
    return Setting(
        temperature=0.0 if target else row["k"],
        target_ess=target,
        sync_every=settings["sync_every"] if by_sync else 0,
        alpha=0.0 if by_sync else row["alpha"],
    )


def swept(group: Sequence[Cell]) -> list[_Row]:
    """A cell for each dataset, algorithm and setting of the weights, in that order.

    Runs of other data, cuts or steps are a sweep of their own. The same algorithm without weights
    (setting None), with the learning rate published for it, comes first, where it was run. Sweeps
    have two settings or more.
    """
    sweeps: dict[tuple[str, str, str], dict[tuple[Setting | None, str], Cell]] = {}
    for cell in group:
        name = base(cell.algo)
        plain = _UNWEIGHTED.get(name, name)
        for run in cell.runs if plain in _UNWEIGHTED.values() else ():
            setting = _setting_of(run)
            if setting or name == plain:
                members = sweeps.setdefault((cell.dataset, plain, _fixed_settings(run)), {})
                part = members.get((setting, cell.algo), replace(cell, runs=()))
                members[setting, cell.algo] = replace(part, runs=(*part.runs, run))

    def order(row: _Row) -> tuple[Any, ...]:
        setting, cell = row
        return (astuple(setting) if setting else (), algorithm_rank(cell.algo))

    rows: list[_Row] = []
    for members in sweeps.values():
        if len({setting for setting, _ in members if setting}) > 1:
            rows += sorted(((setting, cell) for (setting, _), cell in members.items()), key=order)
    return rows


def _fixed_settings(run: FinishedRun) -> str:
    """Settings that a sweep leaves alone."""
    settings = run.config.get("settings", {})
    fixed = {name: value for name, value in settings.items() if name not in _FREE}
    steps = (settings.get("fine_tuning") or {}).get("steps")
    return json.dumps({**fixed, "steps": steps}, sort_keys=True)


def last_weights(cell: Cell, metric: str) -> list[float]:
    """A metric of the last row that has the weights' quantiles, of each seed that has it."""
    rows = [[row for row in run.metrics if "weight_q50" in row] for run in cell.runs]
    return [probes[-1][metric] for probes in rows if probes and metric in probes[-1]]


def _last_mean(cell: Cell, metric: str) -> str:
    values = last_weights(cell, metric)
    return f"{np.mean(values):.4g}" if values else NOTHING


def weight_grid(group: Sequence[Cell]) -> Grid:
    """Table of the last measured weights: means over the seeds that have the metric."""
    grid = Grid(["dataset", "algorithm", *_METRICS.values()])
    for cell in group:
        if last_weights(cell, "weight_q50"):
            grid.rows.append([*cell.labels, *(_last_mean(cell, metric) for metric in _METRICS)])
    return grid


def sweep_grid(rows: Sequence[_Row]) -> Grid:
    """Table with a row for each setting of the weights: its score, and its weights at the end."""
    grid = Grid(
        ["dataset", "algorithm", "temperature k", "target ESS", "q follows", "seeds", "score"]
        + ["95 % interval", "ESS", "mean return under the weights"],
    )
    for setting, cell in rows:
        numbers = (setting.temperature, setting.target_ess) if setting else (0.0, 0.0)
        grid.rows.append(
            [
                *cell.labels,
                *(f"{number:g}" if number else NOTHING for number in numbers),
                setting.lag if setting else "all weights 1",
                str(len(cell.runs)),
                f"{cell.mean:.1f}",
                grid.marked(interval_text(cell.interval), [] if cell.interval else [FEW_SEEDS]),
                _last_mean(cell, "ESS"),
                _last_mean(cell, "weighted_return"),
            ]
        )
    return grid


def draw_sweep(rows: Sequence[_Row]) -> Figure | None:
    """Draw scores against the effective sample size at the end, one panel for each dataset.

    The dashed line is the same algorithm without weights; several lines in a panel are named.
    """
    weighted = [(setting, c) for setting, c in rows if setting and last_weights(c, "ESS")]
    plain = [cell for setting, cell in rows if not setting]
    if not weighted:
        return None
    names = datasets(c for setting, c in rows if not setting or last_weights(c, "ESS"))
    figure, axes = make_panels(names, height=3.4)
    for cell in plain:
        ax = axes[cell.dataset]
        ax.axhline(cell.mean, color=choose_colours([cell])[cell.algo], lw=1.2, ls="--")
        if sum(other.dataset == cell.dataset for other in plain) > 1:
            at = ax.get_yaxis_transform()
            ax.text(0.99, cell.mean, algorithm_label(cell.algo), transform=at, ha="right")
    for setting, cell in weighted:
        ax = axes[cell.dataset]
        ess = float(np.mean(last_weights(cell, "ESS")))
        plot_mean(ax, ess, cell, "#1f63a8" if setting.target_ess else "#d1440c")
        panel = [other for other, c in weighted if c.dataset == cell.dataset]
        target = setting.target_ess
        words = f"ESS {target:g}" if target else f"k {setting.temperature:g}"
        # The lag is named only where the panel has several.
        if len({other.lag for other in panel}) > 1:
            words = f"{words}, {setting.lag}"
        # Where the panel has two sweeps, the variant tells which is which.
        if panel.count(setting) > 1:
            words = cell.algo.rpartition("/")[0] or words
        ax.annotate(words, (ess, cell.mean), xytext=(6, 5), textcoords="offset points", fontsize=8)
        ax.set_xlabel("effective sample size at the end (share of the data)")
        ax.set_ylabel(UNIT[cell.score_key])
    for ax in axes.values():
        ax.margins(x=0.25)
        scale_log(ax)
    return figure
