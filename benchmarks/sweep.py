"""Many runs at a place, and what became of them."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks import stopping
from benchmarks.places import Place
from benchmarks.runs import RESULT, Run, tell
from benchmarks.stopping import expected, one_line, plain_warnings
from iwsft.extras import named

RETRIES = 2


@dataclass
class Summary:
    """What became of all runs of a command: counts, and one line for each that is not done."""

    done: int = 0
    finished_before: int = 0
    failed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def leave_out(self, reason: str) -> None:
        """Count a dataset, or algorithms on one, that can't be run, and print why."""
        self.left_out.append(reason)
        tell(f"left out: {reason}")

    def __str__(self) -> str:
        counts = [f"{self.done} done"]
        if self.finished_before:
            counts.append(f"{self.finished_before} finished before")
        lines = []
        for title, reasons in (("failed", self.failed), ("left out", self.left_out)):
            if reasons:
                counts.append(f"{len(reasons)} {title}")
                lines += [f"{title}: {reason}" for reason in reasons]
        return "\n".join([", ".join(counts), *lines])


@dataclass(frozen=True)
class Stack:
    """Runs that one call works on."""

    runs: tuple[Run[Any], ...]

    def __str__(self) -> str:
        *others, last = (str(run.seed) for run in self.runs)
        return f"{self.runs[0].dataset} {self.runs[0].algo} seeds {', '.join(others)} and {last}"


def run_all(
    work: Callable[[Any], Sequence[Exception | None] | None],
    runs: Sequence[Run[Any] | Stack],
    place: Place,
    summary: Summary,
) -> None:
    """Run ``work`` on every run at a place and count; a run that fails does not stop others.

    ``work`` may return the error of each run of a stack, None where there is none. A run whose
    worker is killed is run again, up to ``RETRIES`` times, with a line on stderr. So ``work`` must
    continue what a killed call left; it must also be picklable. Runs start in their order, and
    their ``str`` names them. ``summary`` takes the counts and the errors.
    """
    waiting = deque((run, RETRIES) for run in runs)
    running: dict[Future[list[str | None]], tuple[Run[Any] | Stack, int]] = {}
    while waiting or running:
        while waiting and len(running) < place.jobs:
            run, retries = waiting.popleft()
            running[place.submit(partial(_problems, work), run)] = run, retries
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            run, retries = running.pop(future)
            lost = isinstance(future.exception(), place.lost)
            if lost and retries:
                tell(f"{run}: {place.loss}; it continues from its last checkpoint")
                waiting.appendleft((run, retries - 1))
                continue
            problems = [place.loss] * len(run.runs) if lost else future.result()
            for part, problem in zip(run.runs, problems, strict=True):
                _count(part, problem, summary)


def _count(run: Run[Any], problem: str | None, summary: Summary) -> None:
    """Count a run that has ended, and write its score or its problem."""
    if problem is None and not (run.folder / RESULT).exists():
        problem = f"it ended without {run.folder / RESULT}; nodes must share --out"
    if problem is None:
        summary.done += 1
        tell_score(run)
    else:
        summary.failed.append(f"{run}: {problem}")
        tell(f"error: {run}: {problem}")


def tell_score(run: Run[Any]) -> None:
    """Write a line on a finished run, with its score or return."""
    result = json.loads((run.folder / RESULT).read_text())
    for name, form in (("score", ".3f"), ("normalized_score", ".1f"), ("return_mean", ".1f")):
        if result.get(name) is not None:
            kind = "return" if name == "return_mean" else "score"
            tell(f"{run}: {kind} {result[name]:{form}}, {result['wall_seconds']:.0f} seconds")
            return
    tell(f"{run}: done")


def _problems(
    work: Callable[[Any], Sequence[Exception | None] | None], item: Run[Any] | Stack
) -> list[str | None]:
    """Run one item, perhaps in a process of its own; of each run the error that can be mended."""
    try:
        with named(), plain_warnings():
            errors = work(item) or [None] * len(item.runs)
    except expected() as error:
        stopping.check()
        return [one_line(error)] * len(item.runs)
    return [None if error is None else one_line(error) for error in errors]
