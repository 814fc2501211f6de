"""Roll-outs into datasets, checked against stepping the environments by hand."""

from __future__ import annotations

import json
import multiprocessing
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import gymnasium_robotics
import h5py
import numpy as np
import pytest
import torch

from benchmarks.collect.__main__ import main
from benchmarks.collect.options import Options
from benchmarks.d4rl.options import name_of
from iwsft import datasets, environments
from iwsft.evaluation import episode_seeds, evaluate
from iwsft.trajectory import lengths

gym.register_envs(gymnasium_robotics)
# The hand steps gymnasium's own environments, advice and checks included.
pytestmark = pytest.mark.filterwarnings("ignore:.*out of date", "ignore:.*share an object")
Fields = dict[str, np.ndarray]

# The modules that --policy and --env name.
MODULE = '''
import os, signal
import gymnasium as gym
import torch
from tensordict.nn import TensorDictModule
from iwsft import GaussianPolicy

def hopper():
    torch.manual_seed(1)
    return GaussianPolicy(11, 3, hidden=(16,))

def other():
    torch.manual_seed(2)
    return GaussianPolicy(11, 3, hidden=(16,))

def still():
    return TensorDictModule(lambda o: 0 * o[:, :1], in_keys=["observation"], out_keys=["action"])

made = still()

def nan():
    return TensorDictModule(lambda o: torch.where(o[:, :1].abs() > 0, torch.nan, 0.0),
                            in_keys=["observation"], out_keys=["action"])

class Remembering(torch.nn.Module):
    """Acts on the rewards and steps of its episode; noisy in training mode."""
    def forward(self, observation, first, reward):
        start = torch.zeros(len(first), 2)
        told = torch.cat([reward, torch.ones_like(reward)], 1)
        self.memory = torch.where(first, start, getattr(self, "memory", start) + told)
        noise = torch.randn(len(first), 3) if self.training else 0
        return torch.tanh(self.memory.mean(1, keepdim=True) / 9 + observation[:, :3]) + noise

def remembering():
    keys = ["observation", "is_init", "reward"]
    return TensorDictModule(Remembering(), in_keys=keys, out_keys=["action"])

def halves():
    return TensorDictModule(lambda o: (o[:, :3] / 2).to(torch.bfloat16),
                            in_keys=["observation"], out_keys=["action"])

def reads_goal():
    return TensorDictModule(lambda o: o, in_keys=["goal"], out_keys=["action"])

def needs(something):
    return None

def number():
    return 3

def killed():
    """As ``hopper``, but the process gets a SIGKILL at the 300th call."""
    policy, calls = hopper(), [0]
    def count(*_):
        calls[0] += 1
        if calls[0] == 300 and "KILL" in os.environ:
            os.kill(os.getpid(), signal.SIGKILL)
    policy.register_forward_pre_hook(count)
    return policy

class Endless(gym.Env):
    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Box(-1, 1, (1,))
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 2).astype("float32"), {}
    def step(self, action):
        return self.np_random.uniform(-1, 1, 2).astype("float32"), 1.0, False, False, {}

if "Endless-v0" not in gym.registry:
    gym.register("Endless-v0", Endless)
'''


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_of_tests.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("mine_of_tests", None)
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))


def collect(out: Path | str, *policy: str, **settings: Any) -> None:
    settings.setdefault("env", "Hopper-v4")
    main(Options(out=str(out), policy=policy, **settings))


def fields(path: Path) -> Fields:
    with h5py.File(path) as file:
        out = {key: file[key][()] for key in file if key != "infos"}
        out |= {key: file[f"infos/{key}"][()] for key in file.get("infos", ())}
    return out


def sources(path: Path) -> list[dict[str, Any]]:
    with h5py.File(path) as file:
        return json.loads(file.attrs["sources"])


def ends_of(data: Fields) -> np.ndarray:
    return np.flatnonzero(data["terminals"] | data["timeouts"]) + 1


def replay_by_hand(
    data: Fields, env: gym.Env[Any, Any], seeds: list[int], flat: Callable[[Any], Any] = np.asarray
) -> None:
    """Step the recorded actions in ``env``: everything recorded must come again."""
    start = 0
    for seed, stop in zip(seeds, ends_of(data), strict=True):
        observation, _ = env.reset(seed=seed)
        total = 0.0
        for i in range(start, stop):
            assert np.array_equal(np.float32(flat(observation)), data["observations"][i])
            observation, reward, terminated, truncated, info = env.step(data["actions"][i])
            assert np.array_equal(np.float32(flat(observation)), data["next_observations"][i])
            assert data["terminals"][i] == terminated
            assert data["timeouts"][i] == (truncated and not terminated)
            if "success" in info:
                assert data["success"][i] == info["success"]
            total += float(reward)
        assert total == pytest.approx(data["rewards"][start:stop].sum(dtype=np.float64), rel=1e-6)
        start = stop
    assert start == len(data["rewards"])


def test_a_policy_by_hand_and_as_evaluated(tmp_path: Path) -> None:
    """40 episodes: more than one group."""
    out = tmp_path / "a.hdf5"
    collect(out, "mine_of_tests:hopper", episodes=(40,), seed=5)
    data = fields(out)
    replay_by_hand(data, gym.make("Hopper-v4"), episode_seeds(5, 40))
    import mine_of_tests  # type: ignore[import-not-found]

    policy = mine_of_tests.hopper()
    result = evaluate(policy, "Hopper-v4", episodes=40, seed=5)
    starts = np.append(0, ends_of(data)[:-1])
    assert np.diff(np.append(0, ends_of(data))).tolist() == result.lengths
    np.testing.assert_allclose(np.add.reduceat(data["rewards"], starts), result.returns, rtol=1e-5)
    with torch.no_grad():
        means = policy.module[0](torch.from_numpy(data["observations"]))[0].clamp(-1, 1)
    np.testing.assert_allclose(data["actions"], means, atol=1e-5)
    loaded = datasets.load(out)
    assert loaded.env_id == "Hopper-v4"
    assert lengths(loaded.trajectories).tolist() == result.lengths
    assert not (tmp_path / "a.hdf5.partial").exists()


@pytest.mark.parametrize("name", ["remembering", "halves"])
def test_policies_with_a_memory_or_in_bfloat16_act_as_evaluated(tmp_path: Path, name: str) -> None:
    import mine_of_tests

    out = tmp_path / "a.hdf5"
    collect(out, f"mine_of_tests:{name}", episodes=(35,), seed=1)
    data, policy = fields(out), getattr(mine_of_tests, name)()
    # Other neighbours, and a row's next episode after its last: the same episodes.
    result = evaluate(policy, "Hopper-v4", episodes=35, seed=1, num_envs=4)
    ends = ends_of(data)
    assert np.diff(ends, prepend=0).tolist() == result.lengths
    totals = np.add.reduceat(data["rewards"], np.append(0, ends[:-1]))
    np.testing.assert_allclose(totals, result.returns, rtol=1e-5)


def test_several_policies_and_minari(tmp_path: Path) -> None:
    """The same numbers in both layouts; sources are in the order of the episodes."""
    names = ("mine_of_tests:hopper", "random", "mine_of_tests:other")
    collect(tmp_path / "a.hdf5", *names, episodes=(3, 2, 1), noise=(0.2,))
    collect("minari:lab/hop/x-v0", *names, episodes=(3, 2, 1), noise=(0.2,))
    assert [(s["policy"], s["noise"], s["episodes"]) for s in sources(tmp_path / "a.hdf5")] == [
        ("mine_of_tests:hopper", 0.2, 3),
        ("random", 0.0, 2),
        ("mine_of_tests:other", 0.2, 1),
    ]
    replay_by_hand(fields(tmp_path / "a.hdf5"), gym.make("Hopper-v4"), episode_seeds(0, 6))
    first, second = datasets.load(tmp_path / "a.hdf5"), datasets.load("minari:lab/hop/x-v0")
    assert second.name == name_of("minari:lab/hop/x-v0")
    assert first.fingerprint == second.fingerprint
    assert second.env_id == "Hopper-v4"


def test_steps_are_reached_in_whole_episodes(tmp_path: Path) -> None:
    collect(tmp_path / "a.hdf5", "random", "mine_of_tests:hopper", steps=(300, 50))
    ends = ends_of(fields(tmp_path / "a.hdf5"))
    first = sources(tmp_path / "a.hdf5")[0]["episodes"]
    assert ends[first - 2] < 300 <= ends[first - 1]
    assert ends[-2] - ends[first - 1] < 50 <= ends[-1] - ends[first - 1]


def test_noise_and_sampled_actions(tmp_path: Path) -> None:
    """Both leave the mean where it was; an episode does not depend on how many follow."""
    import mine_of_tests

    policy = mine_of_tests.hopper()
    for name, kind in (("noise", {"noise": (0.1,)}), ("draws", {"stochastic": True})):
        collect(tmp_path / f"{name}.hdf5", "mine_of_tests:hopper", episodes=(40,), **kind)
        collect(tmp_path / f"{name}-few.hdf5", "mine_of_tests:hopper", episodes=(3,), **kind)
        data, few = fields(tmp_path / f"{name}.hdf5"), fields(tmp_path / f"{name}-few.hdf5")
        for key in few:
            np.testing.assert_array_equal(data[key][: len(few[key])], few[key])
        with torch.no_grad():
            mean = policy.module[0](torch.from_numpy(data["observations"]))[0].numpy()
        # Only where clipping is far: four standard deviations inside the bounds.
        std = 0.1 if name == "noise" else 1.0
        inside = np.abs(mean) < 1 - 4 * std if name == "noise" else np.ones_like(mean, bool)
        spread = (data["actions"] - mean)[inside]
        if name == "noise":
            assert spread.size > 500
            assert abs(spread.mean()) < 5 * std / np.sqrt(spread.size)
            assert abs(spread.std() / std - 1) < 5 / np.sqrt(2 * spread.size)
        else:
            # A third of standard normal draws around 0 leave [-1, 1] and are clipped onto it.
            assert 0.2 < (np.abs(data["actions"]) == 1).mean() < 0.5


def test_time_limits_are_timeouts_with_the_true_next_observation(tmp_path: Path) -> None:
    out = tmp_path / "a.hdf5"
    settings: dict[str, Any] = {"env": "InvertedPendulum-v4", "max_episode_steps": 5}
    collect(out, "mine_of_tests:still", episodes=(3,), **settings)
    data = fields(out)
    assert ends_of(data).tolist() == [5, 10, 15]
    assert data["timeouts"].sum() == 3
    assert not data["terminals"].any()
    env = gym.make("InvertedPendulum-v4", max_episode_steps=5)
    replay_by_hand(data, env, episode_seeds(0, 3))


def test_antmaze_and_kitchen(tmp_path: Path) -> None:
    few: dict[str, Any] = {"max_episode_steps": 6, "episodes": (2,)}
    maze = tmp_path / "maze.hdf5"
    collect(maze, "random", env="AntMaze_UMaze-v4", env_arg=("continuing_task=False",), **few)
    env = gym.make("AntMaze_UMaze-v4", continuing_task=False, max_episode_steps=6)
    data = fields(maze)
    assert data["observations"].shape == (12, 29)
    assert "success" in data
    replay_by_hand(data, env, episode_seeds(0, 2), environments.flattener(env))
    assert lengths(datasets.load(maze).trajectories).tolist() == [6, 6]

    kitchen = tmp_path / "kitchen.hdf5"
    tasks = "['microwave', 'kettle']"
    collect(
        kitchen, "random", env="FrankaKitchen-v1", env_arg=(f"tasks_to_complete={tasks}",), **few
    )
    env = gym.make(
        "FrankaKitchen-v1", tasks_to_complete=["microwave", "kettle"], max_episode_steps=6
    )
    data = fields(kitchen)
    assert data["observations"].shape == (12, 60)
    replay_by_hand(data, env, episode_seeds(0, 2), environments.flattener(env))
    assert datasets.load(kitchen).env_id == "FrankaKitchen-v1"


def test_a_killed_collection_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A SIGKILL in the middle: --resume ends in the bytes of a collection without one."""
    settings: dict[str, Any] = {"noise": (0.1,), "stochastic": True, "seed": 2}
    names, counts = ("mine_of_tests:hopper", "mine_of_tests:killed"), (40, 200)
    killed, whole = tmp_path / "killed.hdf5", tmp_path / "whole.hdf5"
    monkeypatch.setenv("KILL", "1")
    given = {"episodes": counts, "part_steps": 500, **settings}
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=collect, args=(killed, *names), kwargs=given)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    monkeypatch.delenv("KILL")
    assert not killed.exists()
    assert len(list((tmp_path / "killed.hdf5.partial").glob("part-*.npz"))) >= 2
    with pytest.raises(SystemExit, match="holds the beginning of this dataset; pass --resume"):
        collect(killed, *names, episodes=counts, **settings)
    with pytest.raises(
        SystemExit, match=r"with other settings: noise=\[0.1, 0.1\] \(now \[0.3, 0.3\]\)"
    ):
        collect(killed, *names, episodes=counts, resume=True, **{**settings, "noise": (0.3,)})
    collect(killed, *names, episodes=counts, resume=True, part_steps=900, **settings)
    collect(whole, *names, episodes=counts, **settings)
    assert killed.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "killed.hdf5.partial").exists()
    # A kill while the parts are removed, after the dataset is written, leaves some of them.
    (tmp_path / "killed.hdf5.partial").mkdir()
    (tmp_path / "killed.hdf5.partial" / "part-000001.npz").write_bytes(b"")
    collect(killed, *names, episodes=counts, resume=True, **settings)
    assert killed.read_bytes() == whole.read_bytes()
    assert not (tmp_path / "killed.hdf5.partial").exists()


def test_resume_of_a_finished_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "a.hdf5"
    collect(out, "random", episodes=(2,))
    before = out.read_bytes()
    collect(out, "random", episodes=(2,), resume=True)
    assert "is finished; nothing to do" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="exists; delete it or choose another --out"):
        collect(out, "random", episodes=(3,))
    assert out.read_bytes() == before


def test_a_full_disk(tmp_path: Path, full_disk: Callable[[int], Any]) -> None:
    """What is collected stays, and the same command continues from it."""
    out, whole = tmp_path / "a.hdf5", tmp_path / "b.hdf5"
    settings: dict[str, Any] = {"episodes": (70,), "part_steps": 500}
    with full_disk(60_000), pytest.raises(SystemExit, match="no space left to write"):
        collect(out, "random", **settings)
    assert not out.exists()
    collect(out, "random", resume=True, **settings)
    collect(whole, "random", **settings)
    assert out.read_bytes() == whole.read_bytes()


H = "mine_of_tests:hopper"


@pytest.mark.parametrize(
    ("policy", "settings", "message"),
    [
        ((), {}, "give either --policy"),
        ((H,), {"online": "sac"}, "give either --policy"),
        ((H,), {"episodes": ()}, "give either --episodes or --steps"),
        ((H,), {"steps": (9,)}, "give either --episodes or --steps"),
        ((H,), {"episodes": (1, 2)}, r"\[1, 2\] for 1 policies"),
        ((H,), {"episodes": (0,)}, "at least 1"),
        ((H,), {"noise": (-0.1,)}, "--noise -0.1 must not be negative"),
        ((H,), {"noise": (float("nan"),)}, "--noise nan"),
        (("random",), {"noise": (0.1,)}, "those of 'random' are uniform"),
        ((H,), {"seed": -1}, "--seed -1"),
        ((H,), {"part_steps": 0}, "--part-steps 0"),
        ((H,), {"max_episode_steps": 0}, "--max-episode-steps 0"),
        ((H,), {"env": None}, "environment of --policy mine_of_tests:hopper is not known"),
        ((H,), {"env": "Hoper-v4"}, r"unknown environment 'Hoper-v4'\. Did you mean Hopper-v4"),
        ((H,), {"env": "Walker2d-v4"}, r"cannot act on Walker2d-v4, whose observations.*size 17"),
        (("mine_of_tests:still",), {}, r"gives actions of shape \(1,\), Hopper-v4 takes \(3,\)"),
        ((H,), {"env": "CartPole-v1"}, r"CartPole-v1 has the action space Discrete\(2\)"),
        ((H,), {"env": "mine_of_tests:Endless-v0"}, "may never end.*--max-episode-steps"),
        ((H,), {"env_arg": ("speed=3",)}, "Hopper-v4 does not take {'speed': 3}"),
        ((H,), {"env_arg": ("speed",)}, "--env-arg speed: it reads NAME=VALUE"),
        ((H,), {"env_arg": ("healthy_reward=x",)}, "Hopper-v4 fails at its first step .TypeErr"),
        ((H,), {"env_arg": ("reset_noise_scale=-1",)}, "Hopper-v4 fails at its first step .*-arg"),
        ((H,), {"env_arg": ("max_episode_steps=5",), "max_episode_steps": 3}, "_steps once"),
        ((":policy",), {}, "--policy :policy: Empty module name"),
        (("nowhere/seed-0",), {}, "nowhere/seed-0: no policy there; give the folder of a"),
        (("tests",), {}, "--policy tests: no policy there; give the folder of a finished run"),
        (("mine_of_tests:lost",), {}, "has no attribute 'lost'"),
        (("no_such_module:policy",), {}, "No module named 'no_such_module'"),
        (("mine_of_tests:number",), {}, "gave int"),
        (("mine_of_tests:made",), {}, "must be a function that returns one"),
        (("mine_of_tests:needs",), {}, "is called without arguments"),
        (("mine_of_tests:reads_goal",), {}, r"reads \['goal'\]"),
        ((H,), {"out": "data.npz"}, "--out data.npz: neither a file ending in"),
        ((H,), {"out": "minari:x"}, "'x' is not a Minari id"),
    ],
)
def test_errors_before_the_first_step(
    tmp_path: Path, policy: tuple[str, ...], settings: dict[str, Any], message: str
) -> None:
    given = {"out": tmp_path / "a.hdf5", "episodes": (1,)} | settings
    if settings.get("online"):
        given["episodes"] = ()
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        collect(given.pop("out"), *policy, **given)
    assert not list(tmp_path.glob("*.partial"))
    assert not list(tmp_path.glob("*.hdf5"))


def test_a_policy_that_gives_nan(tmp_path: Path) -> None:
    env = "InvertedPendulum-v4"
    with pytest.raises(SystemExit, match=r"nan gave the action \[nan\] at step 0 of the episode"):
        collect(tmp_path / "a.hdf5", "mine_of_tests:nan", episodes=(1,), env=env)


def test_an_environment_of_ones_own(tmp_path: Path) -> None:
    out, env = tmp_path / "a.hdf5", "mine_of_tests:Endless-v0"
    collect(out, "random", env=env, max_episode_steps=7, episodes=(2,))
    data = datasets.load(out)
    assert data.env_id == env
    assert lengths(data.trajectories).tolist() == [7, 7]
