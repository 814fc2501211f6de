"""Tables of the control results, in README and docs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.report.aggregates import signed
from benchmarks.report.document import NOTHING, Grid, interval_text
from benchmarks.report.scores import Cell, cells, compare, datasets
from benchmarks.results import RecordedRun
from benchmarks.statistics import MIN_SEEDS, difference, t_interval

ALGORITHMS = {
    "sft-q": "SFT(Q)",
    "k0/iw-sft-q": "iw-SFT(Q), all weights 1",
    "iw-sft-q": "iw-SFT(Q), k of Table 4",
    "auto/iw-sft-q": "iw-SFT(Q), auto",
}
DIFFERENCES = {
    "k of Table 4 - all weights 1": ("iw-sft-q", "k0/iw-sft-q"),
    "auto - all weights 1": ("auto/iw-sft-q", "k0/iw-sft-q"),
    "k of Table 4 - SFT(Q)": ("iw-sft-q", "sft-q"),
    "auto - SFT(Q)": ("auto/iw-sft-q", "sft-q"),
    "all weights 1 - SFT(Q)": ("k0/iw-sft-q", "sft-q"),
}


# All forms of SFT, and baselines.
FORMS = {
    "bc": "BC",
    "bc-10": "BC-10%",
    "sft": "SFT",
    "k0/iw-sft": "iw-SFT, all weights 1",
    "iw-sft": "iw-SFT",
    "iw-sft-step": "iw-SFT-step",
    **ALGORITHMS,
    "ess0.4/iw-sft-q": "iw-SFT(Q), ESS 0.4",
    "awac": "AWAC",
    "iql": "IQL",
    "td3-bc": "TD3+BC",
    "cql": "CQL",
    "dt": "DT",
}
_SHARP = "ess0.4/iw-sft-q"
# Weights, and what they are compared with at the same learning rate and number of updates.
DRAWN = {"iw-sft": "sft", "iw-sft-q": "sft-q"}
# Weights at the same settings, which one Gaussian and a mixture of Gaussians ran with.
WEIGHTINGS = ("k0/iw-sft-q", "ess0.4/iw-sft-q", "auto/iw-sft-q")
# Policies of scripts.step_overshoot.
_MOVED = {
    "sft": "SFT",
    "iw-sft-step": "iw-SFT-step",
    "added": "SFT + c (SFT - reference)",
    "removed": "iw-SFT-step - c (SFT - reference)",
}
# Runs of Table 4's walker2d row: the batch, the weights, and the runs with all weights 1.
_ROW = {
    "k0/iw-sft-q": ("single steps", "all 1", None),
    "authors/iw-sft-q": ("single steps", "k = 10, at most 1,000 (authors)", "k0/iw-sft-q"),
    "whole-k0/iw-sft-q": ("whole trajectories", "all 1", None),
    "whole/iw-sft-q": ("whole trajectories", "k = 10 (paper)", "whole-k0/iw-sft-q"),
}
# What they are compared with. Where SFT(Q) has the settings of iw-SFT(Q), it is that run.
EQUAL = ("k0/iw-sft-q", "sft-q")
# Forms on the top 10 % without quality bins, and their own equal weights.
_TOP_10 = ("sft", "iw-sft", "iw-sft-step", "k0/iw-sft")
# Weights, and runs of the same curated set without any.
GAINS = {
    "iw-sft-q": EQUAL,
    "auto/iw-sft-q": EQUAL,
    _SHARP: EQUAL,
    "iw-sft": ("k0/iw-sft", "sft"),
    "iw-sft-step": ("k0/iw-sft", "sft"),
}


def score_grid(runs: Sequence[RecordedRun]) -> Grid:
    """Mean scores with their 95 % intervals, one row for each dataset."""
    by_name = _by_name(runs)
    grid = Grid(["dataset", *ALGORITHMS.values()], left=1)
    for dataset in datasets(by_name.values()):
        row = [_score(by_name.get((dataset, algo))) for algo in ALGORITHMS]
        grid.rows.append([dataset, *row])
    return grid


def difference_grid(runs: Sequence[RecordedRun]) -> Grid:
    """Differences of mean scores with their 95 % intervals, one row for each dataset."""
    by_name = _by_name(runs)
    grid = Grid(["dataset", *DIFFERENCES], left=1)
    for dataset in datasets(by_name.values()):
        pairs = ([by_name.get((dataset, algo)) for algo in pair] for pair in DIFFERENCES.values())
        grid.rows.append([dataset, *(_difference(*pair) for pair in pairs)])
    return grid


def form_grid(runs: Sequence[RecordedRun]) -> Grid:
    """Mean scores of all forms of SFT, and their differences to equal weights.

    Those are of the same curated set, where such runs were made. The datasets are those on which a
    target ESS ran.
    """
    by_name = _by_name(runs)
    names = [name for name in datasets(by_name.values()) if (name, _SHARP) in by_name]
    grid = Grid(
        ["", *(column for name in names for column in (name, "less equal weights"))], left=1
    )
    for algo, form in FORMS.items():
        row = []
        for name in names:
            cell = by_name.get((name, algo))
            same = (_TOP_10[-1], *EQUAL) if algo in _TOP_10 else EQUAL
            equal = next(by_name[name, each] for each in same if (name, each) in by_name)
            row += [_score(cell), NOTHING if cell is equal else _difference(cell, equal)]
        if {*row} != {NOTHING}:
            grid.rows.append([form, *row])
    return grid


def gain_grid(records: Sequence[tuple[str, Sequence[RecordedRun]]]) -> Grid:
    """What weights gain on each dataset of each record, and on average over kinds of data.

    A record comes with where its data were made. Weights are compared with runs of the same curated
    set and schedule whose weights are all 1. The last row is the mean over the kinds, which are one
    environment and behaviour each, with the interval over them. Sets of a kind are averaged first.
    """
    rows: dict[str, list[list[str]]] = {}
    gains: dict[str, dict[str, list[float]]] = {algo: {} for algo in GAINS}
    for place, runs in records:
        by_name = _by_name(runs)
        for name in datasets(by_name.values()):
            kind, row = re.sub(r"-(mini|\d+)$", "", name), [name, place]
            for algo, others in GAINS.items():
                ours = by_name.get((name, algo))
                equal = next(
                    (
                        by_name[name, each]
                        for each in others
                        if ours and (name, each) in by_name
                        if by_name[name, each].schedule == ours.schedule
                    ),
                    None,
                )
                row.append(_difference(ours, equal))
                if ours and equal:
                    gains[algo].setdefault(kind, []).append(ours.mean - equal.mean)
            rows.setdefault(kind, []).append(row)
    grid = Grid(["dataset", "made on", *(FORMS[algo] for algo in GAINS)], left=2)
    grid.rows += itertools.chain(*(rows[kind] for kind in sorted(rows)))
    last = []
    for kinds in gains.values():
        if len(kinds) < MIN_SEEDS:
            last.append(NOTHING)
            continue
        means = np.array([[np.mean(values)] for values in kinds.values()])
        gain = signed(difference(means, np.zeros_like(means), paired=True))
        last.append(f"{gain}, {len(kinds)} kinds")
    grid.rows.append(["mean over kinds", "", *last])
    return grid


def draw_grid(runs: Sequence[RecordedRun]) -> Grid:
    """What weights gain on each draw of a dataset, and on average: an interval over the draws."""
    by_name = _by_name(runs)
    names = datasets(by_name.values())
    pairs = [[[by_name[name, algo] for name in names] for algo in pair] for pair in DRAWN.items()]
    titles = [[FORMS[other], f"{FORMS[algo]} less {FORMS[other]}"] for algo, other in DRAWN.items()]
    grid = Grid(["draw", *itertools.chain(*titles)], left=1)
    for i, name in enumerate(names):
        each = [(_score(others[i]), _difference(ours[i], others[i])) for ours, others in pairs]
        grid.rows.append([name, *itertools.chain(*each)])
    row = [f"mean of {len(names)} draws"]
    for pair in pairs:
        ours, others = (np.array([[cell.mean] for cell in cells]) for cells in pair)
        gain = signed(difference(ours, others, paired=True))
        row += [mean_text(others[:, 0], 1), gain]
    grid.rows.append(row)
    return grid


def row_grid(runs: Sequence[RecordedRun]) -> Grid:
    """Scores of Table 4's walker2d row by batch and weights.

    Differences are those of the seeds that both have, paired.
    """
    by_algo = {cell.algo: cell for cell in cells(runs)}
    grid = Grid(["a batch has", "weights", "seeds", "score", "less all weights 1"], left=2)
    for algo, (batch, weights, equal) in _ROW.items():
        cell, gap = by_algo[algo], NOTHING
        if equal is not None:
            both = {*cell.seeds} & {*by_algo[equal].seeds}
            pair = {each.algo: each for each in cells([run for run in runs if run.seed in both])}
            gap = _difference(pair[algo], pair[equal])
        grid.rows.append([batch, weights, str(len(cell.seeds)), _score(cell), gap])
    return grid


def policy_grid(runs: Sequence[RecordedRun]) -> Grid:
    """Scores of one Gaussian and of a mixture by their weights, and what the weights gain each.

    Rows: the scores, then their differences to equal weights. The last column is the difference of
    the two policies, paired by seed. The records are of one dataset.
    """
    by_algo = {cell.algo: cell for cell in cells(runs)}
    grid = Grid(["weights", "one Gaussian", "mixture of five", "mixture less one Gaussian"], left=1)
    pairs = [(by_algo[algo], by_algo[f"mixture-{algo}"]) for algo in WEIGHTINGS]
    for algo, pair in zip(WEIGHTINGS, pairs, strict=True):
        one, mixture = pair
        grid.rows.append([FORMS[algo], _score(one), _score(mixture), _difference(mixture, one)])
    equal = pairs[0]
    if len({tuple(cell.seeds) for pair in pairs for cell in pair}) > 1:
        raise ValueError("the runs of both policies must have the same seeds")
    for algo, pair in zip(WEIGHTINGS[1:], pairs[1:], strict=True):
        row, gains = [f"{FORMS[algo]}, less equal weights"], []
        for ours, others in zip(pair, equal, strict=True):
            row.append(_difference(ours, others))
            gains.append((ours.values - others.values)[:, None])
        of_one, of_mixture = gains
        grid.rows.append([*row, signed(difference(of_mixture, of_one, paired=True))])
    return grid


def step_grid(records: Sequence[Mapping[str, Any]]) -> Grid:
    """What ``scripts.step_overshoot`` measured, one column for each dataset."""
    grid = Grid(["", *(record["dataset"] for record in records)], left=1)

    def add(title: str, texts: Iterable[str]) -> None:
        grid.rows.append([title, *texts])

    for algo in ("bc", "sft", "iw-sft", "iw-sft-step"):
        add(f"spread of {FORMS[algo]}", (f"{each['spread'][algo]:.3f}" for each in records))
    for algo in ("sft", "iw-sft", "iw-sft-step"):
        shares = (np.array(each["inherited"][algo]) for each in records)
        add(f"share of the reference's errors in {FORMS[algo]}", (mean_text(x, 2) for x in shares))
    for algo in ("iw-sft", "iw-sft-step"):
        slopes = (np.array(each["slope"][algo]) for each in records)
        add(f"c of {FORMS[algo]}", (mean_text(each, 3) for each in slopes))
    farther = (np.array(each["farther"]) for each in records)
    add("share of states farther from the reference", (mean_text(each, 3) for each in farther))
    scores = [
        {algo: np.array(values) for algo, values in each["scores"].items()} for each in records
    ]
    for algo, title in _MOVED.items():
        add(f"score of {title}", (mean_text(each[algo], 1) for each in scores))
    for ours, other in (("iw-sft-step", "sft"), ("added", "sft"), ("removed", "iw-sft-step")):
        gaps = (
            difference(each[ours][:, None], each[other][:, None], paired=True) for each in scores
        )
        add(f"{_MOVED[ours]}, less {_MOVED[other]}", map(signed, gaps))
    return grid


def source_grid(records: Sequence[Mapping[str, Any]]) -> Grid:
    """What ``scripts.weights_by_source`` measured, one row for each policy that made the data."""
    columns = ["dataset", "weights", "policy", "noise", "trajectories", "return", "of the draws"]
    grid = Grid([*columns, "of the weight"], left=3)
    for record in records:
        for each in record["sources"]:
            numbers = f"{each['trajectories']}", f"{each['return']:,.0f}", f"{each['draws']:.2f}"
            form = FORMS[record["algo"]].removeprefix("iw-SFT(Q), ")
            row = [record["dataset"], form, each["policy"], f"{each['noise']:g}", *numbers]
            grid.rows.append([*row, mean_text(each["weights"], 2)])
    return grid


def error_grid(records: Sequence[Mapping[str, Any]]) -> Grid:
    """What ``scripts.imitation_error`` measured, one row for each dataset and algorithm.

    Differences are those to equal weights on the seeds that both have, paired.
    """
    digits = {"error": 3, "slope": 3, "score": 1}
    titles = ((name, f"{name}, less equal weights") for name in digits)
    grid = Grid(["dataset", "", "seeds", *itertools.chain(*titles)], left=2)
    equal = {record["dataset"]: record for record in records if record["algo"] == EQUAL[0]}
    for record in records:
        other = equal[record["dataset"]]
        row = [record["dataset"], FORMS[record["algo"]], str(len(record["seeds"]))]
        for name, shown in digits.items():
            gap = _gap(record, name, other, name, shown)
            row += [mean_text(record[name], shown), NOTHING if record is other else gap]
        grid.rows.append(row)
    return grid


def factor_grid(records: Sequence[Mapping[str, Any]]) -> Grid:
    """Scores of policies whose actions ``scripts.imitation_error`` multiplied by a factor."""
    columns = ["dataset", "actions of", "factor", "seeds", "score", "less a factor of 1"]
    grid = Grid([*columns, "less k of Table 4"], left=2)
    weighted = {record["dataset"]: record for record in records if record["algo"] == "iw-sft-q"}
    for record in records:
        for factor, scores in record["scaled"].items():
            moved = {**record, "moved": scores}
            others = (record, weighted[record["dataset"]])
            gaps = (_gap(moved, "moved", other, "score", 1) for other in others)
            row = [record["dataset"], FORMS[record["algo"]], factor, str(len(scores))]
            grid.rows.append([*row, mean_text(scores, 1), *gaps])
    return grid


def _gap(
    ours: Mapping[str, Any], name: str, others: Mapping[str, Any], other: str, digits: int
) -> str:
    """Difference of two measures of records with its interval, over the seeds that both have."""
    both = [seed for seed in ours["seeds"] if seed in others["seeds"]]
    pair = (
        np.array([[record[key][record["seeds"].index(seed)]] for seed in both])
        for record, key in ((ours, name), (others, other))
    )
    return signed(difference(*pair, paired=True), digits)


def mean_text(values: NDArray[np.float64] | Sequence[float], digits: int) -> str:
    """The mean with its 95 % interval."""
    low, high = (float(end) for end in t_interval(values))
    return f"{np.mean(values):.{digits}f} ({interval_text((low, high), digits)})"


def _by_name(runs: Sequence[RecordedRun]) -> dict[tuple[str, str], Cell]:
    return {(cell.dataset, cell.algo): cell for cell in cells(runs)}


def _score(cell: Cell | None) -> str:
    return NOTHING if cell is None else f"{cell.mean:.1f} ({interval_text(cell.interval)})"


def _difference(ours: Cell | None, others: Cell | None) -> str:
    gap = None if ours is None or others is None else compare([ours], [others])
    if ours is None or others is None or gap is None:
        return NOTHING
    same = ours.seeds == others.seeds and np.array_equal(ours.values, others.values)
    return "0 in each run" if same else signed(gap)
