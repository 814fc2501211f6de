"""The fit loop: learning-rate schedule, checkpoints, resume, metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torchrl.objectives.common import LossModule
from torchrl.objectives.utils import TargetNetUpdater

from iwsft import checkpoint
from iwsft.files import alone_in
from iwsft.metrics import MetricsLog, check_limits, diverged, row_of
from iwsft.metrics import Row as Row
from iwsft.progress import Progress
from iwsft.schedule import Schedule as Schedule
from iwsft.schedule import by_network, course_of, make_optimizer, set_rates
from iwsft.update import (
    NOISE,
    Learning,
    Update,
    check_alike,
    check_draws,
    check_follows,
    check_static,
    denormals_flushed,
    form_of,
    interrupts_unmasked,
)
from iwsft.validation import check_count

_STEPS = "steps"


class Sampler(Protocol):
    """A source of batches. Its batches depend only on its own state."""

    def sample(self) -> TensorDictBase:
        """Draw the next batch."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, its generator included."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore :meth:`state_dict`."""


@dataclass(frozen=True)
class Probe:
    """A measurement every ``every`` updates and at the end; its numbers join the row."""

    every: int
    look: Callable[[TensorDictBase], Row]


@dataclass(frozen=True)
class Cost:
    """Seconds on the clock and the processor over all resumes, without updates that a kill lost."""

    wall_seconds: float
    cpu_seconds: float


def _generators() -> dict[str, torch.Tensor]:
    """Return the state of torch's own generators, which losses with noise draw from."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


@dataclass(frozen=True)
class Training:
    """The arguments of :func:`fit` that belong to one seed of :func:`fit_stack`.

    Attributes:
        draws: State of torch's generators when this is made, from which the noise of the loss
            continues where there are several seeds.
    """

    loss: LossModule
    sampler: Sampler
    schedule: Schedule | Mapping[str, Schedule]
    updater: TargetNetUpdater | None = None
    limits: Mapping[str, float] = field(default_factory=dict)
    probes: Sequence[Probe] = ()
    folder: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    report: Callable[[Row], None] | None = None
    draws: dict[str, Tensor] = field(default_factory=_generators)


def fit(
    loss: LossModule,
    sampler: Sampler,
    schedule: Schedule | Mapping[str, Schedule],
    *,
    updater: TargetNetUpdater | None = None,
    limits: Mapping[str, float] | None = None,
    probes: Sequence[Probe] = (),
    folder: str | Path | None = None,
    settings: dict[str, Any] | None = None,
    checkpoint_every: int = 500,
    log_every: int = 50,
    report: Callable[[Row], None] | None = None,
    progress: bool = False,
    graph: bool = False,
) -> Cost:
    """Train a loss's networks in place: sample, loss, Adam step, targets (or q) follow.

    It minimises the sum of all outputs whose name starts with ``loss``, as TorchRL names them. An
    update leaves a network alone that has no gradient.

    Args:
        loss: TorchRL loss on the device of the batches.
        sampler: Source of the batches.
        schedule: Schedule of the updates; or one for each network of the loss, by the name of its
            attribute (``"actor_network"``, ``"qvalue_network"``, ``"log_alpha"``), all with the
            same number of steps.
        updater: Updater of target networks or of q, which a lagged q needs; ``step()`` follows each
            update.
        limits: Largest absolute values of the loss's outputs, by name; beyond, a run has diverged.
        probes: Measurements during the run.
        folder: Folder of the run, for ``checkpoint/`` and ``metrics.jsonl``; None writes nothing. A
            checkpoint in it is resumed, and the run ends in the same parameters, bit for bit, as an
            uninterrupted one, if all random numbers come from the sampler and from torch.
        settings: Plain values that belong to a checkpoint; one with other values is refused. The
            schedule, the arguments of loss and updater, the sampler's seed, and the actions,
            multiplicities and data weights of its data are compared without them; a constant
            schedule may have more steps than before.
        checkpoint_every: Number of updates between checkpoints; there is one at the end.
        log_every: Number of updates between rows of metrics.
        report: Function that is called with every row.
        progress: Whether to show rate, time left and loss on stderr.
        graph: Whether to capture the update, from the reading of the batch to Adam, as a CUDA
            graph, with the same parameters bit for bit. Loss and data are on the GPU then. What a
            loss computes must not depend on values of tensors; it draws noise in a method
            ``draw_noise(batch, generator)``, whose TensorDict is the batch's entry ``noise``, and
            names different computations by ``phase``.

    Raises:
        ValueError: The schedules do not fit the loss, a lagged q has no updater, the updater is of
            another loss or other trajectories, the loss or sampler does not fit a graph, or the
            loss is not one number.
        FloatingPointError: Loss or parameters are no longer finite, or an output exceeds its limit;
            the last good checkpoint stays.
        FileExistsError: Another process trains in the folder.
        iwsft.checkpoint.CheckpointError: The checkpoint is corrupt, or of other settings.
    """
    place = None if folder is None else Path(folder)
    parts: Any = updater, limits or {}, probes, place, settings or {}, report
    training = Training(loss, sampler, schedule, *parts)
    options = {"checkpoint_every": checkpoint_every, "log_every": log_every}
    (outcome,) = fit_stack([training], **options, progress=progress, graph=graph)
    if isinstance(outcome, FloatingPointError):
        raise outcome
    return outcome


def fit_stack(
    trainings: Sequence[Training],
    *,
    checkpoint_every: int = 500,
    log_every: int = 50,
    progress: bool = False,
    graph: bool = False,
) -> list[Cost | FloatingPointError]:
    """Train several seeds of one algorithm at once, as one stacked batch of networks.

    Each seed has the random numbers, the parameters up to rounding, and the files of a run of its
    own, and can be resumed alone. Seeds with checkpoints of different updates are trained one after
    another; one that diverges leaves the stack.

    The trainings have the same settings, sizes and number of updates, and samplers draw single
    steps. The other arguments are those of :func:`fit`; the progress is that of the first seed.

    Returns:
        For each the cost, a share of the processor's time, or the error by which it diverged.
    """
    check_count("log_every", log_every)
    check_count("checkpoint_every", checkpoint_every)
    with ExitStack() as locks:
        for each in trainings:
            if each.folder is not None:
                locks.enter_context(alone_in(each.folder, wait=False))
        seeds = [_Seed(each, graph=graph, alone=len(trainings) == 1) for each in trainings]
        if len(seeds) > 1:
            samplers: list[Any] = [each.sampler for each in trainings]
            check_alike(
                [each.loss for each in trainings],
                steps=[seed.steps for seed in seeds],
                batch_size=[getattr(sampler, "batch_size", None) for sampler in samplers],
            )
        groups: dict[int, list[_Seed]] = {}
        for seed in seeds:
            if seed.start < seed.steps:
                groups.setdefault(seed.start, []).append(seed)
        for start, group in groups.items():
            interrupts, progress_bar = interrupts_unmasked(), Progress(shown=progress)
            with denormals_flushed(), interrupts, progress_bar as display:
                task = display.add_task("updates", total=group[0].steps, completed=start)
                for seed in group:
                    seed.begin(share=1 / len(group))
                for step in _updates(group, log_every, checkpoint_every, graph=graph):
                    row = group[0].row
                    if row.get("step") == step:
                        display.update(task, completed=step, note=f"loss {row['loss']:.4g}")
                    elif progress:
                        display.advance(task)
        return [seed.outcome for seed in seeds]


def _updates(
    seeds: Sequence[_Seed], log_every: int, checkpoint_every: int, *, graph: bool
) -> Iterator[int]:
    """Make the updates of seeds that start at the same one; yield their numbers."""
    first, last = seeds[0].start + 1, seeds[0].steps
    update = Update([seed.learning for seed in seeds], graph=graph)
    try:
        for step in range(first, last + 1):
            for seed in seeds:
                seed.set_rates(step)
            measure = step % log_every == 0 or step in (1, last)
            save = step % checkpoint_every == 0 or step == last
            measured = measure or save or any(seed.due(step) for seed in seeds)
            results = update([seed.draw() for seed in seeds], measured=measured)
            for seed, out, batch in zip(seeds, *results, strict=True):
                seed.follow(step, out, batch, measure=measure, save=save)
            yield step
            healthy = [seed for seed in seeds if not isinstance(seed.outcome, FloatingPointError)]
            if not healthy:
                return
            if len(healthy) < len(seeds):
                update.close()
                seeds = healthy
                update = Update([seed.learning for seed in seeds], graph=graph)
    finally:
        update.close()


class _Seed:
    """A training that is under way: its optimizer, its random numbers, its files."""

    def __init__(self, training: Training, *, graph: bool, alone: bool) -> None:
        self._training = training
        loss, sampler, schedule = training.loss, training.sampler, training.schedule
        self._schedules = by_network(schedule)
        self.steps = next(iter(self._schedules.values())).steps
        self._device = next(loss.parameters()).device
        with interrupts_unmasked():
            check_draws(loss, sampler)
        check_follows(loss, sampler, training.updater)
        if graph or not alone:
            check_static(loss, sampler, graph=graph, stacked=not alone)
        optimizer = make_optimizer(loss, self._schedules, capturable=graph)
        clip_norms = [network.clip_norm for network in self._schedules.values()]
        self._graph = graph
        read = self._read if graph else lambda batch: batch
        self.learning = Learning(loss, optimizer, clip_norms, read)
        # Without one, the noise of the loss comes from torch's own generator.
        self._noise = None if alone else torch.Generator(self._device)
        if self._noise is not None:
            self._noise.set_state(training.draws[self._device.type])
        self._form = form_of(loss, "loss.")
        self._form |= {"seed": repr(sampler.seed)} if hasattr(sampler, "seed") else {}
        self._parts: dict[str, Any] = {"loss": loss, "optimizer": optimizer, "sampler": sampler}
        if training.updater is not None:
            self._form |= form_of(training.updater, "updater.")
            self._parts["updater"] = training.updater
        self.start, self._before = self._resume()
        for group in optimizer.param_groups:
            group["capturable"] = graph
        self._rates: list[float] = []
        self._log: MetricsLog | None = None
        self.row: Row = {}
        self.outcome: Cost | FloatingPointError = self._before

    def begin(self, *, share: float) -> None:
        """Start the clock and the log; ``share`` is that of the processor's time."""
        if self._training.folder is not None:
            self._log = MetricsLog(self._training.folder, after=self.start)
        self._share = share
        self._since = time.perf_counter(), time.process_time()

    def cost(self) -> Cost:
        """Cost up to now."""
        wall, cpu = self._since
        return Cost(
            self._before.wall_seconds + time.perf_counter() - wall,
            self._before.cpu_seconds + self._share * (time.process_time() - cpu),
        )

    def set_rates(self, step: int) -> None:
        """Set the learning rates of an update."""
        rates = [network.lr * network.factor(step - 1) for network in self._schedules.values()]
        if rates != self._rates:
            set_rates(self.learning.optimizer, rates)
        self._rates = rates

    def draw(self) -> TensorDictBase:
        """Draw all random numbers of an update: a batch with noise, or what it is read from."""
        sampler: Any = self._training.sampler
        if self._graph:
            drawn: TensorDictBase = TensorDict({_STEPS: sampler.draw()}, [sampler.batch_size])
        else:
            drawn = sampler.sample()
        draw_noise = getattr(self._training.loss, "draw_noise", None)
        if draw_noise is not None:
            noise = draw_noise(self._shape if self._graph else drawn, self._noise)
            drawn = drawn if noise is None else drawn.copy().set(NOISE, noise)
        return drawn

    @cached_property
    def _shape(self) -> TensorDictBase:
        """A batch of the shape, dtype and device of all batches."""
        sampler: Any = self._training.sampler
        steps = torch.zeros(sampler.batch_size, dtype=torch.int64, device=self._device)
        return sampler.take(steps)

    def _read(self, drawn: TensorDictBase) -> TensorDictBase:
        sampler: Any = self._training.sampler
        batch: TensorDictBase = sampler.take(drawn.get(_STEPS))
        noise = drawn.get(NOISE, default=None)
        return batch if noise is None else batch.set(NOISE, noise)

    def due(self, step: int) -> list[Probe]:
        """The probes that look after an update."""
        last = step == self.steps
        return [probe for probe in self._training.probes if step % probe.every == 0 or last]

    def follow(
        self, step: int, out: TensorDictBase, batch: TensorDictBase, *, measure: bool, save: bool
    ) -> None:
        """Do what follows an update: measurements, targets or q, checkpoint."""
        try:
            self._follow(step, out, batch, measure=measure, save=save)
        except FloatingPointError as error:
            self.outcome = error
        else:
            if step == self.steps:
                self.outcome = self.cost()

    def _follow(
        self, step: int, out: TensorDictBase, batch: TensorDictBase, *, measure: bool, save: bool
    ) -> None:
        training, schedules, due = self._training, self._schedules, self.due(step)
        save = save and (step == self.steps or training.folder is not None)
        if measure or due or save:
            row = row_of(step, out, dict(zip(schedules, self._rates, strict=True)))
            check_limits(row, training.limits, schedules)
        if measure or due:
            for probe in due:
                row |= probe.look(batch)
            row["wall_seconds"] = self.cost().wall_seconds
            if self._log is not None:
                self._log.write(row)
            if training.report is not None:
                training.report(row)
            self.row = row
        # After the probes, which see the q that weighed the batch.
        if training.updater is not None:
            training.updater.step()
        # A last gradient can be NaN although its loss was finite.
        if save and not all(bool(p.isfinite().all()) for p in training.loss.parameters()):
            raise diverged("the policy is no longer finite", step, schedules)
        if save and self._log is not None:
            self._save(step, self._log)

    def _save(self, step: int, log: MetricsLog) -> None:
        state = {name: part.state_dict() for name, part in self._parts.items()}
        draws = _generators()
        if self._noise is not None:
            # A view of a stack would be written with all of it.
            state = tree_map_only(Tensor, torch.clone, state)
            draws[self._device.type] = self._noise.get_state()
        state |= {"draws": draws, "step": step, **asdict(self.cost())}
        state |= {"schedule": course_of(self._schedules), "form": self._form}
        log.sync()  # a resumed run does not make the rows before its checkpoint again
        checkpoint.save(log.folder / checkpoint.FOLDER, state, self._training.settings)

    def _resume(self) -> tuple[int, Cost]:
        """Load the checkpoint, if there is one; return its update and its cost."""
        folder = self._training.folder
        state = folder and checkpoint.load(folder / checkpoint.FOLDER, self._training.settings)
        if not state:
            return 0, Cost(0.0, 0.0)
        course = course_of(self._schedules)
        differ = checkpoint.differences(state.get("schedule", course), course)
        if state["step"] > self.steps:
            differ = f"{state['step']} updates are done, {self.steps} are asked for"
        contents = f"a run with another schedule: {differ}" if differ else ""
        # Versions of libraries differ in their attributes.
        own = {name: self._form.get(name, value) for name, value in state.get("form", {}).items()}
        if differ := checkpoint.differences(state.get("form", {}), own):
            contents = f"a run with another loss, updater or seed: {differ}"
        if not state.keys() >= self._parts.keys():
            contents = f"{', '.join(sorted(state))}, this run needs {', '.join(self._parts)}"
        if contents:
            raise checkpoint.CheckpointError(f"{folder} holds {contents}; choose another folder")
        # Syncs have written the updater's entry since, and the updater's own state restores it.
        state["sampler"].pop(str(getattr(self._training.updater, "key", None)), None)
        for name, part in self._parts.items():
            part.load_state_dict(state[name])
        # A finished run leaves the random numbers of what comes after it alone.
        if state["step"] < self.steps and self._noise is not None:
            self._noise.set_state(state["draws"][self._device.type])
        elif state["step"] < self.steps:
            torch.set_rng_state(state["draws"]["cpu"])
            if "cuda" in state["draws"]:
                torch.cuda.set_rng_state(state["draws"]["cuda"])
        return state["step"], Cost(state["wall_seconds"], state["cpu_seconds"])
