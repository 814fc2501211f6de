"""Compare the losses of the same language runs in two folders.

python -m scripts.compare_losses runs/llm/arithmetic runs/zero3/llm/arithmetic
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.results import LANGUAGE, RecordedRun, ResultsError, read_all


@dataclass(frozen=True)
class Options:
    """Compare the runs that both folders have, update by update."""

    one: tyro.conf.Positional[Path]
    """Folder of a recipe's runs: OUT/llm/RECIPE."""
    other: tyro.conf.Positional[Path]
    """Another folder of runs of the same recipe."""
    first: int = 50
    """Number of first updates that are compared."""


def main(options: Options) -> None:
    """Print, for each run, the largest relative difference of a loss, and both scores."""
    if options.first < 1:
        raise SystemExit(f"error: --first {options.first}: at least 1")
    try:
        folders = [read_all(folder, LANGUAGE) for folder in (options.one, options.other)]
    except ResultsError as error:
        raise SystemExit(f"error: {error}") from error
    for run in (run for _, unfinished in folders for run in unfinished):
        if run.damage:
            raise SystemExit(f"error: {run.damage}")
    one, other = ({_name(run): run for run in finished} for finished, _ in folders)
    shared = [name for name in one if name in other and one[name].metrics]
    if not shared:
        raise SystemExit(f"error: {options.one} and {options.other} share no trained run")
    for name in shared:
        here, there = (_losses(runs[name], options.first) for runs in (one, other))
        if len(here) != len(there):
            raise SystemExit(f"error: {name} logged {len(here)} and {len(there)} losses")
        apart = max(abs(a - b) / abs(a) for a, b in zip(here, there, strict=True))
        scores = " ".join(f"{runs[name].result['score']:.3f}" for runs in (one, other))
        print(f"{name}: losses {apart:.1e} apart, scores {scores}")


def _name(run: RecordedRun) -> str:
    return f"{run.dataset} {run.algo} seed {run.seed}"


def _losses(run: RecordedRun, first: int) -> list[float]:
    return [row["loss"] for row in run.metrics if "loss" in row][:first]


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
