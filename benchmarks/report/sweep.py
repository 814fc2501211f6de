"""The settings of the importance weights that runs were made with, and what each led to."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from benchmarks.report.names import algorithm_rank, base
from benchmarks.report.scores import Cell
from benchmarks.results import FinishedRun

# Algorithms with weights on trajectories, and what they are when all weights are 1.
_UNWEIGHTED = {"iw-sft": "sft", "iw-sft-q": "sft-q"}
# What may differ within a sweep: the seed, the weights, and the learning rate, which is published
# for each algorithm apart.
_FREE = ("algo", "seed", "target_ess", "sync_every", "fine_tuning", "settings_from")


@dataclass(frozen=True, order=True)
class Setting:
    """How the weights of a run were made.

    Attributes:
        temperature: k on the mean log-ratio; 0 where a target ESS takes its place.
        target_ess: share of the batch; 0 for none.
        sync_every: updates between hard syncs of q; 0 for a moving average.
        alpha: decay of the moving average; 0 for hard syncs.
    """

    temperature: float
    target_ess: float
    sync_every: int
    alpha: float

    @property
    def lag(self) -> str:
        """How q follows the policy."""
        return f"sync every {self.sync_every}" if self.sync_every else f"average, {self.alpha:g}"

    @property
    def sharpness(self) -> str:
        """What keeps the weights apart, in short."""
        return f"ESS {self.target_ess:g}" if self.target_ess else f"k {self.temperature:g}"


def setting(run: FinishedRun) -> Setting | None:
    """Setting of a run's weights, from its ``config.json``; None where it has none."""
    settings = run.config.get("settings", {})
    row = settings.get("fine_tuning")
    if base(run.algo) not in _UNWEIGHTED or row is None:
        return None
    target = settings.get("target_ess") or 0.0
    by_sync = run.result.get("estimator") == "steps"
    return Setting(
        temperature=0.0 if target else row["k"],
        target_ess=target,
        sync_every=settings["sync_every"] if by_sync else 0,
        alpha=0.0 if by_sync else row["alpha"],
    )


def swept(group: Sequence[Cell]) -> list[tuple[Setting | None, Cell]]:
    """A cell for each dataset, algorithm and setting of the weights, in that order.

    Runs of other data, cuts or steps are a sweep of their own. Before each stands the same
    algorithm without weights (setting None), with the learning rate published for it, where it was
    run. Only sweeps of two settings or more are there.
    """
    weighted = [cell for cell in group if base(cell.algo) in _UNWEIGHTED]
    found: list[tuple[Setting | None, Cell]] = []
    for dataset, algo in dict.fromkeys((cell.dataset, base(cell.algo)) for cell in weighted):
        same = [cell for cell in group if cell.dataset == dataset]
        plain = [cell for cell in same if base(cell.algo) == _UNWEIGHTED[algo]]
        rows = list(_rows(cell for cell in same if base(cell.algo) == algo))
        for others in dict.fromkeys(_others(cell.runs[0]) for _, cell in rows):
            mine = [row for row in rows if _others(row[1].runs[0]) == others]
            if len({held for held, _ in mine}) < 2:
                continue
            found += [(None, part) for cell in plain for key, part in _parts(cell) if key == others]
            found += sorted(mine, key=lambda row: (row[0], algorithm_rank(row[1].algo)))
    return found


def _rows(group: Iterable[Cell]) -> Iterable[tuple[Setting, Cell]]:
    for cell in group:
        for _, part in _parts(cell):
            settings = {run.seed: setting(run) for run in part.runs}
            for held in dict.fromkeys(settings.values()):
                if held is not None:
                    runs = tuple(run for run in part.runs if settings[run.seed] == held)
                    yield held, replace(part, runs=runs)


def _parts(cell: Cell) -> Iterable[tuple[str, Cell]]:
    """A cell in parts that may stand in the same sweep."""
    keys = {run.seed: _others(run) for run in cell.runs}
    for key in dict.fromkeys(keys.values()):
        yield key, replace(cell, runs=tuple(run for run in cell.runs if keys[run.seed] == key))


def _others(run: FinishedRun) -> str:
    """Settings that a sweep leaves alone."""
    settings = run.config.get("settings", {})
    kept = {name: value for name, value in settings.items() if name not in _FREE}
    steps = (settings.get("fine_tuning") or {}).get("steps")
    return json.dumps({**kept, "steps": steps}, sort_keys=True)


def last_look(cell: Cell, name: str) -> list[float]:
    """A metric when the weights were last looked at, of each seed that says so."""
    looked = [[row for row in run.metrics if "weight_q50" in row] for run in cell.runs]
    return [rows[-1][name] for rows in looked if rows and name in rows[-1]]
