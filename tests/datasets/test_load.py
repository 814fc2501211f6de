"""Names, the catalogue, reference scores, the bundled set and the cost of an import."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from iwsft import datasets, environments
from iwsft.datasets.catalog import CATALOG, SIZES
from iwsft.trajectory import (
    ACTION,
    DONE,
    NEXT_OBSERVATION,
    OBSERVATION,
    REWARD,
    TERMINATED,
    TRAJ_IDS,
    TRUNCATED,
    Segments,
    lengths,
)
from iwsft.validation import validate

SCRIPTS = Path(__file__).parents[2] / "scripts"

Make = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def bundled() -> datasets.OfflineDataset:
    return datasets.load(datasets.DEFAULT)


@pytest.fixture(scope="module")
def provenance() -> dict[str, Any]:
    file = resources.files("iwsft.datasets") / "data" / f"{datasets.DEFAULT}.json"
    return json.loads(file.read_text())


def test_bundled_is_what_its_provenance_says(
    bundled: datasets.OfflineDataset, provenance: dict[str, Any]
) -> None:
    content = (resources.files("iwsft.datasets") / "data" / f"{datasets.DEFAULT}.hdf5").read_bytes()
    assert len(content) == provenance["bytes"] <= 4_000_000
    assert hashlib.sha256(content).hexdigest() == provenance["sha256"]

    packed = bundled.trajectories
    sizes = lengths(packed)
    returns = Segments.of(packed).sum(packed[REWARD].squeeze(-1))[: len(sizes)].double().numpy()
    mini, full = provenance["mini"], provenance["full"]
    assert mini["episodes"] == len(sizes) >= 150
    assert mini["steps"] == len(packed)
    quantiles = np.percentile(returns, provenance["quantiles"])
    np.testing.assert_allclose(mini["return_quantiles"], quantiles, atol=0.06)
    # An even subset: the same returns as all of it, the extremes aside.
    np.testing.assert_allclose(
        mini["return_quantiles"][1:-1], full["return_quantiles"][1:-1], rtol=0.02
    )


def test_bundled_is_fit_for_training(bundled: datasets.OfflineDataset) -> None:
    packed = bundled.trajectories
    validate(packed)
    assert bundled.env_id == "Hopper-v4"
    assert bundled.name == datasets.DEFAULT
    assert bundled.reference_scores == (-20.272305, 3234.3)
    assert packed[OBSERVATION].shape[1] == 11
    inside = ~packed[DONE].squeeze(-1)[:-1]
    following = packed[NEXT_OBSERVATION][:-1][inside]
    assert torch.equal(following, packed[OBSERVATION][1:][inside])
    # Hopper ends early when it falls, and by its time limit after 1000 steps.
    sizes = lengths(packed)
    last = packed[DONE].squeeze(-1)
    assert torch.equal(packed[TRUNCATED].squeeze(-1)[last], sizes == 1000)
    assert torch.equal(packed[TERMINATED].squeeze(-1)[last], sizes < 1000)
    assert not torch.equal(packed[NEXT_OBSERVATION][last], packed[OBSERVATION][last])
    assert packed[TRAJ_IDS][-1] == len(sizes) - 1


def load_script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_subset_script(episode_fields: Make, tmp_path: Path) -> None:
    script = load_script("make_hopper_replay_mini")
    sizes = np.random.default_rng(1).integers(1, 30, size=90).tolist()
    fields = episode_fields(sizes, obs=11, act=3)
    fields["next_observations"] = np.roll(fields["observations"], -1, axis=0)
    fields["next_observations"][np.cumsum(sizes) - 1] += 1
    source = tmp_path / "source.hdf5"
    with h5py.File(source, "w") as file:
        for key, values in fields.items():
            file[key] = values
        file.attrs.update(env_id="Hopper-v4", sources='[{"policy": "p", "episodes": 90}]')
    script.make(source, tmp_path / "a.hdf5")
    script.make(source, tmp_path / "b.hdf5")
    assert (tmp_path / "a.hdf5").read_bytes() == (tmp_path / "b.hdf5").read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {
        "source.hdf5", "a.hdf5", "a.json", "b.hdf5", "b.json",
    }  # fmt: skip

    # By hand: rank the episodes, take the middle one of every nine, keep their order.
    starts = [sum(sizes[:i]) for i in range(90)]
    slices = [slice(s, s + n) for s, n in zip(starts, sizes, strict=True)]
    returns = [float(fields["rewards"][rows].astype(float).sum()) for rows in slices]
    ranked = sorted(range(90), key=lambda i: returns[i])
    kept = sorted(ranked[4 + 9 * n] for n in range(10))
    full = datasets.load(source).trajectories
    mini = datasets.load(tmp_path / "a.hdf5").trajectories
    wanted = torch.cat([full[slices[i]] for i in kept])
    for key in (OBSERVATION, NEXT_OBSERVATION, REWARD, TERMINATED, TRUNCATED):
        assert torch.equal(mini[key], wanted[key])
    assert lengths(mini).tolist() == [sizes[i] for i in kept]


def test_the_bundled_demonstrations() -> None:
    data = datasets.load("door-human")
    folder = resources.files("iwsft.datasets") / "data"
    provenance = json.loads((folder / "door-human.json").read_text())
    content = (folder / "door-human.hdf5").read_bytes()
    assert len(content) == provenance["bytes"] <= 1_600_000
    assert hashlib.sha256(content).hexdigest() == provenance["sha256"]

    packed = data.trajectories
    validate(packed)
    assert (data.name, data.env_id) == ("door-human", "AdroitHandDoor-v1")
    assert data.env_kwargs == {"conventions": "d4rl"}
    assert data.reference_scores == (-56.512833, 2880.5693087298737)
    assert data.notes == ()
    assert packed[OBSERVATION].shape == (6729, 39)
    assert packed[ACTION].shape == (6729, 28)
    assert packed[ACTION].abs().max() == 1
    sizes = lengths(packed)
    assert len(sizes) == provenance["demonstrations"] == 25
    assert (sizes.min(), sizes.max()) == (223, 300)
    assert not packed[TERMINATED].any()
    assert packed[TRUNCATED].sum() == 25
    returns = Segments.of(packed).sum(packed[REWARD].squeeze(-1))[:25].double().numpy()
    np.testing.assert_allclose(returns, provenance["returns"], atol=0.06)


def test_the_demonstrations_script(tmp_path: Path) -> None:
    script = load_script("make_door_human")
    rng = np.random.default_rng(0)
    demos = {
        "observations": rng.normal(size=(7, 39)).astype(np.float32),
        "actions": (2 * rng.normal(size=(7, 28))).astype(np.float32),
        "rewards": rng.normal(size=7).astype(np.float32),
        "episode_lengths": np.array([4, 3]),
        "init_door_body_pos": rng.normal(size=(2, 3)),
    }
    np.savez(tmp_path / "demos.npz", **demos)
    provenance = script.make(tmp_path / "demos.npz", tmp_path / "a.hdf5")
    script.make(tmp_path / "demos.npz", tmp_path / "b.hdf5")
    assert (tmp_path / "a.hdf5").read_bytes() == (tmp_path / "b.hdf5").read_bytes()
    assert provenance == {
        **json.loads((tmp_path / "b.json").read_text()),
        "command": "python scripts/make_door_human.py demos.npz a.hdf5",
    }
    data = datasets.load(tmp_path / "a.hdf5")
    assert data.notes == ()
    assert lengths(data.trajectories).tolist() == [4, 3]
    np.testing.assert_array_equal(data.trajectories[OBSERVATION], demos["observations"])
    np.testing.assert_array_equal(data.trajectories[ACTION], demos["actions"].clip(-1, 1))
    with h5py.File(tmp_path / "a.hdf5") as file:
        np.testing.assert_array_equal(
            file["infos/door_body_pos"][()], demos["init_door_body_pos"][[0] * 4 + [1] * 3]
        )
        assert file.attrs["licence"] == "Apache-2.0"
    np.savez(tmp_path / "short.npz", **{**demos, "episode_lengths": np.array([4, 4])})
    with pytest.raises(ValueError, match="'episode_lengths' add up to 8, not to 7 rows"):
        script.make(tmp_path / "short.npz", tmp_path / "c.hdf5")


def test_available_and_unknown_names() -> None:
    names = datasets.available()
    assert names[0] == datasets.DEFAULT
    assert len(names) == len(set(names)) == 2 + 6 + 24 + 12 + 3 + 24
    with pytest.raises(ValueError, match="did you mean 'hopper-medium-replay-v2' or") as caught:
        datasets.load("hoper-medium-replay-v2")
    told = str(caught.value)
    assert sum(f"{name!r}" in told for name in names) == 3
    assert "path of a .hdf5 file" in told
    assert told.endswith("a name that iwsft.datasets.available() lists")


def test_a_name_that_is_a_file_of_another_kind(tmp_path: Path) -> None:
    path = tmp_path / "data.npz"
    path.touch()
    with pytest.raises(ValueError, match=r"exists on disk, but a file must end in \.hdf5"):
        datasets.load(str(path))


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("ant-medium-expert-v2", "gym_mujoco_v2/ant_medium_expert-v2.hdf5"),
        ("halfcheetah-full-replay-v2", "gym_mujoco_v2/halfcheetah_full_replay-v2.hdf5"),
        (
            "antmaze-umaze-v0",
            "ant_maze_new/Ant_maze_u-maze_noisy_multistart_False_multigoal_False_sparse.hdf5",
        ),
        (
            "antmaze-umaze-diverse-v2",
            "ant_maze_v2/Ant_maze_u-maze_noisy_multistart_True_multigoal_True_sparse_fixed.hdf5",
        ),
        (
            "antmaze-large-play-v2",
            "ant_maze_v2/"
            "Ant_maze_hardest-maze_noisy_multistart_True_multigoal_False_sparse_fixed.hdf5",
        ),
        ("kitchen-mixed-v0", "kitchen/kitchen_microwave_kettle_bottomburner_light-v0.hdf5"),
        ("pen-expert-v0", "hand_dapg/pen-v0_expert_clipped.hdf5"),
        ("hammer-human-v0", "hand_dapg/hammer-v0_demos_clipped.hdf5"),
        ("relocate-cloned-v0", "hand_dapg/relocate-demos-v0-bc-combined.hdf5"),
        ("door-human-v1", "hand_dapg_v1/door-human-v1.hdf5"),
    ],
)
def test_files_of_d4rl(name: str, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IWSFT_D4RL_MIRRORS", raising=False)
    assert CATALOG[name].urls == [
        f"https://rail.eecs.berkeley.edu/datasets/offline_rl/{path}",
        f"https://huggingface.co/datasets/imone/D4RL/resolve/main/{path.split('/')[-1]}",
    ]


@pytest.mark.filterwarnings("ignore:.*is out of date")
def test_every_environment_of_the_catalogue_has_its_sizes_and_actions_in_one() -> None:
    import gymnasium
    import gymnasium_robotics

    gymnasium.register_envs(gymnasium_robotics)
    assert set(gymnasium.registry) >= SIZES.keys()
    for entry in {entry.env_id: entry for entry in CATALOG.values()}.values():
        if entry.env_id in ("AntMaze_Medium-v4", "AntMaze_Large-v4"):
            continue  # another maze
        with environments.make(entry.env_id, **entry.env_kwargs) as env:
            space, flatten = environments.action_space(env), environments.flattener(env)
            columns = len(flatten(env.observation_space.sample()))
        assert (columns, *space.shape) == SIZES[entry.env_id]
        assert (space.low == -1).all()
        assert (space.high == 1).all()


def test_reference_scores() -> None:
    assert datasets.reference_scores("hopper-medium-v2") == (-20.272305, 3234.3)
    assert datasets.reference_scores("Hopper-v4") == (-20.272305, 3234.3)
    assert datasets.reference_scores("HalfCheetah-v4") == (-280.178953, 12135.0)
    assert datasets.reference_scores("AdroitHandDoor-v1") == (-56.512833, 2880.5693087298737)
    assert datasets.reference_scores("maze2d-umaze-v1") == (23.85, 161.86)
    assert datasets.reference_scores("Hopper-v5") is None  # other rewards
    assert datasets.reference_scores("nothing") is None
    for (
        name,
        entry,
    ) in CATALOG.items():  # the scores of an environment do not depend on the dataset
        assert datasets.reference_scores(name) == datasets.reference_scores(entry.env_id)


def test_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IWSFT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert datasets.cache_folder() == tmp_path / ".cache" / "iwsft"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert datasets.cache_folder() == tmp_path / "xdg" / "iwsft"
    monkeypatch.setenv("IWSFT_CACHE", "~/mine")
    assert datasets.cache_folder() == tmp_path / "mine"
    assert datasets.cache_folder(tmp_path / "given") == tmp_path / "given"


def test_the_import_is_light() -> None:
    code = (
        "import sys; from iwsft import datasets; "
        "print([m for m in ('h5py', 'minari', 'gymnasium', 'urllib.request', 'rich', 'filelock')"
        " if m in sys.modules and m not in before])"
    )
    before = "import sys, torch, tensordict; before = set(sys.modules); "
    result = subprocess.run(
        [sys.executable, "-c", before + code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
