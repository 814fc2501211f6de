"""Several seeds as one stacked batch of networks, against each seed alone."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch.utils._python_dispatch import TorchDispatchMode

from baselines import Learner, algorithm
from iwsft import (
    GaussianPolicy,
    HardSync,
    ImportanceWeightedMLE,
    ImportanceWeights,
    annotate_reference,
)
from iwsft.checkpoint import FILE, FOLDER
from iwsft.metrics import read
from iwsft.samplers import StepSampler, TrajectorySampler
from iwsft.training import Cost, Schedule, Training, fit, fit_stack
from iwsft.update import NOISE, Learning, Update

SEEDS, STEPS, BATCH = (0, 3, 4), 12, 8
ALGORITHMS = ("iw-sft", "iql", "awac", "td3-bc", "rebrac", "cql")
Build = Callable[[str, int], Learner]


@pytest.fixture
def build(trajectories: TensorDict, in_float64: None) -> Build:
    """A small learner of an algorithm and a seed, in float64."""
    data = trajectories.apply(lambda x: x.double() if x.is_floating_point() else x)
    return builder(data)


def builder(data: TensorDict) -> Build:
    """What builds a small learner of an algorithm and a seed on data."""

    def make(name: str, seed: int) -> Learner:
        if name != "iw-sft":
            module = algorithm(name)
            sizes = {"steps": STEPS, "batch_size": BATCH}
            settings: Any = replace(module.Settings(), **sizes)
            hidden = [name for name in vars(settings) if name.endswith("hidden")]
            return module.build(data, replace(settings, **dict.fromkeys(hidden, (8,))), seed=seed)
        torch.manual_seed(seed)
        own, device = data.copy(), data.get("action").device
        policy, other = (GaussianPolicy(3, 2, hidden=(8,)).to(device) for _ in range(2))
        annotate_reference(other, own)
        loss = ImportanceWeightedMLE(policy, proposal="cached")
        updater = HardSync(loss, every=2, trajectories=own)
        sampler = StepSampler(own, BATCH, seed=seed)
        return Learner(policy, loss, sampler, Schedule(STEPS, 0.01, warmup=2), updater)

    return make


def run_alone(learner: Learner, folder: Path) -> dict[str, torch.Tensor]:
    """Parameters after a training alone."""
    learner.fit(folder=folder, log_every=2, checkpoint_every=2)
    return learner.loss.state_dict()


def stack(trainings: list[Training]) -> list[Cost | FloatingPointError]:
    return fit_stack(trainings, log_every=2, checkpoint_every=2)


def assert_close(ours: dict[str, torch.Tensor], alone: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == alone.keys()
    for name, value in alone.items():
        told = f"{name}: {{}}".format
        torch.testing.assert_close(ours[name], value, rtol=1e-7, atol=1e-9, msg=told)


@pytest.mark.parametrize(
    ("option", "first", "second", "named"),
    [
        ("importance_weights", *map(ImportanceWeights.paper_control, (1.0, 5.0)), "k=5"),
        ("normalize_data_weights", False, True, "one normalize_data_weights"),
        ("proposal", "reference", "cached", "one proposal"),
        ("squash", False, True, "one squash for all seeds, here are False and True"),
        ("log_std_bounds", (-5.0, 2.0), (-4.0, 2.0), "(-4.0, 2.0)"),
        ("hidden", (8,), (8, 8), "one "),
        ("steps", 3, 4, "one steps"),
        ("batch_size", 4, 8, "one batch_size"),
    ],
)
def test_seeds_with_other_settings_are_no_stack(
    trajectories: TensorDict, option: str, first: Any, second: Any, named: str
) -> None:
    data = trajectories.copy()
    annotate_reference(GaussianPolicy(3, 2, hidden=(8,)), data)
    trainings = []
    for value in (first, second):
        given = {"steps": 3, "batch_size": 4, "proposal": "reference", option: value}
        size, schedule = given.pop("batch_size"), Schedule(given.pop("steps"), 0.01)
        names = signature(GaussianPolicy).parameters & given.keys()
        form = {"hidden": (8,), **{name: given.pop(name) for name in names}}
        loss = ImportanceWeightedMLE(GaussianPolicy(3, 2, **form), **given)
        trainings.append(Training(loss, StepSampler(data, size, seed=0), schedule))
    with pytest.raises(ValueError, match=re.escape(named)):
        fit_stack(trainings)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_each_seed_of_a_stack_is_that_seed_alone(build: Build, name: str, tmp_path: Path) -> None:
    learners, trainings = [], []
    for seed in SEEDS:
        learners.append(build(name, seed))
        trainings.append(learners[-1].training(folder=tmp_path / f"stack-{seed}"))
    assert all(isinstance(cost, Cost) for cost in stack(trainings))
    for seed, learner in zip(SEEDS, learners, strict=True):
        alone, folder = tmp_path / f"alone-{seed}", tmp_path / f"stack-{seed}"
        assert_close(learner.loss.state_dict(), run_alone(build(name, seed), alone))
        states = [torch.load(path / FOLDER / FILE)["state"] for path in (folder, alone)]
        # As large as alone: nothing of the other seeds is in it.
        sizes = [(path / FOLDER / FILE).stat().st_size for path in (folder, alone)]
        assert sizes[0] == pytest.approx(sizes[1], rel=0.05)
        assert states[0].keys() == states[1].keys()
        assert torch.equal(states[0]["draws"]["cpu"], states[1]["draws"]["cpu"])
        assert torch.equal(*(state["sampler"]["generator"] for state in states))
        ours, theirs = (read(path / "metrics.jsonl") for path in (folder, alone))
        assert [row.keys() for row in ours] == [row.keys() for row in theirs]
        for row, other in zip(ours, theirs, strict=True):
            timeless = {name: value for name, value in other.items() if "seconds" not in name}
            assert {name: row[name] for name in timeless} == pytest.approx(timeless, rel=1e-6)


@pytest.mark.parametrize("name", ["iw-sft", "td3-bc"])
@pytest.mark.parametrize("killed_by", SEEDS[:2])
def test_a_stack_that_was_killed_continues_stacked_or_alone(
    build: Build, name: str, killed_by: int, tmp_path: Path
) -> None:
    """The seeds before the one that is killed have a later checkpoint than those after it."""

    def kill(row: dict[str, float]) -> None:
        if row["step"] == 4:
            raise KeyboardInterrupt

    def folders(name: str) -> list[Path]:
        return [tmp_path / f"{name}-{seed}" for seed in SEEDS]

    trainings = []
    for seed, folder in zip(SEEDS, folders("stack"), strict=True):
        report = kill if seed == killed_by else None
        trainings.append(build(name, seed).training(folder=folder, report=report))
    with suppress(KeyboardInterrupt):
        stack(trainings)
    resumed = [build(name, seed) for seed in SEEDS]
    stack([one.training(folder=at) for one, at in zip(resumed[:2], folders("stack"), strict=False)])
    run_alone(resumed[2], folders("stack")[2])
    for seed, learner, alone in zip(SEEDS, resumed, folders("alone"), strict=True):
        assert_close(learner.loss.state_dict(), run_alone(build(name, seed), alone))


def test_frozen_parameters_stay_as_they_are_in_a_stack(build: Build, tmp_path: Path) -> None:
    def frozen(seed: int) -> Learner:
        learner = build("iw-sft", seed)
        next(learner.loss.parameters()).requires_grad_(False)
        return learner

    learners = [frozen(seed) for seed in SEEDS]
    stack([learner.training(folder=tmp_path / f"{i}") for i, learner in enumerate(learners)])
    for seed, learner in zip(SEEDS, learners, strict=True):
        assert_close(learner.loss.state_dict(), run_alone(frozen(seed), tmp_path / f"alone{seed}"))
    with pytest.raises(ValueError, match="a stack needs one frozen"):
        stack([learner.training(folder=tmp_path) for learner in (frozen(0), build("iw-sft", 3))])


def test_a_seed_that_diverges_leaves_the_stack(build: Build, tmp_path: Path) -> None:
    learners, trainings = [], []
    for seed in SEEDS:
        learners.append(build("iql", seed))
        limits = {"pred_value": 0.0 if seed == 3 else 1e9}
        trainings.append(replace(learners[-1], limits=limits).training(folder=tmp_path / str(seed)))
    outcomes = stack(trainings)
    assert [isinstance(outcome, FloatingPointError) for outcome in outcomes] == [False, True, False]
    assert "pred_value" in str(outcomes[1])
    for i in (0, 2):
        alone = run_alone(build("iql", SEEDS[i]), tmp_path / f"alone-{i}")
        assert_close(learners[i].loss.state_dict(), alone)


def test_what_can_not_be_stacked_or_captured_is_refused(
    build: Build, trajectories: TensorDict
) -> None:
    learner = build("iw-sft", 0)
    with pytest.raises(ValueError, match="graph=True needs networks and data on a GPU, not on cpu"):
        fit(learner.loss, learner.sampler, learner.schedule, graph=True)
    whole = TrajectorySampler(trajectories, 2)
    trainings = [Training(build("iw-sft", seed).loss, whole, Schedule(2, 0.1)) for seed in (0, 1)]
    with pytest.raises(ValueError, match="TrajectorySampler differ in shape"):
        fit_stack(trainings)
    settings = replace(algorithm("iql").Settings(), steps=2, dropout=0.1)
    learners = [algorithm("iql").build(trajectories, settings, seed=seed) for seed in (0, 1)]
    with pytest.raises(ValueError, match="dropout can't be stacked"):
        fit_stack([each.training() for each in learners])


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_loss_of_several_numbers_is_refused_before_an_update(
    trajectories: TensorDict, seeds: int
) -> None:
    """Backward of one seed would fail inside torch, and that of a stack would add them up."""
    losses = [
        ImportanceWeightedMLE(
            GaussianPolicy(3, 2, hidden=(8,)), proposal="reference", reduction="none"
        )
        for _ in range(seeds)
    ]
    before = [[parameter.clone() for parameter in loss.parameters()] for loss in losses]
    trainings = [
        Training(loss, StepSampler(trajectories, 4), Schedule(2, 0.1, decay="constant"))
        for loss in losses
    ]
    shape = r"\[4\]" if seeds == 1 else r"\[2, 4\]"
    with pytest.raises(ValueError, match=f"'loss_iw_mle' has shape {shape}; .*reduction='mean'"):
        fit_stack(trainings)
    for loss, old in zip(losses, before, strict=True):
        assert all(map(torch.equal, loss.parameters(), old))


class NothingIsRead(TorchDispatchMode):
    """Refuses operations whose result, or the shape of it, the host has to wait for."""

    WAITS = ("_local_scalar_dense", "nonzero", "_unique2", "unique_consecutive", "masked_select")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func._schema.name.removeprefix("aten::") not in (*self.WAITS, "bincount", "equal")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_an_update_reads_no_value_of_a_tensor(
    build: Build, name: str, stacked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a CUDA graph captures, where tensors are said to be on an accelerator."""
    learning, drawn = [], []
    for seed in SEEDS if stacked else SEEDS[:1]:
        learner = build(name, seed)
        batch = learner.sampler.sample()
        draw_noise = getattr(learner.loss, "draw_noise", None)
        drawn.append(batch if draw_noise is None else batch.set(NOISE, draw_noise(batch, None)))
        optimizer = torch.optim.SGD(learner.loss.parameters(), 0.1)
        learning.append(Learning(learner.loss, optimizer, [1.0], lambda batch: batch))
    update = Update(learning, graph=False)
    readers = [each for name, each in sys.modules.items() if name.startswith("iwsft.")]
    for module in readers:
        if hasattr(module, "on_host"):
            monkeypatch.setattr(module, "on_host", lambda _: False)
    for phase in (False, True):
        if hasattr(learning[0].loss, "phase"):
            for each in learning:
                each.loss.phase = phase
        with NothingIsRead():
            outputs, _ = update(drawn)
        losses = [value for key, value in outputs[0].items() if key.startswith("loss")]
        assert losses and all(value.isfinite() for value in losses)
    with pytest.raises(AssertionError), NothingIsRead():
        bool(losses[0] > 0)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_graph_changes_no_bit_and_a_stack_of_graphs_rounds(
    trajectories: TensorDict, in_float64: None, name: str, tmp_path: Path
) -> None:
    data = trajectories.apply(lambda x: x.double() if x.is_floating_point() else x)
    build, steps = builder(data.to("cuda")), {"log_every": 4, "checkpoint_every": 5}
    states = []
    for graph in (False, True):
        learner = build(name, 3)
        learner.fit(folder=tmp_path / str(graph), graph=graph, **steps)
        states.append(learner.loss.state_dict())
    for key, value in states[0].items():
        assert torch.equal(value, states[1][key]), key
    learners, trainings = [], []
    for seed in SEEDS:
        learners.append(build(name, seed))
        # Made here: a training keeps the state of torch's generators, which its seed set.
        trainings.append(learners[-1].training(folder=tmp_path / f"stack-{seed}"))
    fit_stack(trainings, graph=True, **steps)
    assert_close(learners[SEEDS.index(3)].loss.state_dict(), states[0])


class Watching:
    """An updater between whose calls 8 and 11 an update that waits for the GPU is an error."""

    def __init__(self, updater: Any) -> None:
        self.updater, self.calls = updater, 0

    def step(self) -> None:
        self.calls += 1
        if self.updater is not None:
            self.updater.step()
        if self.calls in (8, 11):
            torch.cuda.set_sync_debug_mode("error" if self.calls == 8 else "default")


@pytest.mark.gpu
@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("name", ALGORITHMS)
def test_no_update_waits_for_the_gpu(trajectories: TensorDict, name: str, graph: bool) -> None:
    learner = builder(trajectories.to("cuda"))(name, 0)
    # A hard sync may wait.
    updater: Any = Watching(None if name == "iw-sft" else learner.updater)
    parts = learner.loss, learner.sampler, learner.schedule
    try:
        fit(*parts, updater=updater, log_every=STEPS, graph=graph)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert updater.calls == STEPS
