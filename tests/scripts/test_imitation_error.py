"""The distance to noise-free actions, on data whose actions are known."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torchrl.envs.utils import ExplorationType, set_exploration_type

from benchmarks.collect.policy_file import ArrayPolicy
from benchmarks.d4rl.__main__ import main
from benchmarks.d4rl.options import Options
from iwsft import curate, datasets, load_policy
from iwsft.datasets.write import Provenance, to_hdf5
from iwsft.trajectory import ACTION, OBSERVATION, TRAJ_IDS
from scripts.imitation_error import EPISODES, POLICIES, measure, of_actions


def test_error_and_slope_of_known_actions() -> None:
    noise_free = np.array([[1.0, 0.0], [0.0, 2.0]], np.float32)
    assert of_actions(noise_free, noise_free) == (0.0, 1.0)
    # Half as strong: (1 / 4 + 4 / 4) / 2.
    assert of_actions(noise_free / 2, noise_free) == (0.625, 0.5)


def test_each_trajectory_is_compared_with_the_policy_that_made_it(tmp_path: Path) -> None:
    data = datasets.load("hopper-replay-mini").trajectories
    curated = curate(data, cuts=(90, 95, 98), ties="rank")
    # Both policies made some of the curated trajectories.
    first, number = int(curated[TRAJ_IDS].float().mean()), int(data[TRAJ_IDS].max()) + 1
    parts = [first, number - first]
    names = ["hopper-sac.npz", "hopper-tqc.npz"]
    policies = [ArrayPolicy(dict(np.load(POLICIES / name))) for name in names]
    second = data[TRAJ_IDS] >= parts[0]
    assert 0 < int((curated[TRAJ_IDS] >= parts[0]).sum()) < len(curated)
    with torch.no_grad():
        actions = [policy(data[OBSERVATION]) for policy in policies]
    data[ACTION] = torch.where(second.unsqueeze(-1), actions[1], actions[0]).clamp(-1, 1)
    sources = [
        {"policy": name, "noise": 0.0, "episodes": n} for name, n in zip(names, parts, strict=True)
    ]
    file = tmp_path / "hopper.hdf5"
    to_hdf5(file, data, Provenance("Hopper-v4", 0, sources))
    options = Options(
        algo=("iw-sft-q",),
        dataset=(str(file),),
        seeds=(0, 1),
        temperature=0.0,
        variant="k0",
        steps=4,
        reference_steps=4,
        eval_episodes=EPISODES,
        curve_episodes=0,
        out=tmp_path,
        jobs=1,
    )
    main(options)
    runs = [tmp_path / f"k0/d4rl/hopper/iw-sft-q/seed-{seed}" for seed in options.seeds]

    (record,) = measure(runs, [1.0])
    assert (record["algo"], record["seeds"]) == ("k0/iw-sft-q", [0, 1])
    # The actions of the data are noise-free.
    assert record["noise"] == pytest.approx(0.0, abs=1e-9)
    assert record["noise_slope"] == pytest.approx(1.0)
    wanted = curate(data, cuts=(90, 95, 98), ties="rank")
    for seed, run in enumerate(runs):
        with torch.no_grad(), set_exploration_type(ExplorationType.DETERMINISTIC):
            own = load_policy(run).module(wanted.select(OBSERVATION))[ACTION].clamp(-1, 1)
        errors = (own - wanted[ACTION]).square().sum(-1)
        assert record["error"][seed] == pytest.approx(errors.mean().item(), rel=1e-4)
        score = json.loads((run / "result.json").read_text())["normalized_score"]
        assert record["score"][seed] == score == record["scaled"]["1"][seed]
    with pytest.raises(ValueError, match="two runs of this seed"):
        measure([runs[0], runs[0]], [])
