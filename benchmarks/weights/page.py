"""What weights do, as tables for terminal and page, and as figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from benchmarks.report import figures
from benchmarks.report.document import (
    INK,
    MARK,
    NOTHING,
    Document,
    Grid,
    check_replaced,
    escaped,
    to_html,
)
from benchmarks.report.scores import algorithm_colour
from benchmarks.weights.options import Options
from benchmarks.weights.source import Source
from iwsft.diagnostics import QUANTILES, diagnose, weighed
from iwsft.files import write, write_json
from iwsft.objective import LOSS
from iwsft.weights import TargetESS

PAGE, NUMBERS = "index.html", "weights.json"
_NAMES = {
    "ESS": "effective sample size, a share of the draws",
    "weight_top1": "share of the total weight that the heaviest 1 % have",
    "weight_score_corr": "rank correlation of the weight with the score",
    "weight_length_corr": "rank correlation of the weight with the length",
    "pareto_k": "Pareto k-hat",
    **{f"weight_q{round(100 * p):02d}": f"weight, {100 * p:g} % quantile" for p in QUANTILES},
    "weight_max": "largest weight",
    "clip_fraction": "share whose weight a clip changed",
    "loss": "loss of q",
    "unweighted_loss": "unweighted loss of q",
}
_MEANING = (
    "The first table is of the importance weights after all transforms. A trajectory that counts "
    "three times is three draws; data weights count in the two losses alone. The others are of the "
    "weights exp(k log-ratio) without clips and other transforms, of a trajectory's mean or summed "
    "log-ratio as the weights above take it, or of a step's where each has a weight of its own."
)
_COLOUR = algorithm_colour("iw-sft")
_BINS = 40


def measure(source: Source, options: Options) -> dict[str, Any]:
    """What the weights of a source do, as plain values: the content of ``weights.json``."""
    values = {name: float(x.sum()) for name, x in source.loss.summary(source.terms).items()}
    values |= diagnose(source.loss, source.trajectories, source.terms)
    values["loss"] = values[LOSS]
    asked = [(f, float(TargetESS(f).exponent(*source.log_ratio))) for f in options.target_ess]
    return {
        "name": source.name,
        "chain": repr(source.chain),
        "weights": {name: values[name] for name in _NAMES if name in values},
        "temperatures": [
            {"k": k, "ESS": source.ess(k), "top1": source.top1(k)} for k in options.temperatures
        ],
        "targets": [{"target": f, "k": k, "ESS": source.ess(k)} for f, k in asked],
    }


def tables(measured: dict[str, Any]) -> dict[str, Grid]:
    """The tables by their titles."""
    known = measured["weights"]
    rows = [[name, _number(known.get(key, math.nan))] for key, name in _NAMES.items()]
    by_k = [[*map(_number, row.values())] for row in measured["temperatures"]]
    asked = Grid(["target ESS", "temperature k", "ESS"], left=0)
    for row in measured["targets"]:
        *cells, ess = map(_number, row.values())
        missed = not math.isclose(row["ESS"], row["target"], rel_tol=1e-3)
        note = [f"no temperature up to {TargetESS.max_alpha:g} gives it"]
        asked.rows.append([*cells, asked.marked(ess, note * missed)])
    return {
        f"Weights of {measured['name']}": Grid(["quantity", "value"], rows, left=1),
        "Weights exp(k log-ratio)": Grid(
            ["temperature k", "ESS", "share of the heaviest 1 %"], by_k, left=0
        ),
        "Temperature by ESS": asked,
    }


def write_page(source: Source, measured: dict[str, Any], folder: Path) -> Path:
    """Write the page and the numbers into a folder; returns the page."""
    document = Document()
    document.section("")
    document.text(escaped(" ".join(source.notes)))
    document.text(f"Weights: `{source.chain!r}`. {_MEANING}")
    for title, grid in tables(measured).items():
        document.table(grid, f"{escaped(title)}.")
    document.figure(
        "weights",
        figures.finish({"log-weights": _draw_weights(source), "ESS": _draw_ess(source, measured)}),
        "Log-weights after all transforms, with the number of draws that have them; effective "
        "sample size over the temperature, where the dots are the targets.",
    )
    markdown = document.markdown(f"Weights of {source.name}")
    check_replaced({folder / PAGE: MARK, folder / NUMBERS: '"chain": '})
    write_json(folder / NUMBERS, measured)
    write(folder / PAGE, to_html(markdown, document.images))
    return folder / PAGE


def _draw_weights(source: Source) -> Axes:
    trajectories = weighed(source.loss, source.terms)
    log_weight = trajectories.units.double().log().numpy()
    finite, shares = np.isfinite(log_weight), trajectories.unit_share.numpy()
    ax = figures.make_panel("", 2.5)
    ax.hist(log_weight[finite], _BINS, weights=shares[finite], color=_COLOUR)
    ax.set(xlabel="log-weight", ylabel="draws")
    return ax


def _draw_ess(source: Source, measured: dict[str, Any]) -> Axes:
    ks = [row["k"] for name in ("temperatures", "targets") for row in measured[name] if row["k"]]
    ax = figures.make_panel("", 2.5)
    if ks:
        grid = np.geomspace(min(ks), max(ks), 100)
        ax.plot(grid, [source.ess(k) for k in grid], color=_COLOUR, lw=1.4)
    for row in measured["targets"]:
        ax.plot(row["k"], row["ESS"], "o", ms=5, color=INK)
    ax.set(xlabel="temperature k", ylabel="effective sample size (share of the draws)")
    ax.set_ylim(0.0, 1.04)
    figures.scale_log(ax, "x")
    return ax


def _number(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.4g}"
