"""The loop on the arithmetic task, from its base: exact match and diversity by round.

    python scripts/loop_arithmetic.py --out runs/loop-arithmetic
    python scripts/loop_arithmetic.py --out runs/loop-rate --algo sft iw-sft --learning-rate 8e-4

Writes the prompts, runs a loop for each algorithm and seed by the command `iwsft loop`, one on each
core, and prints the tables of docs/loop.md: means over seeds and their differences by round, with
95 % intervals. The same call continues what a kill leaves. A loop that fails ends the script.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

import rich
import tyro
from joblib import Parallel, delayed, parallel_config

from benchmarks.llm.__main__ import loop
from benchmarks.llm.recipes.arithmetic import BaseSettings
from benchmarks.llm.recipes.arithmetic.base import base_model
from benchmarks.llm.recipes.arithmetic.task import Split, problems
from benchmarks.places import cores
from benchmarks.report.loops import seed_grids
from benchmarks.report.page import write_report
from iwsft.files import write_json_lines

# Learning rates that `scripts.compare_methods` chose, on other problems than those of this test.
RATES = {"sft": 3e-4, "iw-sft": 3e-4, "iw-sft-step": 8e-4, "dft": 3e-4}
# Those of the arithmetic recipe, for 80 updates a round.
TRAINING = ("--batch-size", "32", "--max-steps", "80", "--warmup", "10", "--reduce", "sum")
WEIGHTED = ("iw-sft", "iw-sft-hard", "iw-sft-ema", "iw-sft-q")


@dataclass(frozen=True)
class Options:
    """Compare algorithms in the loop."""

    out: Path = Path("runs/loop-arithmetic")
    """Folder of base model, prompts and loops."""
    algo: tuple[str, ...] = ("sft", "iw-sft", "iw-sft-step", "dft")
    """Algorithms of a round."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of samples and training."""
    rounds: int = 4
    """Number of rounds."""
    prompts: int = 500
    """Number of problems to solve in a round."""
    samples: int = 4
    """Answers to each problem."""
    held_out: int = 1000
    """Number of problems of the test."""
    learning_rate: float | None = None
    """Learning rate of a round; by default the one that was chosen for the algorithm."""


def main(options: Options) -> None:
    """Run all loops and print their table."""
    for algo in options.algo:
        if options.learning_rate is None and algo not in RATES:
            raise SystemExit(f"no learning rate was chosen for {algo}: set --learning-rate")
    model = base_model(options.out, seed=0, settings=BaseSettings())
    prompts = _write(options.out / "prompts.jsonl", options.prompts, 1_000_000, "train")
    held_out = _write(options.out / "held-out.jsonl", options.held_out, 1, "held-out")
    loops = []
    for algo in options.algo:
        rate = options.learning_rate or RATES[algo]
        for seed in options.seeds:
            words = [
                *("--model", str(model), "--prompts", str(prompts), "--verifier", "integer"),
                *("--eval-prompts", str(held_out), "--eval-samples", "2", "--no-stop-early"),
                *("--rounds", str(options.rounds), "--algo", algo, "--seed", str(seed)),
                *("--samples-per-prompt", str(options.samples), "--no-deduplicate"),
                *("--max-tokens", "40", "--sampling-batch", "512"),
                *("--learning-rate", str(rate)),
                *(TRAINING if algo in WEIGHTED else TRAINING[:-2]),
                *("--out", str(options.out / algo / f"seed-{seed}"), "--resume"),
            ]
            loops.append(words)
    # The first error ends the loops that still run.
    with parallel_config("loky", inner_max_num_threads=1):
        Parallel(min(cores(), len(loops)))(delayed(_run)(words) for words in loops)
    report = write_report(options.out, options.out / "report")
    for title, grid in seed_grids(report.loops).items():
        rich.print(grid.rich(title))
    print(f"Report: {report.page}")


def _run(words: list[str]) -> None:
    print("iwsft loop", shlex.join(words), file=sys.stderr)
    # What a loop records as its command.
    sys.argv = ["iwsft loop", "loop", *words]
    loop(words)


def _write(path: Path, count: int, seed: int, split: Split) -> Path:
    asked = problems(count, seed, split)
    write_json_lines(path, ({"prompt": each.prompt, "answer": str(each.answer)} for each in asked))
    return path


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
