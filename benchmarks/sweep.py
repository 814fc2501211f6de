"""Many runs at a place, and what became of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from benchmarks import places
from benchmarks.places import Place
from benchmarks.runs import EXPECTED, RESULT, Run, one_line, tell


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


def run_all(
    work: Callable[[Any], object], runs: Sequence[Run[Any]], place: Place, summary: Summary
) -> None:
    """Run ``work`` on every run at a place and count; a run that fails does not stop others.

    Args:
        work: A function that can be pickled and continues what a killed call left.
        runs: Runs in the order to start them; their ``str`` names them in lines on stderr.
        place: The place where they run.
        summary: The summary that takes the counts and the errors.
    """
    for item, problem in places.each(partial(_problem, work), runs, place):
        if problem is None and not (item.folder / RESULT).exists():
            problem = f"it ended without {item.folder / RESULT}; nodes must share --out"
        if problem is None:
            summary.done += 1
        else:
            summary.failed.append(f"{item}: {problem}")
            tell(f"error: {item}: {problem}")


def _problem(work: Callable[[Any], object], item: Any) -> str | None:
    """Run one item, perhaps in a process of its own; the error that a user can mend, if any."""
    try:
        work(item)
    except EXPECTED as error:
        return one_line(error)
    return None
