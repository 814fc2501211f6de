"""What weights do, as tables for terminal and page, and as figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.report import figures
from benchmarks.report.document import INK, NOTHING, Document, Grid, escaped, to_html
from benchmarks.report.figures import Panels
from benchmarks.report.scores import algorithm_colour
from benchmarks.runs import write_json
from benchmarks.weights.options import Options
from benchmarks.weights.source import Source
from iwsft.diagnostics import QUANTILES, describe, unweighted_loss, weight_quantiles
from iwsft.files import written_whole
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
_COLOUR = algorithm_colour("iw-sft")
_BINS = 40


def measure(source: Source, options: Options) -> dict[str, Any]:
    """What the weights of a source do, as plain values: the content of ``weights.json``."""
    fractions = options.target_ess
    asked = [(f, float(TargetESS(f).exponent(*source.raw))) for f in fractions]
    return {
        "name": source.name,
        "chain": repr(source.chain),
        "weights": _numbers(source),
        "temperatures": [
            {"k": k, "ESS": source.ess(k), "top1": source.top1(k)} for k in options.temperatures
        ],
        "targets": [{"target": f, "k": k, "ESS": source.ess(k)} for f, k in asked],
    }


def _numbers(source: Source) -> dict[str, float]:
    """What the weights of the chain do, by name; what is not known is left out."""
    out, weighed = source.loss.summary(source.terms), source.weighed
    quantiles = weight_quantiles(weighed.units, weighed.unit_share).tolist()
    values = {
        **{name: float(out[name]) for name in ("ESS", "weight_max", "clip_fraction")},
        **describe(weighed),
        **{f"weight_q{round(100 * p):02d}": q for p, q in zip(QUANTILES, quantiles, strict=True)},
        "loss": float(out[LOSS].sum()),
        "unweighted_loss": float(unweighted_loss(source.loss, source.terms)),
    }
    return {name: values[name] for name in _NAMES if name in values}


def tables(measured: dict[str, Any]) -> dict[str, Grid]:
    """The tables by their titles."""
    known = measured["weights"]
    rows = [[name, _number(known.get(key, math.nan))] for key, name in _NAMES.items()]
    whole = Grid(["quantity", "value"], rows, left=1)
    rows = [[_number(x) for x in row.values()] for row in measured["temperatures"]]
    by_k = Grid(["temperature k", "ESS", "share of the heaviest 1 %"], rows, left=0)
    asked = Grid(["target ESS", "temperature k", "ESS"], left=0)
    for row in measured["targets"]:
        cells = [_number(x) for x in row.values()]
        missed = not math.isclose(row["ESS"], row["target"], rel_tol=1e-3)
        note = [f"no temperature up to {TargetESS.max_alpha:g} gives it"]
        asked.rows.append([*cells[:2], asked.marked(cells[2], note if missed else [])])
    titles = f"Weights of {measured['name']}", "Weights exp(k log-ratio)", "Temperature by ESS"
    return dict(zip(titles, (whole, by_k, asked), strict=True))


def write_page(source: Source, measured: dict[str, Any], folder: Path) -> Path:
    """Write the page and the numbers into a folder; returns the page."""
    document, (whole, by_k, asked) = Document(), tables(measured).values()
    document.section("")
    document.bullets(map(escaped, source.notes))
    document.text(f"Weights: `{source.chain!r}`.")
    document.section("What the weights do")
    document.table(
        whole,
        "Importance weights after all transforms. A trajectory counts by its multiplicity; data "
        "weights count in the two losses alone.",
    )
    caption = "Log-weights after all transforms, with the number of draws that have them."
    document.figure("weights", _draw_weights(source), caption)
    document.section("Temperatures")
    document.table(
        by_k,
        "Weights exp(k log-ratio). The log-ratio of a trajectory is the mean or sum of its steps', "
        "as the weights above take it, without clips and other transforms. Where each step has a "
        "weight of its own, it is that of the step.",
    )
    document.table(asked, "The temperature that `TargetESS` takes, once for all of the data.")
    caption = "Effective sample size over the temperature; the dots are the targets."
    document.figure("ESS", _draw_ess(source, measured), caption)
    markdown = document.markdown(f"Weights of {source.name}")
    write_json(folder / NUMBERS, measured)
    with written_whole(folder / PAGE) as partial:
        partial.write_text(to_html(markdown, document.images))
    return folder / PAGE


def _draw_weights(source: Source) -> Panels:
    log_weight = source.weighed.units.double().log().numpy()
    finite, shares = np.isfinite(log_weight), source.weighed.unit_share.numpy()
    ax = figures.make_panel("", 2.5)
    ax.hist(log_weight[finite], _BINS, weights=shares[finite], color=_COLOUR)
    ax.set(xlabel="log-weight", ylabel="draws")
    return figures.finish({"log-weights": ax})


def _draw_ess(source: Source, measured: dict[str, Any]) -> Panels:
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
    return figures.finish({"ESS": ax})


def _number(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.4g}"
