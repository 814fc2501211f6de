"""What a run tells while it trains: metrics on disk, lines on the terminal, what it cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from iwsft import metrics

# Takes update, updates of the run, and a row of metrics.
Say = Callable[[int, int, dict[str, float]], None]
_LINES = 4
_COST = ("cpu_seconds", "wall_seconds")


class Progress(TrainerCallback):
    """Writes the rows of ``metrics.jsonl``, with the seconds that were spent up to each.

    Row 0 holds ``reference_cpu_seconds`` and ``reference_wall_seconds``: before the first update.
    Seconds of a run that was cut off count up to the checkpoint that it goes on from.

    Args:
        folder: of the run.
        say: told of a few rows.
        writes: whether this process does all this; of several, one does.
    """

    def __init__(self, folder: Path, say: Say, *, writes: bool) -> None:
        self._folder = folder
        self._say = say
        self._writes = writes
        self._log: metrics.MetricsLog | None = None
        self._since = (0.0, 0.0)
        self._before = (0.0, 0.0)
        self._said = 0
        self._started = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Cut the metrics back to the checkpoint."""
        self._since = _now()
        if not self._writes:
            return
        at = state.global_step
        # From the start a run writes row 0 again.
        self._log = metrics.MetricsLog(self._folder, after=at if at else -1)
        if at:
            rows = metrics.read(self._folder / metrics.FILE)
            known = [row for row in rows if _COST[0] in row]
            if known:
                self._before = known[-1][_COST[0]], known[-1][_COST[1]]
            self._said = at

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The reference is done, in the first epoch; a resumed run has read it."""
        if self._started:
            return
        self._started = True
        cost, self._since = self._spent(), _now()
        if state.global_step == 0 and self._log is not None:
            names = (f"reference_{name}" for name in _COST)
            self._log.write({"step": 0, **dict(zip(names, cost, strict=True))})

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write a row."""
        logs: dict[str, float] = kwargs["logs"]
        if "loss" not in logs or self._log is None:
            return
        row = {"step": state.global_step, **logs, **dict(zip(_COST, self._spent(), strict=True))}
        self._log.write(row)
        step, steps = state.global_step, state.max_steps
        if step == steps or (step - self._said) * _LINES >= steps:
            self._said = step
            self._say(step, steps, row)

    def close(self) -> None:
        """Close the files."""
        if self._log is not None:
            self._log.__exit__(None, None, None)

    def _spent(self) -> tuple[float, float]:
        cpu, wall = _now()
        return (
            self._before[0] + cpu - self._since[0],
            self._before[1] + wall - self._since[1],
        )


def _now() -> tuple[float, float]:
    return time.process_time(), time.perf_counter()
