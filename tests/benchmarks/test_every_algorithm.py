"""Every algorithm of both packages on a problem with a known optimum: fit, act, save, load, resume.

The data are random actions. Cloning them acts 0; whatever improves on the data gets nearer to the
optimum, and by how much is known for some.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tracking import BEST, ENV_ID, STANDING, write_dataset

from baselines import BASELINES, Baseline, algorithm
from benchmarks.d4rl import settings as paper
from benchmarks.d4rl.options import (
    ALGORITHMS,
    RELATED,
    Options,
    check_options,
    choose_suite,
    name_of,
)
from benchmarks.d4rl.run import Run, Task, check_run, config_of
from benchmarks.d4rl.train import train_and_score
from benchmarks.runs import claim
from iwsft import load_policy
from iwsft.evaluation import episode_seeds
from iwsft.training import Row

EVERY = [*ALGORITHMS, *RELATED, *BASELINES]
# Others have the same policy as iw-sft-q, and these differ from bc, sft-q and iw-sft-q in the data.
EXPORTED = ["iw-sft-q", *BASELINES]
OTHER_DATA = {"bc-10", "sft", "iw-sft"}
EPISODES = 100
# Updates that suffice here: critics learn a function of state and action first.
STEPS = {"topr": 200, "awac": 150, "iql": 200, "td3-bc": 200, "rebrac": 200, "cql": 200, "dt": 150}
# Syncs q every 9 updates.
ROW = paper.FineTuning(lr=1e-3, warmup=10, alpha=0.8)
# The problem is small, and so are the networks; a tenth of CQL's penalty, whose scale is that of
# returns of thousands.
SMALLER: dict[str, dict[str, Any]] = {
    "awac": {"hidden": (64, 64), "lr": 3e-3},
    "iql": {"hidden": (64, 64), "lr": 3e-3},
    "td3-bc": {"hidden": (64, 64), "lr": 3e-3},
    "rebrac": {"hidden": (64, 64), "batch_size": 128, "actor_lr": 3e-3, "lr": 3e-3},
    "cql": {
        "actor_hidden": (64, 64),
        "critic_hidden": (64, 64),
        "actor_lr": 3e-3,
        "critic_lr": 3e-3,
        "min_q_weight": 1.0,
        "batch_size": 128,
    },
    "dt": {"width": 32, "layers": 2, "context": 2, "lr": 5e-3},
}
# Share of the way from standing still to the best policy that is made at least. The best tenth of
# the episodes still scatters around the optimum; TD3+BC and CQL weigh the data against Q.
SHARE = {"bc": -0.05, "awac": 0.5, "topr": 0.5}


@pytest.fixture(scope="module", autouse=True)
def smaller() -> Iterator[None]:
    """Published settings with smaller networks and batches."""

    def of(module: Baseline, changes: dict[str, Any]) -> Any:
        published = module.published

        def changed(dataset: str) -> tuple[Any, str]:
            settings, source = published(dataset)
            return replace(settings, **changes), source

        return changed

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(paper.FINE_TUNING_BATCH, "steps", 128)
        patch.setattr(paper, "find_fine_tuning", lambda *_: (ROW, "made for the test"))
        for name, changes in SMALLER.items():
            module = algorithm(name)
            patch.setattr(module, "published", of(module, changes))
        yield


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tracking") / "tracking.hdf5"
    write_dataset(path)
    return path


def start(algo: str, dataset: Path, out: Path, **values: Any) -> tuple[Run, Task]:
    """What the command does before a run."""
    standard = {
        "steps": STEPS.get(algo, 50),
        "reference_steps": 50,
        "eval_episodes": EPISODES,
        "curve_episodes": 0,
    }
    options = Options(algo=(algo,), out=out, **standard | values)
    check_options(options, choose_suite(options))
    task = Task.load(str(dataset), options.pretrain_dataset)
    name = name_of(str(dataset), options.pretrain_dataset)
    run = Run(name, algo, 0, options, str(dataset))
    task.check_environment()
    check_run(run, task)
    configs = {run: config_of(run, task)}
    claim(out / "d4rl", configs, same=("settings",), resume=configs if options.resume else ())
    return run, task


@pytest.fixture(scope="module")
def trained(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """``trained(algo)``: result and folder of a run, made once."""
    out = tmp_path_factory.mktemp("runs")
    done: dict[str, tuple[dict[str, Any], Path]] = {}

    def of(algo: str) -> tuple[dict[str, Any], Path]:
        if algo not in done:
            run, _ = start(algo, dataset, out)
            done[algo] = train_and_score([run], [lambda *_: None])[0], run.folder
        return done[algo]

    return of


@pytest.mark.parametrize("algo", EVERY)
def test_it_gets_as_near_to_the_optimum_as_its_rule_allows(trained: Any, algo: str) -> None:
    result, _ = trained(algo)
    made = (result["return_mean"] - STANDING) / (BEST - STANDING)
    print(algo, round(made, 3))
    assert made <= 1
    assert made >= SHARE.get(algo, 0.7)


@pytest.mark.parametrize("algo", EVERY)
def test_a_saved_policy_acts_like_the_trained_one(trained: Any, tmp_path: Path, algo: str) -> None:
    result, folder = trained(algo)
    policy = load_policy(folder)
    assert (policy.env_id, policy.env_kwargs) == (ENV_ID, {})
    assert policy.evaluate(episodes=EPISODES, seed=0).returns == result["episode_returns"]

    with policy.make() as env:
        observation, _ = env.reset(seed=episode_seeds(0, 1)[0])
        seen, rewards, over = [observation], [0.0], False
        while not over:
            action = policy.act(observation, first=len(seen) == 1, reward=rewards[-1])
            observation, reward, terminated, truncated, _ = env.step(action)
            seen, rewards = [*seen, observation], [*rewards, float(reward)]
            over = terminated or truncated
    assert sum(rewards) == result["episode_returns"][0]

    if policy.has_memory:
        with pytest.raises(ValueError, match="with a memory can't be exported"):
            policy.export(tmp_path / "policy.pt2")
        with pytest.raises(ValueError, match="has a memory"):
            policy.act(observation)
        return
    if algo not in EXPORTED:
        return
    program = torch.export.load(policy.export(tmp_path / "policy.pt2")).module()
    exported = program(torch.tensor(np.stack(seen), dtype=torch.float32))
    torch.testing.assert_close(exported, torch.tensor(policy.act(seen)))


@pytest.mark.parametrize("algo", [name for name in EVERY if name not in OTHER_DATA])
def test_a_run_that_was_cut_off_ends_in_the_same_numbers(
    dataset: Path, tmp_path: Path, algo: str
) -> None:
    short = {"steps": 20, "reference_steps": 5, "eval_episodes": 3}
    whole, _ = start(algo, dataset, tmp_path / "whole", **short)
    (wanted,) = train_and_score([whole], [lambda *_: None])

    def kill(stage: str, steps: int, row: Row) -> None:
        # Between two checkpoints, and between two syncs of q.
        if steps == 20 and row["step"] == 13:
            raise KeyboardInterrupt

    cut, _ = start(algo, dataset, tmp_path / "cut", **short, resume=True)
    with pytest.raises(KeyboardInterrupt):
        train_and_score([cut], [kill])
    assert not (cut.folder / "result.json").exists()
    # Another state of torch's own generator.
    torch.manual_seed(123)
    (resumed,) = train_and_score([cut], [lambda *_: None])
    assert resumed["episode_returns"] == wanted["episode_returns"]
    assert json.loads((cut.folder / "result.json").read_text())["steps"] == 20
    policies = [load_policy(run.folder).module for run in (whole, cut)]
    for name, value in policies[0].state_dict().items():
        assert torch.equal(value, policies[1].state_dict()[name]), name
