"""The fit loop: learning-rate schedule, checkpoints, resume, metrics."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from tensordict import TensorDictBase
from torch import nn
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import TargetNetUpdater

from iwsft import checkpoint
from iwsft.metrics import MetricsLog
from iwsft.progress import Progress

Row = dict[str, float]


class Sampler(Protocol):
    """A source of batches. Its batches depend only on its own state."""

    def sample(self) -> TensorDictBase:
        """Draw the next batch."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, its generator included."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""


@dataclass(frozen=True)
class Schedule:
    """Updates and their learning rate (paper, Appendix F).

    Args:
        steps: Number of updates.
        lr: Peak of Adam's learning rate.
        warmup: Number of updates of linear warm-up from 0.
        decay: Learning rate after the warm-up: ``"cosine"`` to 0, or ``"constant"``.
        weight_decay: Weight decay, decoupled from the gradient as in AdamW.
        clip_norm: Largest norm of the gradient; a longer one is scaled down to it.

    Raises:
        ValueError: A value is out of range.
    """

    steps: int
    lr: float
    warmup: int = 0
    decay: Literal["cosine", "constant"] = "cosine"
    weight_decay: float = 0.0
    clip_norm: float = math.inf

    def __post_init__(self) -> None:
        if self.steps < 1 or not 0 < self.lr < math.inf or self.warmup < 0:
            raise ValueError(f"{self}: steps and lr must be positive, warmup not negative")
        if not (0 <= self.weight_decay < math.inf and self.clip_norm > 0):
            raise ValueError(f"{self}: weight_decay must not be negative, clip_norm positive")
        if self.decay not in ("cosine", "constant"):
            raise ValueError(f"{self}: decay must be 'cosine' or 'constant'")

    def factor(self, step: int) -> float:
        """Return the share of ``lr`` at update ``step`` (from 0)."""
        if step < self.warmup:
            return step / self.warmup
        if self.decay == "constant":
            return 1.0
        progress = (step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@dataclass(frozen=True)
class Probe:
    """A measurement every ``every`` updates and at the end; its numbers join the row."""

    every: int
    look: Callable[[TensorDictBase], Row]


@dataclass(frozen=True)
class Cost:
    """Seconds on the clock and on the processor over all resumes, probes included.

    Updates that a kill lost, those since the last checkpoint, are not included.
    """

    wall_seconds: float
    cpu_seconds: float


def fit(
    loss: LossModule,
    sampler: Sampler,
    schedule: Schedule | Mapping[str, Schedule],
    *,
    updater: TargetNetUpdater | None = None,
    limits: Mapping[str, float] | None = None,
    probes: Sequence[Probe] = (),
    folder: Path | None = None,
    settings: dict[str, Any] | None = None,
    checkpoint_every: int = 500,
    log_every: int = 50,
    report: Callable[[Row], None] | None = None,
    progress: bool = False,
) -> Cost:
    """Train a loss's networks in place: sample, loss, Adam step, targets (or q) follow.

    It minimises the sum of all outputs whose name starts with ``loss``, as TorchRL names them.
    TorchRL's losses send each network only the gradient of its own loss. An update leaves a
    network alone that has no gradient.

    Args:
        loss: TorchRL loss on the device of the batches.
        sampler: Source of the batches.
        schedule: Schedule of the updates; or one for each network of the loss, by the name of its
            attribute (``"actor_network"``, ``"qvalue_network"``, ``"log_alpha"``), all with the
            same number of steps.
        updater: Updater of target networks or of q; ``step()`` follows each update.
        limits: Largest absolute values of outputs of the loss, by name; beyond them the run has
            diverged.
        probes: Measurements during the run.
        folder: Folder of the run, for ``checkpoint/`` and ``metrics.jsonl``; None writes nothing. A
            checkpoint in it is resumed, and the run ends in the same parameters, bit for bit, as an
            uninterrupted one, if all random numbers come from the sampler and from torch.
        settings: Plain values that belong to a checkpoint; one with other values is refused. The
            schedule is compared without them; a constant one may have more steps than before.
        checkpoint_every: Number of updates between checkpoints; there is one at the end.
        log_every: Number of updates between rows of metrics.
        report: Function that is called with every row.
        progress: Whether to show rate, time left and loss on stderr.

    Raises:
        ValueError: The schedules do not fit the networks of the loss.
        FloatingPointError: Loss or parameters are no longer finite, or an output exceeds its limit;
            the last good checkpoint stays.
        iwsft.checkpoint.CheckpointError: The checkpoint is corrupt, or of other settings.
        OSError: The disk is full; the last checkpoint stays.
    """
    schedules = schedule if isinstance(schedule, Mapping) else {"": schedule}
    optimizer = _optimizer(loss, schedules)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, [s.factor for s in schedules.values()])
    steps = next(iter(schedules.values())).steps
    parts = {"loss": loss, "optimizer": optimizer, "rate": rate, "sampler": sampler}
    if updater is not None:
        parts["updater"] = updater
    run = _Run(folder, parts, settings or {}, schedules)
    start, before = run.resume()
    if start >= steps:
        return before
    wall = before.wall_seconds - time.perf_counter()
    cpu = before.cpu_seconds - time.process_time()

    def cost() -> Cost:
        return Cost(wall + time.perf_counter(), cpu + time.process_time())

    metrics = MetricsLog(folder, after=start) if folder is not None else nullcontext()
    with _interrupts_unmasked(), metrics as log, Progress(shown=progress) as display:
        task = display.add_task("updates", total=steps, completed=start)
        for step in range(start + 1, steps + 1):
            batch = sampler.sample()
            out = loss(batch)
            _update(optimizer, out, schedules)
            last = step == steps
            due = [probe for probe in probes if step % probe.every == 0 or last]
            save = last or (folder is not None and step % checkpoint_every == 0)
            measure = bool(due) or step % log_every == 0 or step == 1 or last
            if measure or save:
                row = _row(step, out, dict(zip(schedules, rate.get_last_lr(), strict=True)))
                _check_limits(row, limits or {}, schedules)
            if measure:
                for probe in due:
                    row |= probe.look(batch)
                row["wall_seconds"] = cost().wall_seconds
                if log is not None:
                    log.write(row)
                if report is not None:
                    report(row)
                display.update(task, completed=step, note=f"loss {row['loss']:.4g}")
            elif progress:
                display.advance(task)
            rate.step()
            # After the probes, which see the q that weighed the batch.
            if updater is not None:
                updater.step()
            # A last gradient can be NaN although its loss was finite.
            if save and not all(bool(p.isfinite().all()) for p in loss.parameters()):
                raise _diverged("the policy is no longer finite", step, schedules)
            if save:
                run.save(step, cost())
    return cost()


@contextmanager
def _interrupts_unmasked() -> Iterator[None]:
    """Raise KeyboardInterrupt where tensordict made another error of it while swapping parameters.

    It does so wherever a loss, a target or q is computed with parameters of its own.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__ from None
        raise


def _update(
    optimizer: torch.optim.Optimizer, out: TensorDictBase, schedules: Mapping[str, Schedule]
) -> None:
    """Move the parameters against the gradient of the sum of the losses."""
    optimizer.zero_grad()
    losses = [value for name, value in out.items() if name.startswith("loss")]
    (losses[0] if len(losses) == 1 else torch.stack(losses).sum()).backward()
    for group, network in zip(optimizer.param_groups, schedules.values(), strict=True):
        if network.clip_norm < math.inf:
            nn.utils.clip_grad_norm_(group["params"], network.clip_norm)
    optimizer.step()


@dataclass(frozen=True)
class _Run:
    """What a checkpoint in ``folder`` holds; without a folder there is none."""

    folder: Path | None
    parts: Mapping[str, Any]
    settings: dict[str, Any]
    schedules: Mapping[str, Schedule]

    def save(self, step: int, cost: Cost) -> None:
        if self.folder is None:
            return
        state = {name: part.state_dict() for name, part in self.parts.items()}
        state |= {"draws": _generators(), "step": step, **asdict(cost)}
        state["schedule"] = _course(self.schedules)
        checkpoint.save(self.folder / checkpoint.FOLDER, state, self.settings)

    def resume(self) -> tuple[int, Cost]:
        """Load the checkpoint, if there is one; return its update and its cost."""
        state = self.folder and checkpoint.load(self.folder / checkpoint.FOLDER, self.settings)
        if not state:
            return 0, Cost(0.0, 0.0)
        if not state.keys() >= self.parts.keys():
            needs = ", ".join(self.parts)
            raise self._other(f"{', '.join(sorted(state))}, this run needs {needs}")
        course, steps = _course(self.schedules), next(iter(self.schedules.values())).steps
        differ = checkpoint.differences(state.get("schedule", course), course)
        if state["step"] > steps:
            differ = f"{state['step']} updates are done, {steps} are asked for"
        if differ:
            raise self._other(f"a run with another schedule: {differ}")
        for name, part in self.parts.items():
            part.load_state_dict(state[name])
        # A finished run leaves the random numbers of what comes after it alone.
        if state["step"] < steps:
            torch.set_rng_state(state["draws"]["cpu"])
            if "cuda" in state["draws"]:
                torch.cuda.set_rng_state(state["draws"]["cuda"])
        return state["step"], Cost(state["wall_seconds"], state["cpu_seconds"])

    def _other(self, contents: str) -> checkpoint.CheckpointError:
        return checkpoint.CheckpointError(f"{self.folder} holds {contents}; choose another folder")


def _course(schedules: Mapping[str, Schedule]) -> dict[str, Any]:
    """Return what learning rates depend on: not on the length of a constant schedule."""
    course = {name or "all": asdict(network) for name, network in schedules.items()}
    for values in course.values():
        if values["decay"] == "constant":
            del values["steps"]
    return course


def _optimizer(loss: LossModule, schedules: Mapping[str, Schedule]) -> torch.optim.Adam:
    """Return Adam with a group for each schedule, whose parameters' names start with its name."""
    if len({network.steps for network in schedules.values()}) != 1:
        raise ValueError(f"all networks need the same number of steps: {schedules}")
    groups: dict[str, dict[str, Any]] = {
        name: {"params": [], "lr": network.lr, "weight_decay": network.weight_decay}
        for name, network in schedules.items()
    }
    for name, parameter in loss.named_parameters():
        # Functional losses name a network's parameters "NETWORK_params".
        owners = [network for network in schedules if name.startswith(network)]
        if not owners:
            raise ValueError(f"parameter {name!r} has no schedule (of {', '.join(schedules)})")
        # "log_alpha" is also the start of "log_alpha_prime".
        groups[max(owners, key=len)]["params"].append(parameter)
    empty = [name for name, group in groups.items() if not group["params"]]
    if empty:
        raise ValueError(f"{type(loss).__name__} has no parameters under {', '.join(empty)}")
    return torch.optim.Adam([*groups.values()], decoupled_weight_decay=True, fused=True)


def _row(step: int, out: TensorDictBase, rates: Mapping[str, Any]) -> Row:
    """Return a row of metrics: the sum of the losses, learning rates, and all outputs."""
    scalars = {name: float(value.float().mean()) for name, value in out.detach().items()}
    losses = [name for name in scalars if name.startswith("loss")]
    row: Row = {"step": step, "loss": sum(scalars[name] for name in losses)}
    row |= {f"lr_{name}" if name else "lr": float(lr) for name, lr in rates.items()}
    # A single loss equals the sum.
    omitted = losses if len(rates) == len(losses) == 1 else []
    return row | {name: value for name, value in scalars.items() if name not in omitted}


def _check_limits(row: Row, limits: Mapping[str, float], schedules: Mapping[str, Schedule]) -> None:
    """Refuse a loss that is not finite, and an output beyond its limit."""
    step = int(row["step"])
    if not math.isfinite(row["loss"]):
        raise _diverged("the loss is no longer finite", step, schedules)
    for name, limit in limits.items():
        # A loss may leave out the outputs of a network that is not due.
        if name in row and not abs(row[name]) <= limit:
            value = f"{name} is {row[name]:.4g}, beyond its limit ({limit:.4g})"
            raise _diverged(f"training has diverged: {value}", step, schedules)


def _diverged(problem: str, step: int, schedules: Mapping[str, Schedule]) -> FloatingPointError:
    rates = ", ".join(f"{network.lr:g}" for network in schedules.values())
    return FloatingPointError(
        f"{problem} at update {step}; lower the learning rate ({rates}); the last good checkpoint "
        "is kept"
    )


def _generators() -> dict[str, torch.Tensor]:
    """Return the state of torch's own generators, which losses with noise draw from."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states
