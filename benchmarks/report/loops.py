"""Loops over rounds: the table and the figure, for language and for control."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import rich

from benchmarks.commands import program
from benchmarks.report import figures
from benchmarks.report.document import (
    NOTHING,
    Document,
    Grid,
    escaped,
    interval_text,
    number_text,
    shareable,
)
from benchmarks.report.figures import Panels
from benchmarks.report.scores import algorithm_colour, interval_over_seeds, versions_note
from benchmarks.results import folders_below, printable, read_json
from benchmarks.statistics import MIN_SEEDS
from iwsft.loop import CONFIG, Round, best, table

LOOP = "loop"
# Facts of a round that are shown where its stages return them: heading, format and meaning.
COLUMNS = {
    "score": ("score", ".3f", "held-out, with its 95 % interval"),
    "return": ("return", ".1f", "mean of the sampled episodes"),
    "pass_rate": ("pass rate", ".3f", "share of right answers among the samples"),
    "solved": ("solved", ".3f", "prompts with a right one"),
    "kept": ("kept", ".1%", "share of the samples that was trained on"),
    "length": ("length", ".1f", "mean of a sample"),
    "distinct": ("distinct", ".2f", "different final answers to a prompt"),
    "ESS": ("ESS", ".2f", "effective share of the draws of an update"),
}
# Facts that are compared over seeds, and their titles.
COMPARED = {
    "score": "Held-out score over seeds",
    "return": "Return of the sampled episodes over seeds",
    "distinct": "Distinct answers to a prompt over seeds",
}
_SEED = "/seed-"
# Settings in which seeds of one name may differ: each seed may have a start of its own.
_OF_SEED = {"seed", "start", "model"}
# Settings of the test: scores of others do not compare.
_TEST = (
    *("env_id", "env_kwargs", "eval_prompts", "verifier", "eval_samples"),
    *("max_tokens", "min_score"),
)
# Where answers of the test are sampled.
_SAMPLED = ("sampling_temperature", "top_p")


@dataclass(frozen=True)
class RecordedLoop:
    """A loop on disk: its folder below the one that was read, its config, a row a round."""

    name: str
    config: Mapping[str, Any]
    rows: list[dict[str, Any]]

    @property
    def algo(self) -> str:
        """Algorithm that a round trains by."""
        return str(self.config.get("algo", ""))

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that all seeds of a name share."""
        settings = self.config.get("settings") or {}
        return {name: value for name, value in settings.items() if name not in _OF_SEED}

    @property
    def record(self) -> dict[str, Any]:
        """The loop as one entry of the report's records."""
        kept = ("benchmark", "algo", "seed", "settings", "versions", "hardware", "command")
        about = {name: self.config.get(name) for name in kept}
        about["command"] = shareable(about["command"] or "")
        return {"loop": self.name, **about, "rounds": self.rows}


def read_loops(folder: Path) -> list[RecordedLoop]:
    """Read all loops at or below a folder, by path."""
    loops = []
    # The start tells a loop from other folders with a config.
    rounds = [path for path in folders_below(Path(folder))[1:] if path.name == "round-0"]
    for home in (first.parent for first in rounds):
        config = read_json(home / CONFIG)
        if config.get("benchmark") == LOOP:
            name = home.relative_to(folder).as_posix()
            name = home.absolute().name if name == "." else name
            loops.append(RecordedLoop(printable(name), config, table(home)))
    return loops


def loop_grid(rows: Sequence[Mapping[str, Any]]) -> Grid:
    """Table of the rounds of a loop, with what its stages return."""
    first, *names = (name for name, *_ in COLUMNS.values())
    grid = Grid(["round", first, "95 % interval", *names], left=1)
    for row in rows:
        score, *cells = (number_text(row.get(key), form) for key, (_, form, _) in COLUMNS.items())
        interval = interval_text(row.get("interval"), digits=3)
        grid.rows.append([str(row["round"]), score, interval, *cells])
    return grid


def seed_grids(loops: Sequence[RecordedLoop]) -> dict[str, Grid]:
    """Tables by title: means over the loops NAME/seed-K of each name by round, and differences.

    Each has its 95 % interval; that of a difference is paired by seed. A loop whose settings are
    not those of most seeds of its name, or whose seed is there already, is left out with a note. A
    mean of fewer seeds, where loops ended before the round, has one too.
    Names that were not tested alike are not compared.
    """
    named: dict[str, list[RecordedLoop]] = {}
    for loop in loops:
        if name := loop.name.rpartition(_SEED)[0]:
            named.setdefault(name, []).append(loop)
    named = {name: own for name, own in named.items() if len(own) >= MIN_SEEDS}
    groups, notes, tests = dict[str, dict[str, list[dict[str, Any]]]](), {}, {}
    for name, own in named.items():
        groups[name], notes[name], tests[name] = _alike(own)
    every = [loop.config.get("versions") or {} for own in named.values() for loop in own]
    tested = [note] if (note := versions_note(every)) else []
    most = max((len(rows) for own in groups.values() for rows in own.values()), default=0)
    grids = {}
    for key, title in COMPARED.items():
        form = COLUMNS[key][1]
        facts = {name: [_values(own, key, n) for n in range(most)] for name, own in groups.items()}
        grid = Grid(["", *(f"round {number}" for number in range(most))], left=1)
        for name, by_round in facts.items():
            seeds = len(groups[name])
            cells = [grid.marked(_mean(each, form), _fewer(each, seeds)) for each in by_round]
            label = grid.marked(f"{name} ({seeds} seeds)", [*notes[name], *tested])
            grid.rows.append([label, *cells])
        for one, other in itertools.combinations(facts, 2):
            if tests[one] != tests[other]:
                continue
            pairs = zip(facts[other], facts[one], strict=True)
            less = [{seed: x[seed] - y[seed] for seed in x if seed in y} for x, y in pairs]
            both = len(groups[one].keys() & groups[other].keys())
            cells = [grid.marked(_mean(x, f"+{form}"), _fewer(x, both)) for x in less]
            grid.rows.append([f"{other} less {one}", *cells])
        if any(cell != NOTHING for row in grid.rows for cell in row[1:]):
            grids[title] = grid
    return grids


def _alike(
    loops: Sequence[RecordedLoop],
) -> tuple[dict[str, list[dict[str, Any]]], list[str], list[Any]]:
    """Rows by seed of the loops of a name that agree with most; notes on others; their test."""
    texts = [json.dumps(loop.settings, sort_keys=True) for loop in loops]
    usual = loops[texts.index(Counter(texts).most_common(1)[0][0])].settings
    rows: dict[str, list[dict[str, Any]]] = {}
    notes = []
    for loop in loops:
        seed = str(loop.config.get("seed", loop.name.rpartition(_SEED)[2]))
        own = loop.settings
        differ = [name for name in {**usual, **own} if usual.get(name) != own.get(name)]
        if differ:
            notes.append(f"{loop.name} is left out: its settings differ ({', '.join(differ)}).")
        elif seed in rows:
            notes.append(f"{loop.name} is left out: seed {seed} is there already.")
        else:
            rows[seed] = loop.rows
    sampled = _SAMPLED if usual.get("eval_samples", 1) > 1 else ()
    return rows, notes, [usual.get(name) for name in (*_TEST, *sampled)]


def _values(own: Mapping[str, list[dict[str, Any]]], key: str, number: int) -> dict[str, float]:
    """A fact of a round by seed, of the seeds that have it."""
    rounds = {seed: rows[number] for seed, rows in own.items() if number < len(rows)}
    return {seed: row[key] for seed, row in rounds.items() if row.get(key) is not None}


def _mean(values: Mapping[str, float], form: str) -> str:
    """The mean over seeds with its interval, for three seeds or more."""
    if len(values) < MIN_SEEDS:
        return NOTHING
    numbers = np.array([*values.values()])
    interval = interval_over_seeds(numbers)
    ends = "" if interval is None else f" ({interval_text(interval, int(form[-2]))})"
    return f"{numbers.mean():{form}}{ends}"


def _fewer(values: Mapping[str, float], seeds: int) -> list[str]:
    """A note on a mean of fewer seeds than the others of its row: the others ended before."""
    if not MIN_SEEDS <= len(values) < seeds:
        return []
    return [f"Of {len(values)} of the {seeds} seeds: the other loops have no such round or fact."]


def show_loop(
    rows: Sequence[Mapping[str, Any]], title: str, noun: str, folder: Path, start: str
) -> None:
    """Print the rounds of a loop, and the folders of its last and its best policy or model."""
    last, top = rows[-1]["round"], best(rows)
    rounds = {noun.capitalize(): last}
    if top is not None and top["round"] != last:
        rounds[f"Best {noun} (round {top['round']})"] = top["round"]
    lines = [f"{name}: {Round(n, folder, start).trained}" for name, n in rounds.items()]
    lines.append(f"Report: {program('report')} {folder}")
    rich.print(loop_grid(rows).rich(title))
    print(*lines, sep="\n")


def draw_loops(loops: Sequence[RecordedLoop]) -> Panels:
    """Draw the facts of all loops over their rounds, a line a loop, coloured by its algorithm."""
    colour = {loop.algo: algorithm_colour(loop.algo) for loop in loops}
    panels = {}
    for key, (name, *_) in COLUMNS.items():
        rounds = {row["round"] for loop in loops for row in loop.rows if row.get(key) is not None}
        if len(rounds) < 2:
            continue
        ax = panels[key] = figures.make_panel("", 2.5, colour)
        for loop in loops:
            rows = [row for row in loop.rows if row.get(key) is not None]
            x, shade = [row["round"] for row in rows], colour[loop.algo]
            if rows:
                ax.plot(x, [row[key] for row in rows], color=shade, marker="o", ms=3, lw=1.4)
            ends = [row["interval"] for row in rows if row.get("interval") is not None]
            if key == "score" and rows and len(ends) == len(rows):
                low, high = zip(*ends, strict=True)
                ax.fill_between(x, low, high, color=shade, alpha=0.15, lw=0)
        ax.set(xlabel="round", ylabel="held-out score" if key == "score" else name)
        ax.locator_params(axis="x", integer=True)
    return figures.finish(panels)


def add_loops(document: Document, loops: Sequence[RecordedLoop]) -> None:
    """Add a table for each loop, and a figure of all."""
    document.section("Loops")
    for loop in loops:
        document.table(loop_grid(loop.rows), f"**{escaped(loop.name)}**, by round.")
    for title, grid in seed_grids(loops).items():
        document.table(grid, f"{title}: mean or paired difference, with its 95 % interval.")
    if loops:
        document.figure("loops", draw_loops(loops), _caption(loops))


def _caption(loops: Sequence[RecordedLoop]) -> str:
    """What the facts mean that some round has."""
    rows = [row for loop in loops for row in loop.rows]
    parts = [
        f"{name}: {meaning}"
        for key, (name, _, meaning) in COLUMNS.items()
        if any(row.get(key) is not None for row in rows)
    ]
    return f"Rounds. Round 0 is the start. {'; '.join(parts)}."
