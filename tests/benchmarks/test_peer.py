"""The comparison with d3rlpy: its settings, its data, and its runs where it is installed."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import baselines
from benchmarks import peer
from benchmarks.results import CONTROL, read_runs
from iwsft import datasets
from iwsft.datasets import OfflineDataset
from iwsft.trajectory import (
    ACTION,
    NEXT_OBSERVATION,
    OBSERVATION,
    REWARD,
    TERMINATED,
    from_steps,
)

try:
    d3rlpy = peer.import_d3rlpy()
except ImportError:
    d3rlpy = None
needs_d3rlpy = pytest.mark.skipif(d3rlpy is None, reason=f"d3rlpy is not installed: {peer.INSTALL}")
PEERS = list(peer.APART)
# Fields of our settings that d3rlpy does not have; `steps` is the length of a run, not a setting.
UNTOLD = {
    "iql": set(),
    "awac": {"steps", "max_weight"},
    "td3-bc": {"steps"},
    "cql": {"steps", "least_gap"},
}


def published(algo: str, dataset: str = "hopper-medium-v2") -> Any:
    return baselines.algorithm(algo).published(dataset)[0]


def three_episodes() -> Any:
    """Two steps that end in a termination, three in a timeout, one cut off."""
    observation = torch.arange(12.0).reshape(6, 2)
    following = observation.roll(-1, 0)
    following[[1, 4, 5]] = torch.tensor([[-1.0, -2], [-3, -4], [-5, -6]])
    ended = torch.tensor([0, 1, 0, 0, 0, 0], dtype=torch.bool)
    return from_steps(
        {
            OBSERVATION: observation,
            ACTION: torch.linspace(-1, 1, 6).reshape(6, 1),
            NEXT_OBSERVATION: following,
            REWARD: torch.arange(1.0, 7).reshape(6, 1),
            TERMINATED: ended.reshape(6, 1),
        },
        torch.tensor([0, 0, 1, 1, 1, 2]),
    )


@pytest.fixture(scope="module")
def dataset(tiny_dataset: Path) -> OfflineDataset:
    return datasets.load(str(tiny_dataset))


# ---- settings


@pytest.mark.parametrize("algo", PEERS)
def test_every_setting_reaches_d3rlpy(algo: str) -> None:
    """A setting of ours that changes must change d3rlpy's config, or be named in UNTOLD."""
    # Lagrange's threshold is on, so that the rates of its multiplier are in use.
    base = published(algo, "antmaze-umaze-v2" if algo == "cql" else "hopper-medium-v2")
    config = peer.d3rlpy_config(algo, base)
    for field in dataclasses.fields(base):
        old = getattr(base, field.name)
        if isinstance(old, bool):
            new: Any = not old
        elif isinstance(old, str):
            new = "minus one"
        elif isinstance(old, tuple):
            new = (*old, 7)
        elif isinstance(old, int):
            new = old + 1
        else:
            new = old * 0.5 if old else 0.25
        changed = peer.d3rlpy_config(algo, dataclasses.replace(base, **{field.name: new}))
        assert (changed == config) == (field.name in UNTOLD[algo]), field.name


def test_iql_gets_the_papers_numbers() -> None:
    config = peer.d3rlpy_config("iql", published("iql"))
    params = config["params"]
    assert config["type"] == "iql"
    assert (params["expectile"], params["weight_temp"], params["max_weight"]) == (0.7, 3.0, 100.0)
    assert (params["gamma"], params["tau"], params["batch_size"]) == (0.99, 0.005, 256)
    assert params["actor_learning_rate"] == params["critic_learning_rate"] == 3e-4
    decay = params["actor_optim_factory"]["params"]["lr_scheduler_factory"]
    assert decay == {"type": "cosine_annealing", "params": {"T_max": 1_000_000}}
    assert params["reward_scaler"] == {"type": "return", "params": {"multiplier": 1000.0}}
    antmaze = peer.d3rlpy_config("iql", published("iql", "antmaze-umaze-v2"))["params"]
    assert antmaze["reward_scaler"] == {"type": "shift", "params": {"shift": -1.0}}
    kitchen = peer.d3rlpy_config("iql", published("iql", "kitchen-mixed-v0"))["params"]
    assert kitchen["actor_encoder_factory"]["params"]["dropout_rate"] == 0.1
    assert kitchen["critic_encoder_factory"]["params"]["dropout_rate"] is None


def test_cql_threshold_is_applied_after_the_weight() -> None:
    """multiplier x (weight x gap - threshold) is d3rlpy's multiplier x weight x (gap - its own)."""
    ours = published("cql", "antmaze-umaze-v2")
    params = peer.d3rlpy_config("cql", ours)["params"]
    gap = 3.7
    theirs = params["conservative_weight"] * (gap - params["alpha_threshold"])
    assert theirs == pytest.approx(ours.min_q_weight * gap - ours.lagrange_threshold)


@pytest.mark.parametrize("algo", PEERS)
def test_configs_are_json(algo: str) -> None:
    config = peer.d3rlpy_config(algo, published(algo))
    assert json.loads(json.dumps(config)) == config


# ---- data


def test_rows_hold_every_step_and_the_true_next_observation() -> None:
    out = peer.arrays(three_episodes())
    # A row after the timeout and one after the step where the data break off.
    np.testing.assert_array_equal(
        out["observations"],
        [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [-3, -4], [10, 11], [-5, -6]],
    )
    np.testing.assert_array_equal(out["rewards"][:, 0], [1, 2, 3, 4, 5, 0, 6, 0])
    np.testing.assert_allclose(out["actions"][:, 0], [-1, -0.6, -0.2, 0.2, 0.6, 0, 1, 0], atol=1e-6)
    np.testing.assert_array_equal(out["terminals"], [0, 1, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(out["timeouts"], [0, 0, 0, 0, 0, 1, 0, 1])
    assert {array.dtype for array in out.values()} == {np.dtype(np.float32)}


def test_data_that_d3rlpy_cannot_hold() -> None:
    torn = three_episodes()
    torn.get(NEXT_OBSERVATION)[2, 0] += 1
    with pytest.raises(ValueError, match=r"step 2 .* next observation that is not the next row"):
        peer.arrays(torn)
    further = three_episodes()
    further.get(TERMINATED)[3] = True
    with pytest.raises(ValueError, match=r"step 3 .* termination with further steps"):
        peer.arrays(further)


@needs_d3rlpy
def test_d3rlpy_reads_the_same_transitions(dataset: OfflineDataset) -> None:
    for trajectories in (three_episodes(), dataset.trajectories):
        read = peer.d3rlpy_data("td3-bc", trajectories)
        assert read.transition_count == len(trajectories)
        steps = [read.transition_picker(*read.buffer[i]) for i in range(len(trajectories))]
        ended = trajectories.get(TERMINATED).squeeze(-1).numpy()
        np.testing.assert_array_equal([step.terminal for step in steps], ended)
        for key, name in ((OBSERVATION, "observation"), (ACTION, "action"), (REWARD, "reward")):
            theirs = np.stack([getattr(step, name) for step in steps])
            np.testing.assert_array_equal(theirs, trajectories.get(key).numpy())
        # At a termination d3rlpy has zeros, which nothing reads.
        following = np.stack([step.next_observation for step in steps])
        np.testing.assert_array_equal(
            following[~ended], trajectories.get(NEXT_OBSERVATION).numpy()[~ended]
        )


# ---- the command


@pytest.fixture
def command(tiny_dataset: Path, tmp_path: Path) -> Callable[..., None]:
    def run(*algo: str, **changes: Any) -> None:
        values = {"steps": 5, "eval_episodes": 2, "out": tmp_path / "runs" / "d3rlpy"}
        peer.main(peer.Options(algo=algo, dataset=str(tiny_dataset), **{**values, **changes}))

    return run


def test_without_d3rlpy_the_error_says_how_to_install_it(
    command: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "d3rlpy", None)
    with pytest.raises(SystemExit, match=r"error: d3rlpy can't be imported .* pip install"):
        command("iql")


@pytest.mark.parametrize(
    ("algo", "changes", "message"),
    [
        ("dt", {}, "d3rlpy has no 'dt' like ours; it has iql, awac"),
        ("sft-q", {}, "d3rlpy has no 'sft-q' like ours; it has iql, awac"),
        ("iql", {"steps": 0}, "--steps 0"),
        ("iql", {"eval_episodes": 0}, "--eval-episodes 0"),
    ],
)
def test_wrong_options(command: Callable[..., None], algo: str, changes: Any, message: str) -> None:
    with pytest.raises(SystemExit, match=f"error: {message}"):
        command(algo, **changes)


@needs_d3rlpy
def test_runs_are_variants_in_the_report(command: Callable[..., None], tmp_path: Path) -> None:
    command(*PEERS)
    runs = {run.algo: run for run in read_runs(tmp_path / "runs", CONTROL)}
    assert sorted(runs) == sorted(f"d3rlpy/{algo}" for algo in PEERS)
    for algo, run in runs.items():
        assert run.result["steps"] == 5 and run.result["published_steps"] == 1_000_000
        assert run.result["episodes"] == len(run.result["episode_returns"]) == 2
        assert run.metrics[-1]["step"] == 5
        assert run.versions["d3rlpy"] == d3rlpy.__version__
        assert run.config["settings"]["d3rlpy"]["params"]["gamma"] == 0.99, algo


@needs_d3rlpy
def test_seeds_repeat_and_nothing_is_overwritten(
    command: Callable[..., None], tmp_path: Path
) -> None:
    command("iql")
    (path,) = tmp_path.rglob("result.json")
    before = path.read_text()
    with pytest.raises(SystemExit, match="error: .*a run is there already; pass --resume"):
        command("iql")
    command("iql", resume=True)
    assert path.read_text() == before
    with pytest.raises(SystemExit, match=r"other settings: .*steps=5 \(now 30\)"):
        command("iql", resume=True, steps=30)
    # Cut off before its result: done again from the start, with the same draws.
    path.unlink()
    command("iql", resume=True)
    again = json.loads(path.read_text())["episode_returns"]
    assert again == json.loads(before)["episode_returns"]
    command("iql", out=tmp_path / "other", seeds=(1,))
    (other,) = (tmp_path / "other").rglob("result.json")
    assert json.loads(other.read_text())["episode_returns"] != again
