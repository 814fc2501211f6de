"""Show where importance weights help, and why: a bandit, arithmetic, control; then one page.

Examples:
    iwsft demo
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks import stopping

if TYPE_CHECKING:
    from benchmarks.report.document import Document
    from benchmarks.report.scores import Cell

PAGE = "index.html"
_SEEDS = ("--seeds", "0", "1", "2")


@dataclass(frozen=True)
class Options:
    """Run three small experiments of SFT and iw-SFT, five to ten minutes on two cores."""

    out: Path = Path("runs/demo")
    """Folder of the runs and the page. What is finished there is kept."""


@dataclass(frozen=True)
class Part:
    """An experiment: a command, what to look at, and the section that it fills."""

    title: str
    look_at: str
    command: tuple[str, ...]
    # Adds tables and figures of the folder of runs, and returns what was seen, in a sentence.
    show: Callable[[Document, Path], str]


def _show_bandit(document: Document, folder: Path) -> str:
    from benchmarks.bandit.experiment import draw

    numbers = json.loads((folder / "bandit" / "bandit.json").read_text())["algorithms"]
    document.figure("bandit", draw(numbers), "Mean reward, mean and 95 % interval over seeds.")
    right = {name: sum(row["p_right"]) / len(row["p_right"]) for name, row in numbers.items()}
    return (
        f"SFT pulls the better arm in {right['sft']:.0%} of the pulls, as the successes do; "
        f"iw-SFT in {right['iw-sft']:.0%}."
    )


def _cells(folder: Path, benchmark: str, dataset: str, score: str) -> list[Cell]:
    """The scores of the demo's own runs, beside which the folder may have others."""
    from benchmarks.report.scores import cells
    from benchmarks.results import read_runs

    runs = read_runs(folder / benchmark / dataset, benchmark)
    return cells([run for run in runs if str(run.seed) in _SEEDS], score)


def _show_arithmetic(document: Document, folder: Path) -> str:
    from benchmarks.report import language

    recipe = language.RecipeRuns("arithmetic", _cells(folder, "llm", "arithmetic", "score"), [])
    document.table(language.recipe_grid(recipe), recipe.note)
    document.table(language.share_grid(recipe), language.SHARES)
    document.figure("arithmetic", language.draw_recipe(recipe), "Scores and weights.")
    return compared({cell.algo: cell for cell in recipe.scores}, "sft", "iw-sft", 3)


def _show_control(document: Document, folder: Path) -> str:
    from benchmarks.report import figures, tables
    from benchmarks.results import SCORE
    from iwsft.datasets import DEFAULT

    group = _cells(folder, "d4rl", DEFAULT, SCORE)
    document.table(tables.score_grid(group), "Scores of the last policies, D4RL-normalised.")
    document.figure("scores", figures.draw_scores(group), "Scores of each seed, and means.")
    return compared({cell.algo: cell for cell in group}, "sft-q", "iw-sft-q", 1)


def compared(group: dict[str, Cell], one: str, other: str, digits: int) -> str:
    """Say which of two algorithms is better, or that they tie."""
    from benchmarks.report.aggregates import text
    from benchmarks.report.scores import algorithm_label, compare

    ours, others = [group[other]], [group[one]]
    difference, verdict = compare(ours, others), "ties with"
    if difference is not None and difference.settled:
        verdict = "is above" if difference.estimate.point > 0 else "is below"
    estimate = text(None if difference is None else difference.estimate, digits)
    names = [f"{algorithm_label(c.algo)} ({c.mean:.{digits}f})" for c in (*ours, *others)]
    return (
        f"{f' {verdict} '.join(names)}: the difference is {estimate}, with its 95 % interval over "
        f"{len(group[one].runs)} seeds."
    )


PARTS = (
    Part(
        "A bandit: why SFT stops short",
        "One arm always wins, the other half of the time. SFT copies how often each arm is among "
        "the wins, 2 to 1, and stops there; iw-SFT moves to the better arm.",
        ("bandit", "--out", "{out}/bandit"),
        _show_bandit,
    ),
    Part(
        "Arithmetic: the same in language",
        "A small language model knows three ways to add up, one of them careful. It trains on its "
        "own right answers: SFT keeps the mixture of ways, iw-SFT moves on to the careful one.",
        (
            "llm",
            *("--algo", "base", "sft", "iw-sft", *_SEEDS, "--out", "{out}", "--resume"),
        ),
        _show_arithmetic,
    ),
    Part(
        "Control: with shortened training",
        "A hopper learns from the replay of another agent, with a quarter of the updates and "
        "published settings in which SFT(Q) and iw-SFT(Q) have the same learning rate. Scores are "
        "0 for random and 100 for expert policies. The weights stay near 1 here, and three seeds "
        "scatter: expect a small difference or a tie.",
        (
            "d4rl",
            *("--algo", "bc", "sft-q", "iw-sft-q", *_SEEDS),
            *("--reference-steps", "1200", "--steps", "1200", "--eval-episodes", "30"),
            *("--settings-of", "hopper-medium-expert-v2", "--curve-episodes", "0"),
            *("--out", "{out}", "--resume"),
        ),
        _show_control,
    ),
)


def main(options: Options) -> Path:
    """Run all parts, say what was seen, and return the page."""
    from benchmarks.report.document import MARK, Document, check_replaced, shareable, to_html
    from iwsft.files import write

    page = options.out / PAGE
    check_replaced({page: MARK})
    lines, start = [], time.perf_counter()
    commands = [[word.format(out=options.out) for word in part.command] for part in PARTS]
    print(f"{len(PARTS)} experiments, five to ten minutes on two cores, then one page.")
    for number, (part, words) in enumerate(zip(PARTS, commands, strict=True), 1):
        print(f"\n{number}/{len(PARTS)} {part.title}\n{part.look_at}", flush=True)
        print(f"$ {shlex.join(['iwsft', *words])}\n", flush=True)
        command = [sys.executable, "-m", "benchmarks", *words]
        status = subprocess.run(command, check=False).returncode
        if status:
            raise SystemExit(status)
    document = Document()
    for part, words in zip(PARTS, commands, strict=True):
        document.section(part.title)
        document.text(part.look_at)
        lines.append(part.show(document, options.out))
        document.text(f"**{lines[-1]}**")
        document.text(f"Command: `{shareable(shlex.join(['iwsft', *words]))}`")
    document.section("")
    for line in lines:
        document.text(line)
    text = document.markdown("Where importance weights help")
    write(page, to_html(text, document.images))
    print("\nWhat was seen:", *(f"- {line}" for line in lines), sep="\n")
    print(f"{time.perf_counter() - start:.0f} seconds. Page: {page}")
    return page


def run() -> None:
    """Read the command line and run the demo."""
    stopping.watch("the same command continues")
    with stopping.command("tyro", "scipy", "matplotlib", "markdown_it", "transformers"):
        from benchmarks.options import parse

        main(parse(Options, "demo", __doc__))


if __name__ == "__main__":
    run()
