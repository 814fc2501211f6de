"""The metrics of a run of a language model, with what each row cost, and how far the run is."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import TrainerCallback

from benchmarks import monitor
from benchmarks.runs import Run
from iwsft import metrics

COST = ("cpu_seconds", "wall_seconds")


class Progress(TrainerCallback):
    """Writes the rows of ``metrics.jsonl`` with the seconds up to each, and notes the updates.

    Only the first process does. Row 0 has the seconds before the first update.
    """

    def __init__(self, run: Run[Any]) -> None:
        self._run = run
        self._log: metrics.MetricsLog | None = None
        self._since = self._before = np.zeros(2)
        self._row: dict[str, float] = {}
        self._started = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Cut the metrics back to the checkpoint."""
        self._since = now()
        if not state.is_world_process_zero:
            return
        monitor.note(self._run.folder, "reference")
        # From the start a run writes row 0 again.
        self._log = metrics.MetricsLog(self._run.folder, after=state.global_step or -1)
        rows = [row for row in metrics.read(self._run.folder / metrics.FILE) if COST[0] in row]
        if rows:
            self._before = np.array([rows[-1][name] for name in COST])

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the cost of the reference, which the trainer computes before the first epoch."""
        if not self._started:
            self._started = True
            cost, self._since = self._spent("reference_"), now()
            if state.global_step == 0 and self._log is not None:
                self._log.write({"step": 0, **cost})

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note how far the run is. The last update is logged whatever --log-every says."""
        if state.global_step == state.max_steps:
            control.should_log = True
        if self._log is not None:
            steps = state.global_step, state.max_steps
            monitor.note(self._run.folder, "training", *steps, self._row)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write a row."""
        if "loss" not in kwargs["logs"] or self._log is None:
            return
        row = {"step": state.global_step, **kwargs["logs"], **self._spent()}
        self._log.write(row)
        self._row = row

    def summary(self) -> dict[str, float]:
        """Compute means, extremes and cost from the rows of the metrics."""
        rows = [] if self._log is None else metrics.read(self._run.folder / metrics.FILE)
        # Without row 0, which a damaged file may lack, the first one is of an update.
        first = [row for row in rows[:1] if row["step"] == 0]
        summary = {name: value for row in first for name, value in row.items() if name != "step"}
        logged = [row for row in rows if "loss" in row]
        if logged:
            steps = [0, *(row["step"] for row in logged)]
            # A row is the mean over the updates since the one before.
            for name in ("ESS", "clip_fraction"):
                pairs = zip(logged, steps, strict=False)
                sums = [row.get(name, 0.0) * (row["step"] - before) for row, before in pairs]
                summary[name] = sum(sums) / steps[-1]
            summary["ESS_min"] = min(row.get("ESS_min", row["ESS"]) for row in logged)
            summary["weight_max"] = max(row["weight_max"] for row in logged)
            summary |= {name: logged[-1][name] for name in COST}
        return summary

    def _spent(self, prefix: str = "") -> dict[str, float]:
        seconds = (self._before + now() - self._since).tolist()
        return {f"{prefix}{name}": spent for name, spent in zip(COST, seconds, strict=True)}


def now() -> NDArray[np.float64]:
    """CPU and wall seconds."""
    return np.array([time.process_time(), time.perf_counter()])
