"""Compare methods on the arithmetic job, each at a learning rate chosen on other problems.

    python -m scripts.compare_methods --out runs/methods

Each method trains with the tuning seeds at every rate, in OUT/lr-RATE. Its rate is the one with the
largest share of right answers to problems of validation, which no test asks. The seeds that are
reported train at that rate, in OUT/llm/arithmetic. ``python -m benchmarks.report OUT`` makes tables
and figures of all. A second call continues what was cut off.
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
    """Learning rates to choose from, in ascending order."""
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
    for rate in arguments.rates:
        more = ("--lr", str(rate), "--model", str(model))
        _job(arguments, out / f"lr-{rate}", arguments.algo, arguments.tuning_seeds, *more)
    chosen = choose(read_runs(out, LANGUAGE), arguments.rates, arguments.tuning_seeds)
    for rate in arguments.rates:
        methods = [name for name in arguments.algo if chosen.get(name) == rate]
        if methods:
            _job(arguments, out, methods, arguments.seeds, "--lr", str(rate))
    for name, rate in chosen.items():
        print(f"{name}: {rate}")


def choose(
    runs: Sequence[RecordedRun], rates: Sequence[float], seeds: Collection[int]
) -> Mapping[str, float]:
    """Choose the rate of each method: the best mean on the problems of validation over the seeds.

    Of equal ones it is the smallest. A rate without a result for each seed is not chosen.
    """
    shares: dict[str, dict[float, list[float]]] = {}
    for rate in rates:
        for run in runs:
            if run.variant == f"lr-{rate}" and run.seed in seeds:
                of_method = shares.setdefault(base(run.algo), {})
                of_method.setdefault(rate, []).append(run.result["validation"])
    means = {
        name: {rate: fmean(each) for rate, each in of_method.items() if len(each) == len(seeds)}
        for name, of_method in shares.items()
    }
    return {name: max(each, key=lambda rate: each[rate]) for name, each in means.items() if each}


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
