"""The replay of an online SAC run as a dataset."""

from __future__ import annotations

import json
import multiprocessing
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import numpy as np
import pytest
import torch
from rich.progress import Progress
from tensordict import TensorDict
from torchrl.objectives import SACLoss

from baselines.critics import qvalue_networks
from benchmarks.collect import sac
from benchmarks.collect.__main__ import main
from benchmarks.collect.options import Options
from benchmarks.collect.output import Output, Parts
from benchmarks.collect.rollout import Simulator
from iwsft import datasets, metrics
from iwsft.checkpoint import CheckpointError
from iwsft.evaluation import episode_seeds
from iwsft.trajectory import lengths

pytestmark = pytest.mark.filterwarnings("ignore:.*out of date")
ENV = "InvertedPendulum-v4"
# Steps, and the first of them at random.
TINY, AT_RANDOM = 2000, 1550


def collect(out: Path, **settings: Any) -> None:
    settings = {"env": ENV, "random_steps": 300, **settings}
    main(Options(out=str(out), online="sac", **settings))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset of a tiny run."""
    out = tmp_path_factory.mktemp("sac") / "replay.hdf5"
    collect(out, steps=(TINY,), random_steps=AT_RANDOM, seed=1)
    return out


@pytest.fixture
def pendulum() -> Simulator:
    return Simulator.of(ENV, {})


def test_every_transition_is_in_the_dataset(tiny: Path) -> None:
    """Stepping the recorded actions by hand gives the record again, the cut at the end included."""
    with h5py.File(tiny) as file:
        data = {key: file[key][()] for key in file}
        (source,) = json.loads(file.attrs["sources"])
    assert len(data["rewards"]) == TINY
    ends = np.flatnonzero(data["terminals"] | data["timeouts"]) + 1
    assert ends[-1] == TINY
    env = gym.make(ENV)
    start = 0
    for seed, stop in zip(episode_seeds(1, len(ends)), ends, strict=True):
        observation, _ = env.reset(seed=seed)
        total = 0.0
        for i in range(start, stop):
            assert np.array_equal(np.float32(observation), data["observations"][i])
            observation, reward, terminated, _, _ = env.step(data["actions"][i])
            assert np.array_equal(np.float32(observation), data["next_observations"][i])
            assert terminated == data["terminals"][i]
            total += float(reward)
        assert total == pytest.approx(data["rewards"][start:stop].sum(), rel=1e-6)
        start = stop
    assert source["policy"] == "online SAC run"
    assert (source["episodes"], source["steps"]) == (len(ends), TINY)


def test_it_is_loaded_and_it_has_learned(tiny: Path) -> None:
    data = datasets.load(tiny)
    assert data.env_id == ENV
    sizes = lengths(data.trajectories).float()  # the reward is 1 per step
    begun = sizes.cumsum(0) - sizes
    assert sizes[-6:-1].mean() > 3 * sizes[begun < AT_RANDOM].mean()
    # Uniform actions fill the bounds [-3, 3].
    actions = data.trajectories["action"][:AT_RANDOM]
    assert -3 <= float(actions.min()) < -2.9
    assert abs(float(actions.mean())) < 5 * 3**0.5 / AT_RANDOM**0.5
    rows = metrics.read(tiny.with_suffix(".sac") / metrics.FILE)
    assert rows[-1]["step"] == TINY
    assert {"return_mean", "loss_actor", "loss_qvalue", "alpha", "cpu_seconds"} <= set(rows[-1])


def test_its_policy_can_be_rolled_out(tiny: Path, tmp_path: Path) -> None:
    """--policy takes the run's folder; the environment is the run's."""
    folder, out = tiny.with_suffix(".sac"), tmp_path / "rolled.hdf5"
    main(Options(out=str(out), policy=(str(folder),), episodes=(3,)))
    packed = datasets.load(out).trajectories
    policy, env_id, _ = sac.load_policy(folder)
    assert env_id == ENV
    with torch.no_grad():
        loc, _ = policy.module[0].module(packed["observation"])
    (file,) = (folder / sac.POLICY).iterdir()
    (tmp_path / sac.POLICY).mkdir()
    (tmp_path / sac.POLICY / file.name).write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="is corrupt"):
        sac.load_policy(tmp_path)
    torch.testing.assert_close(packed["action"], 3 * torch.tanh(loc), rtol=1e-4, atol=1e-5)


def test_a_killed_run_continues(tmp_path: Path) -> None:
    """A SIGKILL after some parts: --resume ends in the bytes of a run without one."""
    settings = {"steps": (240,), "random_steps": 100, "part_steps": 20, "seed": 4}
    killed, whole = tmp_path / "killed.hdf5", tmp_path / "whole.hdf5"
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=collect, args=(killed,), kwargs=settings)
    process.start()
    partial = tmp_path / "killed.hdf5.partial"
    until = time.monotonic() + 60
    # After updates have begun, so that networks and optimizer are in the checkpoint.
    while len(list(partial.glob("part-*.npz"))) < 6 and process.is_alive():
        assert time.monotonic() < until
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not killed.exists()
    collect(killed, resume=True, **settings)
    collect(whole, **settings)
    assert killed.read_bytes() == whole.read_bytes()
    first, second = (sac.load_policy(out.with_suffix(".sac"))[0] for out in (killed, whole))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])
    rows = [metrics.read(out.with_suffix(".sac") / metrics.FILE) for out in (killed, whole)]
    for row in rows[0] + rows[1]:
        del row["cpu_seconds"]
    assert rows[0] == rows[1]


def begin(folder: Path, pendulum: Simulator) -> sac.OnlineRun:
    """A run of 400 steps with a part about every 100."""
    output = Output.of(str(folder / "a.hdf5"))
    parts = Parts(output.partial, {})
    counts: dict[str, Any] = {"steps": (400,), "random_steps": 370, "part_steps": 100}
    options = Options(out=output.name, online="sac", seed=2, **counts)
    return sac.OnlineRun(pendulum, parts, output, options)


class Interrupted(Progress):
    """A progress bar that is stopped after step 250."""

    def update(self, *_: Any, completed: float | None = None, **__: Any) -> None:
        assert completed is not None
        if completed > 250:
            raise KeyboardInterrupt


def test_parts_and_checkpoint_that_do_not_fit(tmp_path: Path, pendulum: Simulator) -> None:
    """A part ahead of its checkpoint, as a kill between the two writes leaves it, is dropped."""
    begin(tmp_path / "whole", pendulum).collect(Progress())
    with pytest.raises(KeyboardInterrupt):
        begin(tmp_path / "cut", pendulum).collect(Interrupted())
    paths = sorted((tmp_path / "cut" / "a.hdf5.partial").glob("part-*.npz"))
    assert len(paths) == 2
    shutil.copyfile(paths[0], paths[0].with_name("part-000002.npz"))
    begin(tmp_path / "cut", pendulum).collect(Progress())
    cut, whole = (
        Parts(tmp_path / name / "a.hdf5.partial", {}).fields() for name in ("cut", "whole")
    )
    for name, values in whole.items():
        np.testing.assert_array_equal(cut[name], values)
    paths[1].unlink()
    with pytest.raises(CheckpointError, match="part-000001.npz is missing; put it back"):
        begin(tmp_path / "cut", pendulum)
    for path in paths[1].parent.glob("part-*.npz"):
        if path != paths[0]:
            path.unlink()
    with pytest.raises(CheckpointError, match="has lost parts"):
        begin(tmp_path / "cut", pendulum)


@pytest.mark.filterwarnings("ignore:No target network updater")
def test_the_loss_is_torchrls(pendulum: Simulator) -> None:
    """One product for both Q-networks gives the losses and gradients of TorchRL's vmap."""
    torch.manual_seed(0)
    learner = sac.SAC(pendulum, sac.Settings())
    plain = SACLoss(
        sac.actor(4, torch.tensor([-3.0]), torch.tensor([3.0])),
        qvalue_networks(4, 1),
        loss_function="l2",
        target_entropy=-1.0,
    )
    plain.make_value_estimator(gamma=0.99)
    plain.load_state_dict(learner.loss.state_dict())
    batch = TensorDict(
        {
            "observation": torch.randn(64, 4),
            "action": 6 * torch.rand(64, 1) - 3,
            "next": {
                "observation": torch.randn(64, 4),
                "reward": torch.randn(64, 1),
                "done": torch.rand(64, 1) < 0.3,
                "terminated": torch.rand(64, 1) < 0.3,
            },
        },
        [64],
    )
    grads = []
    for loss in (learner.loss, plain):
        torch.manual_seed(7)
        out = loss(batch)
        (out["loss_actor"] + out["loss_qvalue"] + out["loss_alpha"]).backward()
        grads.append({name: p.grad for name, p in loss.named_parameters()})
    assert len(grads[0]) == len(grads[1]) > 10
    for name, grad in grads[0].items():
        torch.testing.assert_close(grad, grads[1][name], rtol=1e-4, atol=1e-6, msg=name)


def test_an_update(pendulum: Simulator) -> None:
    """Adam's first step moves each parameter by the learning rate; targets follow by tau."""
    torch.manual_seed(0)
    settings = sac.Settings()
    learner = sac.SAC(pendulum, settings)
    replay = filled(50)
    before = {name: p.detach().clone() for name, p in learner.loss.named_parameters()}
    q = "qvalue_network_params.module.layers.0.weight"
    learner.update(replay.sample(32))
    state = learner.loss.state_dict()
    for name, parameter in learner.loss.named_parameters():
        moved = (parameter.detach() - before[name]).abs().max()
        assert float(moved) == pytest.approx(settings.lr, rel=1e-2), name
    followed = state[f"target_{q}"] - before[q]
    # Half a unit in the last place of a weight below 0.5 is 1.5e-8; the way is 1.5e-6.
    torch.testing.assert_close(followed, settings.tau * (state[q] - before[q]), rtol=0, atol=4e-8)


def filled(size: int, capacity: int = 100) -> sac.Replay:
    """Row i holds i everywhere, and is terminal where i is a multiple of 3."""
    replay = sac.Replay(capacity, 4, 1)
    for rows in np.array_split(np.arange(size), 3):
        column = rows.astype(np.float32)
        wide = np.repeat(column[:, None], 4, axis=1)
        replay.extend(wide, column[:, None], column, rows % 3 == 0, wide + 0.5)
    return replay


def test_the_replay_is_uniform_over_its_steps() -> None:
    torch.manual_seed(0)
    batch = filled(10).sample(20_000)
    rows = batch["action"].flatten()
    counts = torch.bincount(rows.long(), minlength=10)
    assert len(counts) == 10
    # Chi-square with 9 degrees of freedom: 27.9 is passed once in a thousand.
    assert float(((counts - 2000.0) ** 2 / 2000).sum()) < 27.9
    assert torch.equal(batch["observation"], rows[:, None].expand(-1, 4))
    assert torch.equal(batch["next", "observation"], rows[:, None].expand(-1, 4) + 0.5)
    assert torch.equal(batch["next", "reward"].flatten(), rows)
    assert torch.equal(batch["next", "terminated"].flatten(), rows % 3 == 0)
    assert torch.equal(batch["next", "done"], batch["next", "terminated"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"env": None}, "--online sac needs --env"),
        ({"episodes": (3,)}, "not for --episodes"),
        ({"steps": (3, 4)}, "one number of --steps"),
        ({"steps": (0,)}, "--steps 0"),
        ({"random_steps": 0}, "--random-steps 0"),
        ({"steps": (300,)}, "the first 300 steps are random .--random-steps., so SAC would learn"),
        ({"noise": (0.1,)}, "--noise and --stochastic are for --policy"),
        ({"env": "CartPole-v1"}, "only vectors"),
    ],
)
def test_errors_before_the_first_step(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        collect(tmp_path / "a.hdf5", **settings)
    assert not list(tmp_path.iterdir())


def test_the_curve_of_another_run_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.sac").mkdir()
    with pytest.raises(SystemExit, match="holds the learning curve of another run"):
        collect(tmp_path / "a.hdf5", steps=(320,))
