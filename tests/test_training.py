"""The fit loop against plain loops, and a run that was killed against one that was not."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase
from torch import Tensor

from iwsft import (
    EMA,
    GaussianPolicy,
    HardSync,
    ImportanceWeightedMLE,
    ImportanceWeights,
    checkpoint,
    metrics,
)
from iwsft.checkpoint import CheckpointError
from iwsft.diagnostics import diagnose
from iwsft.samplers import StepSampler, TrajectorySampler
from iwsft.training import Cost, Probe, Row, Sampler, Schedule, fit
from iwsft.trajectory import MULTIPLICITY, REF_LOG_PROB, from_steps
from iwsft.weights import SelfNormalize, Temperature

STEPS = 24
SCHEDULE = Schedule(steps=STEPS, lr=0.01, warmup=5)
LENGTHS = torch.tensor([5, 1, 9, 3, 7])
DRAWS = torch.tensor([1, 3, 2, 1, 2])


def trajectories(dtype: torch.dtype = torch.float32) -> TensorDict:
    """Five trajectories with multiplicities and the log-probs of another policy."""
    generator = torch.Generator().manual_seed(0)
    n = int(LENGTHS.sum())
    action = 2 * torch.rand(n, 2, generator=generator, dtype=dtype) - 1
    observation = torch.randn(n, 3, generator=generator, dtype=dtype)
    ids = torch.arange(len(LENGTHS)).repeat_interleave(LENGTHS)
    data = from_steps({"observation": observation, "action": action}, ids)
    data[MULTIPLICITY] = DRAWS.repeat_interleave(LENGTHS)
    data[REF_LOG_PROB] = -1.5 - torch.rand(n, generator=generator, dtype=dtype)
    return data


def small_policy(dtype: torch.dtype = torch.float32) -> GaussianPolicy:
    torch.manual_seed(1)
    return GaussianPolicy(3, 2, hidden=(8,), log_std_init=-0.5).to(dtype)


@dataclass
class Job:
    """What one process holds of a run: all of it is made again after a kill."""

    loss: ImportanceWeightedMLE
    sampler: Sampler
    updater: HardSync | EMA | None
    data: TensorDict


def job(
    proposal: str, sampler: type, make_updater: Callable[..., HardSync | EMA] | None, **options: Any
) -> Job:
    data = trajectories()
    loss = ImportanceWeightedMLE(
        small_policy(),
        importance_weights=ImportanceWeights([Temperature(2.0)], "mean", [SelfNormalize()]),
        proposal=proposal,
        **options,
    )
    updater = make_updater(loss, data) if make_updater else None
    return Job(loss, sampler(data, 6, seed=2), updater, data)


def hard(every: int) -> Callable[..., HardSync]:
    return lambda loss, data: HardSync(
        loss, every=every, trajectories=data if loss.proposal == "cached" else None
    )


def moving(loss: ImportanceWeightedMLE, data: TensorDict) -> EMA:
    return EMA(loss, decay=0.8)


OF_A_MODULE = partial(job, "lagged", TrajectorySampler, functional=False)
# Syncs every 7 updates and checkpoints every 5: they fall into the middle of each other's windows.
JOBS: dict[str, Callable[[], Job]] = {
    "reference, steps": lambda: job("reference", StepSampler, None),
    "reference, trajectories": lambda: job("reference", TrajectorySampler, None),
    "current, trajectories": lambda: job("current", TrajectorySampler, None),
    "cached, steps, hard sync": lambda: job("cached", StepSampler, hard(7)),
    "cached, trajectories, hard sync": lambda: job("cached", TrajectorySampler, hard(7)),
    "lagged, trajectories, hard sync": lambda: job("lagged", TrajectorySampler, hard(7)),
    "lagged, trajectories, moving average": lambda: job("lagged", TrajectorySampler, moving),
    "lagged, module itself, moving average": partial(OF_A_MODULE, moving),
    "lagged, module itself, hard sync": partial(OF_A_MODULE, hard(7)),
}


class Killed(BaseException):
    """Ends a run where a kill would."""


def train(made: Job, folder: Path | None, *, kill: int | None = None, at: str = "batch") -> Cost:
    """Run ``fit``; with ``kill`` it ends at that update, when the batch is sampled or read."""
    drawn = 0

    def looked_at(batch: TensorDictBase) -> Row:
        if kill is not None and at == "probe" and drawn >= kill:
            raise Killed
        return diagnose(made.loss, made.data)

    class Draws:
        def sample(self) -> TensorDictBase:
            nonlocal drawn
            drawn += 1
            if kill is not None and at == "batch" and drawn == kill:
                raise Killed
            return made.sampler.sample()

        state_dict = made.sampler.state_dict
        load_state_dict = made.sampler.load_state_dict

    return fit(
        made.loss,
        Draws(),
        SCHEDULE,
        updater=made.updater,
        probes=[Probe(4, looked_at)],
        folder=folder,
        settings={"lr": SCHEDULE.lr},
        checkpoint_every=5,
        log_every=3,
    )


def tensors(tree: Any, name: str = "") -> dict[str, Tensor]:
    """All tensors of a nested state, by path."""
    if isinstance(tree, Tensor):
        return {name: tree}
    items = enumerate(tree) if isinstance(tree, list) else getattr(tree, "items", tuple)()
    return {k: v for key, value in items for k, v in tensors(value, f"{name}.{key}").items()}


def outcome(folder: Path) -> tuple[dict[str, Tensor], list[Row]]:
    """The last checkpoint (parameters, q, Adam, sampler, cached weights) and the metrics."""
    state = checkpoint.load(folder / checkpoint.FOLDER, {"lr": SCHEDULE.lr})
    assert state is not None and state["step"] == STEPS
    rows = metrics.read(folder / metrics.FILE)
    for row in rows:
        del row["wall_seconds"]
    return tensors(state), rows


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    folders: dict[str, Path] = {}

    def run(name: str) -> Path:
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp("whole")
            train(JOBS[name](), folders[name])
        return folders[name]

    return run


@pytest.mark.parametrize("name", JOBS)
@settings(
    max_examples=4,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(kills=st.lists(st.integers(1, STEPS), min_size=1, max_size=3), data=st.data())
def test_killed_anywhere_and_resumed_ends_where_an_uninterrupted_run_ends(
    name: str,
    kills: list[int],
    data: st.DataObject,
    uninterrupted: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("killed")
    for kill in kills:
        at = data.draw(st.sampled_from(["batch", "probe"]))
        with suppress(Killed):
            train(JOBS[name](), folder, kill=kill, at=at)
    made = JOBS[name]()
    train(made, folder)

    state, rows = outcome(folder)
    wanted, wanted_rows = outcome(uninterrupted(name))
    assert state.keys() == wanted.keys() and len(state) > 15
    for key, value in wanted.items():
        assert torch.equal(state[key], value), key
    assert rows == wanted_rows
    # What the caller holds is what the checkpoint holds, also where nothing was left to do.
    for key, value in made.loss.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(value, wanted[f".loss.{key}"]), key


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr": 0.02}, r"all.lr=0.01 \(now 0.02\)"),
        ({"warmup": 4}, r"warmup=5 \(now 4\)"),
        ({"weight_decay": 0.5}, "weight_decay=0.0"),
        ({"clip_norm": 1.0}, r"clip_norm=inf \(now 1.0\)"),
        ({"decay": "constant"}, "decay='cosine'"),
        ({"steps": 30}, r"steps=24 \(now 30\)"),
        ({"steps": 12}, "24 updates are done, 12 are asked for"),
    ],
)
def test_another_schedule_is_refused_without_settings(
    uninterrupted: Callable[[str], Path], change: dict[str, Any], message: str
) -> None:
    made, folder = JOBS["reference, steps"](), uninterrupted("reference, steps")
    before = {name: x.clone() for name, x in tensors(dict(made.loss.state_dict())).items()}
    with pytest.raises(CheckpointError, match=f"another schedule: .*{message}"):
        fit(
            made.loss,
            made.sampler,
            replace(SCHEDULE, **change),
            folder=folder,
            settings={"lr": SCHEDULE.lr},
        )
    assert_equal = torch.testing.assert_close
    assert_equal(tensors(dict(made.loss.state_dict())), before, rtol=0, atol=0)


def test_a_constant_schedule_can_be_prolonged(tmp_path: Path) -> None:
    """It ends where one run of the whole length ends."""
    states = []
    for lengths in ((8, 20), (20,)):
        folder = tmp_path / str(len(lengths))
        for steps in lengths:
            made = JOBS["reference, steps"]()
            course = Schedule(steps=steps, lr=0.01, warmup=3, decay="constant")
            fit(made.loss, made.sampler, course, folder=folder)
        states.append(made.loss.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    with pytest.raises(CheckpointError, match="20 updates are done, 8 are asked for"):
        fit(made.loss, made.sampler, replace(course, steps=8), folder=folder)


def test_a_finished_run_is_not_trained_again(uninterrupted: Callable[[str], Path]) -> None:
    folder = uninterrupted("cached, steps, hard sync")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    made = JOBS["cached, steps, hard sync"]()
    first = train(made, folder, kill=1)
    assert first == train(JOBS["cached, steps, hard sync"](), folder, kill=1)
    assert first.wall_seconds > 0 and first.cpu_seconds > 0
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_the_same_seed_gives_the_same_numbers_with_and_without_a_folder(tmp_path: Path) -> None:
    made = [JOBS["lagged, trajectories, moving average"]() for _ in range(2)]
    train(made[0], None)
    train(made[1], tmp_path)
    one, two = (tensors(dict(each.loss.state_dict())) for each in made)
    for key, value in one.items():
        assert torch.equal(two[key], value), key


def plain_loop(proposal: str, decay: float, every: int) -> list[Tensor]:
    """iw-SFT as the paper writes it: loops over trajectories, torch's slow Adam, rates by hand."""
    data = trajectories(torch.float64)
    policy, q = small_policy(torch.float64), small_policy(torch.float64)
    adam = torch.optim.Adam(policy.parameters(), lr=0.0, foreach=False, fused=False)
    starts = LENGTHS.cumsum(0) - LENGTHS

    def log_prob(which: GaussianPolicy, begin: int, end: int) -> Tensor:
        head = which.module[0].module
        mean, std = head(data["observation"][begin:end])
        normal = torch.distributions.Normal(mean, std)
        return normal.log_prob(data["action"][begin:end]).sum(-1)

    for step in range(STEPS):
        total = torch.zeros((), dtype=torch.float64)
        for start, length, draws in zip(starts, LENGTHS, DRAWS, strict=True):
            begin, end = int(start), int(start + length)
            weight = torch.tensor(1.0, dtype=torch.float64)
            if proposal != "reference":
                with torch.no_grad():
                    ratio = log_prob(q, begin, end) - data[REF_LOG_PROB][begin:end]
                    weight = (2.0 * ratio.mean()).exp()
            total = total - draws * weight * log_prob(policy, begin, end).mean()
        adam.zero_grad()
        (total / DRAWS.sum()).backward()
        if step < 5:
            rate = 0.01 * step / 5
        else:
            rate = 0.01 * (1 + math.cos(math.pi * (step - 5) / (STEPS - 5))) / 2
        adam.param_groups[0]["lr"] = rate
        adam.step()
        with torch.no_grad():
            for ours, theirs in zip(q.parameters(), policy.parameters(), strict=True):
                if proposal == "moving average":
                    ours.copy_(decay * ours + (1 - decay) * theirs)
                elif (step + 1) % every == 0:
                    ours.copy_(theirs)
    return [parameter.detach() for parameter in policy.parameters()]


@pytest.mark.parametrize("kind", ["reference", "moving average", "hard sync", "cached"])
def test_fit_equals_a_plain_loop(kind: str) -> None:
    """In float64 the two differ by rounding alone."""
    data, policy = trajectories(torch.float64), small_policy(torch.float64)
    proposal = {"reference": "reference", "cached": "cached"}.get(kind, "lagged")
    chain = ImportanceWeights([Temperature(2.0)], "mean")
    loss = ImportanceWeightedMLE(policy, importance_weights=chain, proposal=proposal)
    updater: HardSync | EMA | None = None
    if kind == "moving average":
        updater = EMA(loss, decay=0.8)
    elif kind != "reference":
        updater = hard(7)(loss, data)
    before = [parameter.detach().clone() for parameter in policy.parameters()]
    everything = SimpleNamespace(
        sample=lambda: data, state_dict=dict, load_state_dict=lambda state: None
    )
    fit(loss, everything, SCHEDULE, updater=updater)
    wanted = plain_loop("reference" if kind == "reference" else kind, decay=0.8, every=7)
    # The loss is summed in float64, and rounded to the dtype of the log-probs.
    for ours, theirs, start in zip(policy.parameters(), wanted, before, strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-9)
        assert (ours - start).abs().max() > 0.01


@pytest.mark.parametrize("log_every", [1, 1000])
def test_divergence_is_an_error_and_the_checkpoint_before_stays_good(
    tmp_path: Path, log_every: int
) -> None:
    """Also between two rows of metrics, where nobody looks at the loss."""
    loss = ImportanceWeightedMLE(small_policy(), proposal="reference")
    sampler = StepSampler(trajectories(), 6)
    far = Schedule(steps=20, lr=1e38, warmup=15)
    named = r"finite at update \d+; lower the learning rate"
    with pytest.raises(FloatingPointError, match=named):
        fit(loss, sampler, far, folder=tmp_path, checkpoint_every=1, log_every=log_every)
    loss = ImportanceWeightedMLE(small_policy(), proposal="reference")
    with pytest.raises(FloatingPointError, match=named):
        fit(loss, sampler, far, log_every=log_every)
    state = checkpoint.load(tmp_path / checkpoint.FOLDER, {})
    assert state is not None and 1 <= state["step"] < 20
    assert all(value.isfinite().all() for value in tensors(state["loss"]).values())
    assert all(math.isfinite(row["loss"]) for row in metrics.read(tmp_path / metrics.FILE))


def test_other_settings_other_parts_and_other_data_are_refused(tmp_path: Path) -> None:
    name = "reference, steps"
    with pytest.raises(Killed):
        train(JOBS[name](), tmp_path, kill=12)
    content = (tmp_path / checkpoint.FOLDER / checkpoint.FILE).read_bytes()
    log = (tmp_path / metrics.FILE).read_bytes()

    made = JOBS[name]()
    with pytest.raises(CheckpointError, match=r"lr=0\.01 \(now 0\.02\)"):
        fit(made.loss, made.sampler, SCHEDULE, folder=tmp_path, settings={"lr": 0.02})
    with pytest.raises(CheckpointError, match="updater"):
        train(JOBS["cached, steps, hard sync"](), tmp_path)
    fewer = StepSampler(trajectories()[:6], 6)
    with pytest.raises(ValueError, match="trajectories=5, not 2"):
        fit(made.loss, fewer, SCHEDULE, folder=tmp_path, settings={"lr": SCHEDULE.lr})

    assert (tmp_path / checkpoint.FOLDER / checkpoint.FILE).read_bytes() == content
    assert (tmp_path / metrics.FILE).read_bytes() == log


# The thread of TensorBoard's writer prints a traceback of its own.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("size", [1_500, 4_000, 12_000])
def test_a_full_disk_is_one_error_and_a_resume_ends_the_same(
    tmp_path: Path,
    uninterrupted: Callable[[str], Path],
    full_disk: Callable[[int], AbstractContextManager[None]],
    size: int,
) -> None:
    name = "lagged, trajectories, hard sync"
    with full_disk(size), pytest.raises(OSError, match="no space left.*--resume"):
        train(JOBS[name](), tmp_path)
    train(JOBS[name](), tmp_path)
    (state, rows), (wanted, wanted_rows) = outcome(tmp_path), outcome(uninterrupted(name))
    assert all(torch.equal(state[key], value) for key, value in wanted.items())
    assert rows == wanted_rows


def test_two_processes_in_one_folder(tmp_path: Path) -> None:
    with FileLock(tmp_path / ".lock"), pytest.raises(FileExistsError, match="another process"):
        train(JOBS["reference, steps"](), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_the_cost_adds_up_over_resumes(tmp_path: Path) -> None:
    name = "reference, steps"
    with pytest.raises(Killed):
        train(JOBS[name](), tmp_path, kill=STEPS)
    state = checkpoint.load(tmp_path / checkpoint.FOLDER, {"lr": SCHEDULE.lr})
    assert state is not None
    cost = train(JOBS[name](), tmp_path)
    assert cost.wall_seconds > state["wall_seconds"] > 0
    assert cost.cpu_seconds > state["cpu_seconds"] > 0
    seconds = [json.loads(line)["wall_seconds"] for line in (tmp_path / metrics.FILE).open()]
    assert seconds == sorted(seconds)
