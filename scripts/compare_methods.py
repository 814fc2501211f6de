"""Compare methods on the arithmetic job, each at a learning rate chosen on other problems.

    python -m scripts.compare_methods --out runs/methods

Each method trains with the tuning seeds at every rate, in OUT/lr-RATE. Its rate is the one with the
largest share of right answers to problems of validation, which no test asks. While that is the
smallest or the largest rate tried, one more is tried beyond it, at most ``--more`` times. The seeds
that are reported train at the rate, in OUT/llm/arithmetic. A second call continues what was cut
off. OUT/report has the figures, and all runs as runs.json, which ``scripts.tables`` reads.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import tyro

from benchmarks.llm.options import ALGORITHMS, BASE
from benchmarks.options import check_known
from benchmarks.report.page import write_report
from benchmarks.report.scores import base
from benchmarks.results import LANGUAGE, RecordedRun, read_runs


@dataclass(frozen=True)
class Arguments:
    """Choose a learning rate for each method, train, test and compare."""

    out: Path = Path("runs/methods")
    """Folder of all runs."""
    algo: tuple[str, ...] = tuple(name for name in ALGORITHMS if name != "iw-sft-q")
    """Methods, by their names in benchmarks.llm."""
    rates: tuple[float, ...] = (1e-4, 3e-4, 8e-4)
    """Learning rates to choose from, in ascending order; at least two."""
    more: int = 2
    """Rates to add, at most, beyond a smallest or largest one that is best."""
    tuning_seeds: tuple[int, ...] = (5,)
    """Seeds that choose the rate."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Seeds that are reported."""
    steps: int = 80
    """Updates of a run."""
    jobs: int = 1
    """Runs at a time."""


def main(arguments: Arguments) -> None:
    """Run all, and print the chosen rates."""
    for name in arguments.algo:
        check_known("algorithm", name, list(ALGORITHMS))
    if set(arguments.tuning_seeds) & set(arguments.seeds):
        raise SystemExit("error: --tuning-seeds and --seeds must differ")
    out = arguments.out
    _job(arguments, out, [BASE], arguments.seeds[:1])
    # All start from one base model, which is trained once.
    (model,) = (out / LANGUAGE / "arithmetic" / "prepared").glob("arithmetic-base-*/")
    chosen = tune(arguments, model)
    for rate in sorted(set(chosen.values())):
        methods = [name for name in arguments.algo if chosen.get(name) == rate]
        _job(arguments, out, methods, arguments.seeds, "--lr", str(rate))
    write_report(out, out / "report")
    for name, rate in chosen.items():
        print(f"{name}: {rate}")


def tune(arguments: Arguments, model: Path) -> Mapping[str, float]:
    """Try the rates, and more of them for a method whose best is at an end; choose one of each."""
    tried = dict.fromkeys(arguments.algo, arguments.rates)
    new: Mapping[str, Sequence[float]] = tried
    for left in range(arguments.more, -1, -1):
        for rate in sorted({rate for rates in new.values() for rate in rates}):
            methods = [name for name, rates in new.items() if rate in rates]
            folder, seeds = arguments.out / f"lr-{rate}", arguments.tuning_seeds
            _job(arguments, folder, methods, seeds, "--lr", str(rate), "--model", str(model))
        runs = read_runs(arguments.out, LANGUAGE)
        chosen = choose(runs, tried, arguments.tuning_seeds)
        new = {name: beyond(tried[name], rate) for name, rate in chosen.items()} if left else {}
        tried = {name: tuple(sorted({*rates, *new.get(name, ())})) for name, rates in tried.items()}
    return chosen


def beyond(rates: Sequence[float], best: float) -> tuple[float, ...]:
    """The next rate where the best is the first or the last: as far as its neighbour, one digit."""
    neighbour = {rates[0]: rates[1], rates[-1]: rates[-2]}.get(best)
    return () if neighbour is None else (float(f"{best * best / neighbour:.0e}"),)


def choose(
    runs: Sequence[RecordedRun], tried: Mapping[str, Sequence[float]], seeds: Collection[int]
) -> Mapping[str, float]:
    """Choose the rate of each method: the best mean on the problems of validation over the seeds.

    Of equal ones it is the smallest. A rate without a result for each seed is not chosen.
    """
    shares: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        if run.variant and run.seed in seeds:
            shares.setdefault((base(run.algo), run.variant), []).append(run.result["validation"])
    chosen = {}
    for name, rates in tried.items():
        each = {rate: shares.get((name, f"lr-{rate}"), []) for rate in rates}
        means = {rate: fmean(own) for rate, own in each.items() if len(own) == len(seeds)}
        if means:
            chosen[name] = max(means, key=lambda rate: means[rate])
    return chosen


def _job(
    arguments: Arguments, out: Path, methods: Sequence[str], seeds: Sequence[int], *more: str
) -> None:
    """Run a job of benchmarks.llm; a run that fails, such as at too large a rate, is left out."""
    words = ["--algo", *methods, "--seeds", *map(str, seeds), "--out", str(out), "--resume"]
    steps = () if methods == [BASE] else ("--steps", str(arguments.steps))
    command = [sys.executable, "-m", "benchmarks.llm", *words, *steps, *more]
    status = subprocess.run([*command, "--jobs", str(arguments.jobs)]).returncode
    if status not in (0, 1):
        raise SystemExit(status)


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
