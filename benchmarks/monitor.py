"""How far runs are: each writes it into its folder, and the command that started them shows it."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from benchmarks.runs import RESULT, Run
from iwsft.progress import Progress

FILE = "progress.json"
SECONDS = 0.5
# Metrics that are shown, with their formats.
_SHOWN = {"loss": ".4g", "ESS": ".2f", "normalized_score": ".1f", "return_mean": ".1f"}


def note(
    folder: Path,
    stage: str,
    done: float = 0,
    total: float | None = None,
    row: Mapping[str, float] | None = None,
) -> None:
    """Write how far a run is in a stage, and metrics; a stage may have no known length."""
    state = {"stage": stage, "done": done, "total": total, "row": dict(row or {})}
    (folder / FILE).write_text(json.dumps(state))


@contextmanager
def noted(folder: Path) -> Iterator[None]:
    """Remove the file of :func:`note` when the run of the block has ended."""
    try:
        yield
    finally:
        (folder / FILE).unlink(missing_ok=True)


@contextmanager
def shown(runs: Sequence[Run[Any]]) -> Iterator[None]:
    """Show the progress of unfinished runs during a block, wherever they run."""
    # What a killed command left.
    for run in runs:
        (run.folder / FILE).unlink(missing_ok=True)
    stopped = threading.Event()
    with Progress() as progress:
        thread = threading.Thread(target=_follow, args=(runs, progress, stopped), daemon=True)
        thread.start()
        try:
            yield
        finally:
            stopped.set()
            thread.join()


def _follow(runs: Sequence[Run[Any]], progress: Progress, stopped: threading.Event) -> None:
    """Read the runs' files again and again."""
    whole = progress.add_task("runs", total=len(runs), visible=len(runs) > 1)
    tasks: dict[tuple[Path, str], Any] = {}
    while not stopped.wait(SECONDS):
        states = [(run, state) for run in runs if (state := _read(run.folder)) is not None]
        stages = {(run.folder, str(state["stage"])) for run, state in states}
        for ended in tasks.keys() - stages:
            progress.remove_task(tasks.pop(ended))
        for run, state in states:
            key = run.folder, str(state["stage"])
            if key not in tasks:
                tasks[key] = progress.add_task(f"{run} {key[1]}", total=state["total"])
            text = "  ".join(
                f"{name.removeprefix('normalized_')} {state['row'][name]:{form}}"
                for name, form in _SHOWN.items()
                if name in state["row"]
            )
            progress.update(tasks[key], completed=state["done"], note=text)
        progress.update(whole, completed=sum((run.folder / RESULT).exists() for run in runs))


def _read(folder: Path) -> dict[str, Any] | None:
    # It may be half written.
    with suppress(OSError, ValueError):
        return json.loads((folder / FILE).read_text())
    return None
