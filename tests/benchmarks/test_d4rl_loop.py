"""The loop for control: files against stepping by hand, first weights, replay, kills, bad input."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torch import Tensor
from torch.distributions import Normal

from benchmarks.d4rl.__main__ import loop
from benchmarks.d4rl.loop import curated_data
from iwsft import GaussianPolicy, ImportanceWeightedMLE, checkpoint, environments, metrics
from iwsft.evaluation import episode_seeds
from iwsft.loop import Round, table
from iwsft.presets import ImportanceWeights
from iwsft.proposals import reweight
from iwsft.trained_policy import TrainedPolicy, load_policy, save_policy
from iwsft.weights import ClipRatio

# A point that actions move towards a goal, with actions in [-2, 2].
MODULE = """
import gymnasium as gym
import numpy as np

class Point(gym.Env):
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))
    action_space = gym.spaces.Box(-2, 2, (1,))
    def __init__(self, reward=None):
        self.reward = reward
    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.normal(size=2).astype("float32")
        return self.place, {}
    def step(self, action):
        self.place = self.place + np.float32([action[0], 0])
        reward = -abs(float(self.place[0] - self.place[1]))
        return self.place, reward if self.reward is None else float(self.reward), False, False, {}

if "Point-v0" not in gym.registry:
    gym.register("Point-v0", Point, max_episode_steps=5)
    gym.register("EndlessPoint-v0", Point)
"""
ENV = "points_of_tests:Point-v0"
TINY = ("--rounds", "2", "--episodes-per-round", "6", "--steps", "4", "--eval-episodes", "3")
Run = Callable[..., list[dict[str, Any]]]


def merged(*defaults: str, flags: Sequence[str]) -> list[str]:
    """Pairs of option and value that ``flags`` do not give, and the flags."""
    pairs = zip(defaults[::2], defaults[1::2], strict=True)
    return [word for pair in pairs if pair[0] not in flags for word in pair] + [*flags]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """``run(flag, ...)``: the command on a start of random weights; its table."""
    (tmp_path / "points_of_tests.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    torch.manual_seed(0)
    save_policy(
        tmp_path / "start",
        TrainedPolicy(GaussianPolicy(2, 1), observation_dim=2),
        algo="bc",
        action_dim=1,
    )

    def call(*flags: str, env: str = ENV, out: str = "loop") -> list[dict[str, Any]]:
        given = ["--start", str(tmp_path / "start"), *(["--env", env] if env else [])]
        loop(merged(*given, *TINY, "--out", str(tmp_path / out), flags=flags))
        return table(tmp_path / out)

    return call


def read(path: Path) -> dict[str, Any]:
    return checkpoint.read(path, "")


def of_episodes(data: dict[str, Any], key: str) -> list[Any]:
    """An entry's value for each episode, which is the same on all of its steps."""
    ids = data["collector/traj_ids"]
    return [data[key][ids == episode][0].item() for episode in ids.unique()]


def steps_of(data: dict[str, Any]) -> list[tuple[str, float]]:
    """Observation and action of each step, and its reference."""
    rows = torch.cat([data["observation"], data["action"]], -1).tolist()
    return [(str(row), ref) for row, ref in zip(rows, data["ref_log_prob"].tolist(), strict=True)]


def test_episodes_and_references_are_those_of_the_policy(run: Run, tmp_path: Path) -> None:
    """Steps by hand give the same rewards; densities are torch's, of actions as they were drawn."""
    run("--algo", "iw-sft", "--seed", "3")
    for number in (1, 2):
        one = Round(number, tmp_path / "loop", str(tmp_path / "start"))
        data = read(one.folder / "episodes-0.pt")
        policy: Any = load_policy(one.policy).module
        mean, scale = policy.head(data["observation"])
        drawn = data["action"]
        expected = Normal(mean, scale).log_prob(drawn).sum(-1)
        torch.testing.assert_close(data["ref_log_prob"], expected.detach())
        assert float(drawn.abs().max()) > 1
        seeds, returns = episode_seeds(episode_seeds(3, 2)[number - 1], 6), []
        env = environments.make(ENV)
        for episode, seed in enumerate(seeds):
            env.reset(seed=seed)
            steps = data["collector/traj_ids"] == episode
            taken = 2 * drawn[steps].clamp(-1, 1).numpy()
            rewards = [float(env.step(action)[1]) for action in taken]
            np.testing.assert_allclose(data["next/reward"][steps][:, 0], rewards, rtol=1e-5)
            returns.append(sum(rewards))
        scores = json.loads((one.folder / "scores.json").read_text())
        np.testing.assert_allclose(scores["returns"], returns, rtol=1e-5)
        assert scores["lengths"] == [5] * 6
        # Without replay the first update has weights of exactly 1.
        first = metrics.read(one.folder / "training" / metrics.FILE)[0]
        assert (first["step"], first["ESS"], first["weight_max"]) == (1, 1, 1)


def test_replay_keeps_the_best_of_the_last_rounds_with_their_own_references(
    run: Run, tmp_path: Path
) -> None:
    flags = ("--algo", "iw-sft-step", "--rounds", "3", "--keep-rounds", "1", "--top", "60")
    rows = run(*flags, "--learning-rate", "0.01", "--steps", "10")
    start = str(tmp_path / "start")
    rounds = [Round(number, tmp_path / "loop", start) for number in (1, 2, 3)]
    scores = [json.loads((one.folder / "scores.json").read_text())["returns"] for one in rounds]
    for number, pool in ((1, [(1, x) for x in scores[0]]), (3, [])):
        pool = pool or [(2, x) for x in scores[1]] + [(3, x) for x in scores[2]]
        best = sorted(pool, key=lambda pair: -pair[1])[: math.ceil(0.6 * len(pool))]
        curated = read(rounds[number - 1].folder / "curated.pt")
        ids, rewards = curated["collector/traj_ids"], curated["next/reward"].double()
        returns = [float(rewards[ids == episode].sum()) for episode in ids.unique()]
        kept = zip(of_episodes(curated, "round"), returns, strict=True)
        assert [*kept] == [pair for pair in pool if pair in best]
        row = rows[number]
        replayed = sum(origin < number for origin, _ in best)
        counts = row["pool"], row["kept_episodes"], row["replayed"]
        assert counts == (len(pool), len(best), replayed)
        assert row["kept"] == len(best) / len(pool)
        assert row["by_multiplicity"] == {"1": len(best)}
        assert row["return_kept"] == pytest.approx(np.mean([x for _, x in best]))
    # Both rounds are in the last pool, or this shows nothing.
    assert 0 < rows[3]["replayed"] < rows[3]["kept_episodes"]
    own = curated["round"] == 3
    trained = load_policy(rounds[2].policy)
    policy: Any = trained.module
    data = curated_data(rounds[2], trained)
    weights = ImportanceWeights(step=(ClipRatio(0.2, 1.8),), reduce=None)
    loss = ImportanceWeightedMLE(policy, importance_weights=weights, proposal="cached")
    written = reweight(data, loss).exp()
    assert bool((written[own] == 1).all())
    earlier = read(rounds[1].folder / "episodes-0.pt")
    # A step is known by its observation and action.
    known = dict(steps_of(earlier))
    references = torch.tensor([known.get(key, math.nan) for key, _ in steps_of(curated)])
    assert references.isnan().tolist() == own.tolist()
    steps = TensorDict({key: curated[key] for key in ("observation", "action")}, [len(own)])
    ratio = (policy.log_prob(steps).detach() - references).exp()
    torch.testing.assert_close(written[~own], ratio.clamp(0.2, 1.8)[~own])
    assert bool((written[~own] != 1).any())


def _killed_at(write: int, words: list[str]) -> None:
    """Run the command in a process that kills itself before its ``write``-th large file."""
    original, left = checkpoint.write, [write]

    def counted(path: Path, content: dict[str, Any]) -> None:
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        original(path, content)

    checkpoint.write = counted
    sys.argv = ["d4rl", "loop"]
    loop(words)


def content_of(folder: Path) -> dict[str, Any]:
    """All that a loop wrote, without times."""
    content: dict[str, Any] = {}
    for path in sorted(folder.rglob("*.*")):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".jsonl":
            content[name] = [{**row, "wall_seconds": 0} for row in metrics.read(path)]
        elif path.suffix == ".pt":
            whole = read(path)
            whole = whole.get("state", whole)
            whole = {k: v for k, v in whole.items() if k not in ("wall_seconds", "cpu_seconds")}
            content[name] = flat(whole)
        elif path.suffix == ".json" and name != "config.json":
            content[name] = {**json.loads(path.read_text()), "seconds": 0}
    return content


def flat(tree: Any) -> Any:
    """Tensors as lists, so that trees can be compared."""
    if isinstance(tree, Tensor):
        return tree.tolist()
    if isinstance(tree, dict):
        return {key: flat(value) for key, value in tree.items()}
    return [*map(flat, tree)] if isinstance(tree, (list, tuple)) else tree


def test_kills_at_every_stage_end_in_the_same_files(
    run: Run, tmp_path: Path, tiny_dataset: Path
) -> None:
    flags = ["--start", f"bc:{tiny_dataset}", "--start-steps", "5", "--reference-steps", "5"]
    flags += ["--episodes-per-round", "33", "--rounds", "1", "--max-episode-steps", "9"]
    run(*flags, env="", out="whole")
    # A clone is another policy than the one that acted.
    first = metrics.read(tmp_path / "whole/round-1/training" / metrics.FILE)[0]
    assert first["ESS"] < 1 < first["weight_max"]
    words = merged(*TINY, "--out", str(tmp_path / "killed"), flags=[*flags, "--resume"])
    fork = multiprocessing.get_context("fork")
    kills = 0
    for _ in range(30):
        process = fork.Process(target=_killed_at, args=(3, words))
        process.start()
        process.join()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills > 5
    assert content_of(tmp_path / "killed") == content_of(tmp_path / "whole")


@pytest.mark.parametrize(
    ("flags", "env", "message"),
    [
        (("--start", "nowhere"), ENV, "--start nowhere: no policy.pt there; give a finished"),
        ((), "", "pass --env: the environment of --start .* is not known"),
        ((), "Pendulum-v1", "--start .* cannot act on Pendulum-v1, whose observations have size 3"),
        ((), "points_of_tests:EndlessPoint-v0", "may never end; pass --max-episode-steps"),
        (("--env-arg", "reward=nan"), ENV, "episode . of Point-v0 got the reward nan at step 1"),
        (("--algo", "iql"), ENV, "unknown algorithm 'iql'; .*one of sft, sft-q, iw-sft"),
        (("--start-steps", "3"), ENV, "--start-steps 3 is for --start bc:DATASET"),
        (("--algo", "sft", "--alpha", "0.5"), ENV, "--alpha 0.5 changes nothing in sft"),
        (("--algo", "sft", "--reference-steps", "5"), ENV, "5 changes nothing in sft"),
        (("--keep-rounds", "-1"), ENV, "--keep-rounds -1: at least 0"),
    ],
)
def test_bad_input_is_told_in_a_line(
    run: Run, flags: tuple[str, ...], env: str, message: str
) -> None:
    with pytest.raises(SystemExit, match=message) as error:
        run(*flags, env=env)
    assert "\n" not in str(error.value)


def test_a_start_whose_environment_imports_a_module_must_be_trusted(
    run: Run, tmp_path: Path
) -> None:
    policy = TrainedPolicy(GaussianPolicy(2, 1), "no_module_of_tests:Point-v0", observation_dim=2)
    save_policy(tmp_path / "other", policy, algo="bc", action_dim=1)
    start = ("--start", str(tmp_path / "other"))
    with pytest.raises(SystemExit, match="imports no_module_of_tests; pass --env, or --trust-env"):
        run(*start, env="")
    # Another environment does not need that of the start.
    run(*start)


def test_a_start_without_log_probs_is_refused(run: Run, tmp_path: Path) -> None:
    from baselines import algorithm

    td3_bc = algorithm("td3-bc")
    settings = td3_bc.Settings()
    policy = TrainedPolicy(td3_bc.policy(2, 1, settings), observation_dim=2)
    save_policy(tmp_path / "td3", policy, algo="td3-bc", action_dim=1, settings=settings)
    with pytest.raises(SystemExit, match=r"td3: its actions have no log-prob.*or from bc:DATASET"):
        run("--start", str(tmp_path / "td3"))


def test_equal_returns_end_the_loop_and_other_settings_are_refused(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = run("--env-arg", "reward=1")
    assert [row["round"] for row in rows] == [0, 1] and "policy" not in rows[1]
    assert "all 6 episodes have the return 5, so none is better" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=r"other settings: .*steps=4 \(now 5\)"):
        run("--env-arg", "reward=1", "--steps", "5", "--resume")
    with pytest.raises(SystemExit, match="a loop is there already; pass --resume"):
        run("--env-arg", "reward=1")


def test_a_round_reads_its_own_files_of_episodes_alone(run: Run, tmp_path: Path) -> None:
    """Copies that lie beside them change nothing, and one that is missing is named."""
    flags = ("--episodes-per-round", "33", "--keep-rounds", "1")
    run(*flags)
    whole, home = content_of(tmp_path / "loop"), tmp_path / "loop"
    episodes = home / "round-1/episodes-1.pt"
    copies = [episodes.with_name(name) for name in ("episodes-1 (1).pt", "episodes-2.pt")]
    for path in copies:
        shutil.copy(episodes, path)
    (home / "round-2/curate.json").unlink()
    (home / "round-2/curated.pt").unlink()
    run(*flags, "--resume")
    for path in copies:
        path.unlink()
    assert content_of(home) == whole
    kept = episodes.read_bytes()
    episodes.unlink()
    (home / "round-2/curate.json").unlink()
    with pytest.raises(SystemExit, match="episodes-1.pt is missing; put a copy of it back"):
        run(*flags, "--resume")
    episodes.write_bytes(kept)
    run(*flags, "--resume")
    assert content_of(home) == whole
