"""The report: one markdown page and its figures, written file by file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.report import figures, published, tables
from benchmarks.report.aggregates import Aggregates, aggregate
from benchmarks.report.runs import ReportError, read_runs, unfinished_runs
from benchmarks.report.scores import MIN_SEEDS, Cell, cells, uneven
from iwsft.files import written_whole

PAGE = "report.md"
_DPI = 130


def write_report(folder: Path, out: Path) -> Path:
    """Read the runs below ``folder`` and write the page and its figures into ``out``.

    Returns:
        The page.

    Raises:
        ReportError: there is no finished run, or a file of a run cannot be read.
    """
    runs, unfinished = read_runs(folder), unfinished_runs(folder)
    if not runs:
        raise ReportError(
            f"no finished run below {folder} ({len(unfinished)} unfinished): a run is a folder "
            "d4rl/DATASET/ALGO/seed-K with a result.json, as `python -m benchmarks.d4rl` writes it"
        )
    group = cells(runs)
    aggregates = aggregate(group)
    drawn = {
        "scores.png": figures.scores(group),
        "learning_curves.png": figures.learning_curves(group),
        "aggregates.png": figures.aggregate_metrics(aggregates, group),
        "improvement.png": figures.improvement(aggregates, group),
        "training.png": figures.training_curves(group),
        "weights.png": figures.weight_quantiles(group),
    }
    for name, figure in drawn.items():
        _save(figure, out / name)
    shown = {name for name, figure in drawn.items() if figure is not None}
    with written_whole(out / PAGE) as partial:
        partial.write_text(_page(group, aggregates, shown, unfinished))
    return out / PAGE


def _save(figure: Figure | None, path: Path) -> None:
    if figure is None:
        path.unlink(missing_ok=True)  # of an earlier report, which had more runs
        return
    with written_whole(path) as partial:
        figure.savefig(partial, dpi=_DPI, format="png", bbox_inches="tight")


def _page(
    group: Sequence[Cell], aggregates: Aggregates, shown: set[str], unfinished: Sequence[Path]
) -> str:
    sections = [
        "# Control runs",
        _scores(group, unfinished),
        _image("scores.png", "Score of each seed (dots), mean (bars) and interval.", shown),
        _aggregates(aggregates, shown),
        "## Learning curves" if "learning_curves.png" in shown else "",
        _image(
            "learning_curves.png",
            f"Mean over seeds; the band is the 95 % bootstrap interval ({MIN_SEEDS} seeds or "
            "more). Points on the way are evaluated on fewer episodes; the dot is the last "
            "policy's score of the table.",
            shown,
        ),
        "## Training" if shown & {"training.png", "weights.png"} else "",
        _image(
            "training.png",
            "Loss, and effective sample size of the importance weights where they left 1.",
            shown,
        ),
        _image("weights.png", "Quantiles of the importance weights, mean over seeds.", shown),
        _weights(group),
        "## Cost",
        "One run, evaluation included, mean over seeds. The reference policy is trained once for "
        "all algorithms that start from it, and stands apart.",
        tables.cost_grid(group).markdown(),
        _provenance(group),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _weights(group: Sequence[Cell]) -> str:
    grid = tables.weight_grid(group)
    return f"At the end, mean over seeds:\n\n{grid.markdown()}" if grid.rows else ""


def _scores(group: Sequence[Cell], unfinished: Sequence[Path]) -> str:
    grid = tables.score_grid(group)
    parts = [
        "## Scores",
        "Score of the last policy, never of the best one on the way; the mean over episodes is "
        "taken in each seed, then over seeds. Standard deviation and interval (95 %, percentile "
        f"bootstrap of the mean) are over seeds, and only given for {MIN_SEEDS} seeds or more; "
        "with so few seeds the interval is rather too narrow.",
        grid.markdown(),
    ]
    if len(grid.columns) > 7:
        parts.append(f"Published numbers: {published.source()}. They were not run here.")
    else:
        parts.append("The paper has no numbers for these datasets and algorithms.")
    different = uneven(group)
    if different:
        parts.append("**Read with care**\n\n" + "\n".join(f"- {line}" for line in different))
    if unfinished:
        listed = "\n".join(f"- `{path}`" for path in unfinished)
        parts.append(f"{len(unfinished)} unfinished runs are left out:\n\n{listed}")
    return "\n\n".join(parts)


def _aggregates(aggregates: Aggregates, shown: set[str]) -> str:
    parts = ["## Over datasets"] if aggregates.estimates or aggregates.left_out else []
    if aggregates.estimates:
        parts += [
            f"Aggregates over {', '.join(aggregates.datasets)} by rliable, with 95 % intervals "
            "from a stratified bootstrap over seeds. The optimality gap is what is missing to a "
            "score of 100.",
            tables.aggregate_grid(aggregates).markdown(),
            _image("aggregates.png", "Point estimates (lines) and 95 % intervals (bars).", shown),
            _image(
                "improvement.png",
                f"Probability that a run of {aggregates.candidate} scores higher than a run of "
                "the other algorithm on the same dataset, mean over datasets.",
                shown,
            ),
        ]
    if aggregates.left_out:
        listed = "\n".join(f"- {algo}: {why}" for algo, why in aggregates.left_out.items())
        parts.append(f"Left out of the aggregates:\n\n{listed}")
    return "\n\n".join(part for part in parts if part)


def _image(name: str, caption: str, shown: set[str]) -> str:
    return f"![{caption}]({name})\n\n{caption}" if name in shown else ""


def _provenance(group: Sequence[Cell]) -> str:
    grid = tables.Grid(["dataset", "algorithm", "environment", "preset", "estimator", "seeds"])
    grid.left = len(grid.columns)
    for cell in group:
        grid.rows.append(
            [cell.dataset, cell.algo]
            + [
                ", ".join(str(value) for value in cell.all(key) if value is not None)
                for key in ("env_id", "preset", "estimator")
            ]
            + [" ".join(str(seed) for seed in cell.seeds)]
        )
    runs = [run for cell in group for run in cell.runs]
    versions = _distinct(
        {**run.config.get("versions", {}), **run.result.get("versions", {})} for run in runs
    )
    hardware = _distinct(run.config.get("hardware") for run in runs)
    commands = _distinct(run.config.get("command") for run in runs)
    return "\n\n".join(
        [
            "## How these numbers were made",
            grid.markdown(),
            f"Versions:\n\n{_listed(versions)}",
            f"Hardware:\n\n{_listed(hardware)}",
            "Commands:\n\n```\n" + "\n".join(commands or ["not recorded"]) + "\n```",
        ]
    )


def _distinct(values: Any) -> list[str]:
    texts = [
        value if isinstance(value, str) else ", ".join(f"{k} {_text(v)}" for k, v in value.items())
        for value in values
        if value
    ]
    return list(dict.fromkeys(texts))


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _listed(texts: Sequence[str]) -> str:
    return "\n".join(f"- {text}" for text in texts or ["not recorded"])
