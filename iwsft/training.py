"""The fit loop: learning-rate schedule, checkpoints, resume, metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from tensordict import TensorDictBase
from torchrl.objectives.utils import TargetNetUpdater

from iwsft import checkpoint
from iwsft.metrics import MetricsLog
from iwsft.objective import LOSS, ImportanceWeightedMLE

Row = dict[str, float]


class Sampler(Protocol):
    """Where batches come from: draws hang on its own generator, which its state holds."""

    def sample(self) -> TensorDictBase:
        """The next batch."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs to draw the same batches."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""


@dataclass(frozen=True)
class Schedule:
    """Updates and their learning rate (paper, Appendix F).

    Args:
        steps: number of updates.
        lr: Adam's learning rate, at its highest.
        warmup: updates of linear warm-up from 0.
        decay: after the warm-up ``"cosine"`` to 0, or ``"constant"``.
    """

    steps: int
    lr: float
    warmup: int = 0
    decay: Literal["cosine", "constant"] = "cosine"

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.lr < math.inf or self.warmup < 0:
            raise ValueError(f"{self}: steps and lr must be positive, warmup not negative")
        if self.decay not in ("cosine", "constant"):
            raise ValueError(f"{self}: decay must be 'cosine' or 'constant'")

    def factor(self, step: int) -> float:
        """Share of ``lr`` at update ``step`` (from 0)."""
        if step < self.warmup:
            return step / self.warmup
        if self.decay == "constant":
            return 1.0
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True)
class Probe:
    """A look at the run every ``every`` updates and at the end; its numbers join the row."""

    every: int
    look: Callable[[TensorDictBase], Row]


@dataclass(frozen=True)
class Cost:
    """Seconds on the clock and on the processor, probes included, over all resumes.

    What a kill threw away, the updates since the last checkpoint, is not in it.
    """

    wall_seconds: float
    cpu_seconds: float


def fit(
    loss: ImportanceWeightedMLE,
    sampler: Sampler,
    schedule: Schedule,
    *,
    updater: TargetNetUpdater | None = None,
    probes: Sequence[Probe] = (),
    folder: Path | None = None,
    settings: dict[str, Any] | None = None,
    checkpoint_every: int = 500,
    log_every: int = 50,
    report: Callable[[Row], None] | None = None,
) -> Cost:
    """Train the loss's policy in place: sample, loss, Adam step, q follows.

    Args:
        loss: on the device of the batches.
        sampler: of batches.
        schedule: of the updates.
        updater: of q, with ``step()`` after each update.
        probes: evaluations and diagnoses in between.
        folder: of the run: ``checkpoint/``, ``metrics.jsonl``, TensorBoard. A checkpoint found
            there is resumed, and the run ends in the same parameters, bit for bit, as one without
            interruption: all draws hang on the sampler's generator. None writes nothing.
        settings: plain values that a checkpoint must have been made with.
        checkpoint_every: updates between checkpoints; there is one at the end.
        log_every: updates between rows.
        report: called with every row.

    Returns:
        What it cost.

    Raises:
        FloatingPointError: loss or parameters are no longer finite; the last good checkpoint stays.
        iwsft.checkpoint.CheckpointError: a corrupt checkpoint, or one of other settings.
        OSError: the disk is full; the last checkpoint stays.
    """
    optimizer = torch.optim.Adam(loss.parameters(), lr=schedule.lr, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
    parts: dict[str, Any] = {
        "loss": loss,
        "optimizer": optimizer,
        "rate": rate,
        "sampler": sampler,
        **({"updater": updater} if updater is not None else {}),
    }
    settings = settings or {}
    start, wall, cpu = 0, 0.0, 0.0
    if folder is not None:
        state = checkpoint.load(folder / checkpoint.FOLDER, settings)
        if state is not None:
            if not state.keys() >= parts.keys():
                raise checkpoint.CheckpointError(
                    f"{folder / 'checkpoint'} holds {', '.join(sorted(state))}, this run needs "
                    f"{', '.join(parts)}; choose another folder"
                )
            for name, part in parts.items():
                part.load_state_dict(state[name])
            start, wall, cpu = state["step"], state["wall_seconds"], state["cpu_seconds"]
    if start >= schedule.steps:
        return Cost(wall, cpu)

    since_wall, since_cpu = time.perf_counter(), time.process_time()

    def cost() -> Cost:
        return Cost(wall + time.perf_counter() - since_wall, cpu + time.process_time() - since_cpu)

    with ExitStack() as stack:
        log = stack.enter_context(MetricsLog(folder, after=start)) if folder is not None else None
        for step in range(start + 1, schedule.steps + 1):
            batch = sampler.sample()
            out = loss(batch)
            optimizer.zero_grad()
            out[LOSS].backward()
            optimizer.step()
            last = step == schedule.steps
            due = [probe for probe in probes if step % probe.every == 0 or last]
            if due or step % log_every == 0 or step == 1 or last:
                scalars = {name: float(value) for name, value in out.detach().items()}
                row: Row = {"step": step, "loss": scalars.pop(LOSS)}
                row |= {"lr": float(rate.get_last_lr()[0]), **scalars}
                if not math.isfinite(row["loss"]):
                    raise FloatingPointError(_diverged("loss", step, schedule))
                for probe in due:
                    row |= probe.look(batch)
                row["wall_seconds"] = cost().wall_seconds
                if log is not None:
                    log.write(row)
                if report is not None:
                    report(row)
            rate.step()
            # After the probes: they see q as it was when the batch was weighed.
            if updater is not None:
                updater.step()
            keep = folder is not None and step % checkpoint_every == 0
            # A last gradient can be NaN where its loss was not.
            if (keep or last) and not all(bool(p.isfinite().all()) for p in loss.parameters()):
                raise FloatingPointError(_diverged("policy", step, schedule))
            if folder is not None and (keep or last):
                spent = cost()
                held = {name: part.state_dict() for name, part in parts.items()}
                held |= {
                    "step": step,
                    "wall_seconds": spent.wall_seconds,
                    "cpu_seconds": spent.cpu_seconds,
                }
                checkpoint.save(folder / checkpoint.FOLDER, held, settings)
    return cost()


def _diverged(what: str, step: int, schedule: Schedule) -> str:
    return (
        f"the {what} is no longer finite at update {step}; lower the learning rate "
        f"({schedule.lr:g}), and see how loss and weight_max grew in the metrics"
    )
