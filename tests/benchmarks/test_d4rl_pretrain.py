"""Fine-tuning on data other than those of the reference (the experiment of Table 3)."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from test_every_algorithm import start
from tracking import write_dataset

from benchmarks.d4rl.options import Options, name_of
from benchmarks.d4rl.run import Run, Task
from benchmarks.d4rl.train import reference_folder, train_and_score, train_references
from benchmarks.runs import CONFIG
from iwsft import load_policy
from iwsft.trajectory import MULTIPLICITY, OBSERVATION, REWARD, lengths

SHORT: dict[str, Any] = {"steps": 10, "reference_steps": 20, "eval_episodes": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two datasets of the same robot, and one of another."""
    folder = tmp_path_factory.mktemp("data")
    write_dataset(folder / "before.hdf5", episodes=100)
    write_dataset(folder / "after.hdf5", episodes=200)
    write_dataset(folder / "wide.hdf5", episodes=20)
    with h5py.File(folder / "wide.hdf5", "a") as file:
        wide = file["actions"][()].repeat(2, axis=1)
        del file["actions"]
        file["actions"] = wide
    return folder


def trained_reference(run: Run, task: Task) -> tuple[torch.nn.Module, Path]:
    (trained,) = train_references([run], task, [lambda *_: None])
    return trained.policy, reference_folder(run, task)


def test_the_reference_is_that_of_the_data_before_and_the_rest_is_of_the_data_after(
    folder: Path, tmp_path: Path
) -> None:
    values = {**SHORT, "pretrain_dataset": str(folder / "before.hdf5"), "top": 5.0}
    tuned, task = start("iw-sft-q", folder / "after.hdf5", tmp_path, **values)
    where = tuned.folder
    assert where == tmp_path / "d4rl" / "before--to--after" / "iw-sft-q" / "seed-0"
    (result,) = train_and_score([tuned], [lambda *_: None])
    assert result["dataset"] == "before--to--after"

    policy, reference = trained_reference(tuned, task)
    assert reference.parent == tmp_path / "d4rl" / "before" / "reference"
    alone, before = start("bc", folder / "before.hdf5", tmp_path, **SHORT, resume=True)
    same, other = trained_reference(alone, before)
    assert other == reference
    for ours, theirs in zip(policy.parameters(), same.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    # A run that changed nothing would act as the reference does.
    trained = load_policy(where).module
    assert any(
        not torch.equal(a, b)
        for a, b in zip(trained.parameters(), policy.parameters(), strict=True)
    )
    # 200 episodes, all returns different: the top 5 % are 10.
    assert len(lengths(tuned.curate(task.dataset.trajectories))) == 10


def test_cloning_looks_at_the_data_after_only(folder: Path, tmp_path: Path) -> None:
    options = {**SHORT, "reference_steps": 10}
    alone, _ = start("bc", folder / "after.hdf5", tmp_path, **options)
    before = replace(alone.options, pretrain_dataset=str(folder / "before.hdf5"))
    cloned = replace(alone, dataset="before--to--after", options=before)
    cloned.folder.mkdir(parents=True)
    shutil.copy(alone.folder / CONFIG, cloned.folder)
    for run in (cloned, alone):
        train_and_score([run], [lambda *_: None])
    states = [load_policy(run.folder).module.state_dict() for run in (cloned, alone)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_data_of_another_robot_or_the_same_data_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="has actions of size 2, Tracking-v0 takes size 1"):
        Task.load(str(folder / "after.hdf5"), str(folder / "wide.hdf5"))
    with pytest.raises(ValueError, match="holds the same data as --dataset"):
        Task.load(str(folder / "after.hdf5"), str(folder / "after.hdf5"))


def test_actions_of_both_datasets_have_the_same_unit(tmp_path: Path) -> None:
    """A torque of 0.5 of a file without an environment would be one of 1.0 in Pendulum's data."""
    for name, env_id in (("named", "Pendulum-v1"), ("twin", "Pendulum-v1"), ("unnamed", None)):
        generator = np.random.default_rng(len(name))
        with h5py.File(tmp_path / f"{name}.hdf5", "w") as file:
            file["observations"] = generator.normal(size=(20, 3)).astype(np.float32)
            file["actions"] = generator.uniform(-1, 1, (20, 1)).astype(np.float32)
            file["rewards"], file["terminals"] = np.ones(20), np.arange(20) % 5 == 4
            if env_id is not None:
                file.attrs["env_id"] = env_id
    paths = {path.stem: str(path) for path in tmp_path.iterdir()}
    Task.load(paths["named"], paths["twin"])
    with pytest.raises(ValueError, match=r"unnamed has actions of the bounds \[-1, 1\], named \["):
        Task.load(paths["named"], paths["unnamed"])


def test_joined_datasets_are_cut_each_by_itself(tiny_dataset: Path, tmp_path: Path) -> None:
    """The top 10 % of either, though all returns of one are above those of the other."""
    other = tmp_path / "other.hdf5"
    shutil.copy(tiny_dataset, other)
    with h5py.File(other, "a") as file:
        file["rewards"][...] += 100
    task = Task.load(f"{tiny_dataset}+{other}")
    assert task.dataset.name == name_of(f"{tiny_dataset}+{other}") == "mine+other"
    assert task.parts == (40, 40)
    run = Run("mine+other", "sft", 0, Options(), "")
    curated = run.curate(task.dataset.trajectories, task.parts)
    alone = [
        run.curate(Task.load(str(path)).dataset.trajectories) for path in (tiny_dataset, other)
    ]
    for key in (REWARD, OBSERVATION, MULTIPLICITY):
        assert torch.equal(curated[key], torch.cat([part[key] for part in alone]))
