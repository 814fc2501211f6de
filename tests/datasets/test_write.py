"""Written datasets are read back bit for bit, and writing changes nothing else."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import h5py
import minari
import numpy as np
import pytest
import torch
from tensordict import TensorDict

from iwsft import curate, datasets, environments
from iwsft.datasets import write
from iwsft.datasets.write import Provenance
from iwsft.trajectory import (
    ACTION,
    DONE,
    NEXT_OBSERVATION,
    OBSERVATION,
    REWARD,
    TERMINATED,
    TRAJ_IDS,
    TRUNCATED,
    from_steps,
    lengths,
    pad,
)

OBS, ACT = 11, 3
PROVENANCE = Provenance(
    "Hopper-v4", seed=3, sources=[{"policy": "p", "episodes": 3}], versions={"mujoco": "3.11.0"}
)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "store"))
    return tmp_path / "store"


def random_walks(ends: Sequence[tuple[int, bool]], ids: Sequence[int] | None = None) -> TensorDict:
    """Trajectories of (steps, terminated), the others truncated; next observations are linked."""
    rng = np.random.default_rng(len(ends))
    now, then, terminated, truncated, numbers = [], [], [], [], []
    for i, (steps, terminal) in enumerate(ends):
        path = rng.normal(size=(steps + 1, OBS)).astype(np.float32)
        now.append(path[:-1])
        then.append(path[1:])
        last = np.arange(steps) == steps - 1
        terminated.append(last & terminal)
        truncated.append(last & (not terminal))
        numbers += [i if ids is None else ids[i]] * steps
    total = len(numbers)
    flags = {
        TERMINATED: np.concatenate(terminated),
        TRUNCATED: np.concatenate(truncated),
        DONE: np.concatenate(terminated) | np.concatenate(truncated),
    }
    return from_steps(
        {
            OBSERVATION: torch.from_numpy(np.concatenate(now)),
            NEXT_OBSERVATION: torch.from_numpy(np.concatenate(then)),
            ACTION: torch.from_numpy(rng.uniform(-1, 1, (total, ACT)).astype(np.float32)),
            REWARD: torch.from_numpy(rng.normal(size=(total, 1)).astype(np.float32)),
            **{key: torch.from_numpy(value).unsqueeze(-1) for key, value in flags.items()},
        },
        torch.tensor(numbers),
    )


def same(first: TensorDict, second: TensorDict) -> None:
    keys = first.keys(True, True)
    assert set(keys) == set(second.keys(True, True))
    for key in keys:
        assert first[key].dtype == second[key].dtype, key
        assert torch.equal(first[key], second[key]), key


@pytest.fixture(params=["hdf5", "minari"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Callable[..., None], str]:
    """A writer without its target, and the name to load."""
    if request.param == "hdf5":
        path = tmp_path / "deep" / "mine.hdf5"
        return lambda *args, **kw: write.to_hdf5(path, *args, **kw), str(path)
    return lambda *args, **kw: write.to_minari("lab/x-v0", *args, **kw), "lab/x-v0"


@pytest.mark.parametrize(
    "ends",
    [[(4, True), (1, False), (7, False), (1, True)], [(1, False)], [(3, True)] * 40],
    ids=["mixed", "one step", "many"],
)
def test_round_trip(target: tuple[Callable[..., None], str], ends: list[tuple[int, bool]]) -> None:
    to, name = target
    data = random_walks(ends)
    to(data, PROVENANCE)
    back = datasets.load(name)
    same(data, back.trajectories)
    assert back.env_id == "Hopper-v4"
    assert back.reference_scores == datasets.reference_scores("Hopper-v4")


def test_a_bundled_set_keeps_its_fingerprint(target: tuple[Callable[..., None], str]) -> None:
    to, name = target
    data = datasets.load(datasets.DEFAULT)
    to(data.trajectories, Provenance(data.env_id))
    assert datasets.load(name).fingerprint == data.fingerprint


def test_ids_are_numbered_anew_and_an_end_without_flag_is_a_timeout(
    target: tuple[Callable[..., None], str],
) -> None:
    to, name = target
    data = random_walks([(3, True), (2, False), (4, True)], ids=[5, 6, 9])
    data[TRUNCATED][4] = data[DONE][4] = False
    to(data)
    back = datasets.load(name).trajectories
    assert back[TRAJ_IDS].tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 2]
    assert back[TRUNCATED].flatten().nonzero().flatten().tolist() == [4]
    assert back[TERMINATED].flatten().nonzero().flatten().tolist() == [2, 8]


def test_fields_and_attributes_of_a_file(tmp_path: Path) -> None:
    data = random_walks([(4, True), (2, False)])
    success = np.array([False, True, False, False, True, False])
    path = tmp_path / "mine.h5"
    given = Provenance(**{**vars(PROVENANCE), "env_kwargs": {"max_episode_steps": 9}})
    write.to_hdf5(str(path), data, given, infos={"success": success})
    with h5py.File(path) as file:
        assert file["observations"][()].tolist() == data[OBSERVATION].tolist()
        assert file["next_observations"][()].tolist() == data[NEXT_OBSERVATION].tolist()
        assert file["actions"].dtype == np.float32
        assert file["rewards"].shape == (6,)
        assert file["terminals"][()].tolist() == [False] * 3 + [True] + [False] * 2
        assert file["timeouts"][()].tolist() == [False] * 5 + [True]
        assert file["infos/success"][()].tolist() == success.tolist()
        assert (file.attrs["env_id"], file.attrs["seed"]) == ("Hopper-v4", 3)
        assert json.loads(file.attrs["sources"]) == [{"policy": "p", "episodes": 3}]
        assert json.loads(file.attrs["versions"]) == {"mujoco": "3.11.0"}
        assert json.loads(file.attrs["env_kwargs"]) == {"max_episode_steps": 9}


def test_what_minari_itself_reads(store: Path) -> None:
    data = random_walks([(4, True), (2, False)])
    success = np.array([False, True, False, False, True, False])
    write.to_minari("lab/arm/x-v0", data, PROVENANCE, infos={"success": success})
    assert list(minari.list_local_datasets()) == ["lab/arm/x-v0"]
    read = minari.load_dataset("lab/arm/x-v0")
    first, second = read.iterate_episodes()
    assert first.observations.shape == (5, OBS)
    assert first.observations[-1].tolist() == data[NEXT_OBSERVATION][3].tolist()
    assert first.terminations.tolist() == [False, False, False, True]
    assert second.truncations.tolist() == [False, True]
    assert second.infos["success"].tolist() == [False, True, False]
    assert read.env_spec.id == "Hopper-v4"
    assert json.loads(read.storage.metadata["sources"]) == PROVENANCE.sources
    assert read.action_space.low.tolist() == [-1.0] * ACT
    # Nothing but the namespace and the set, and Minari's store is where it was.
    assert sorted(p.name for p in store.iterdir()) == ["lab"]
    assert os.environ["MINARI_DATASETS_PATH"] == str(store)


def test_the_same_data_gives_the_same_bytes(tmp_path: Path) -> None:
    data = random_walks([(4, True), (2, False)])
    for name in ("a.hdf5", "b.hdf5"):
        write.to_hdf5(tmp_path / name, data, PROVENANCE)
    assert (tmp_path / "a.hdf5").read_bytes() == (tmp_path / "b.hdf5").read_bytes()


def test_nothing_is_written_over(target: tuple[Callable[..., None], str]) -> None:
    to, name = target
    data = random_walks([(4, True)])
    to(data)
    with pytest.raises(FileExistsError, match="exists"):
        to(random_walks([(5, True)]))
    same(data, datasets.load(name).trajectories)


def test_what_is_refused(target: tuple[Callable[..., None], str], tmp_path: Path) -> None:
    to, name = target
    data = random_walks([(4, True), (2, False)])
    nan = data.clone()
    nan[REWARD][2] = torch.nan
    inside = data.clone()
    inside[TERMINATED][1] = True
    for bad, message in (
        (nan, "reward.*NaN or infinite"),
        (inside, r"step 1 has the flag 'terminated', but is not the last"),
        (pad(data), "only packed trajectories"),
        (data[:0], "not a single step"),
    ):
        with pytest.raises(ValueError, match=message):
            to(bad)
    with pytest.raises(KeyError, match="next"):
        to(data.exclude(NEXT_OBSERVATION))
    with pytest.raises(ValueError, match="'success' has 2 rows, the data 6 steps"):
        to(data, infos={"success": np.zeros(2)})
    with pytest.raises(TypeError, match=r"provenance={'seed': 0} must be None or .*Provenance\("):
        to(data, {"seed": 0})
    assert not list(tmp_path.rglob("*.hdf5"))


def test_counts_and_data_weights_are_not_lost(
    target: tuple[Callable[..., None], str], tmp_path: Path
) -> None:
    """What is read back would count each trajectory once."""
    to, name = target
    data = random_walks([(3, True), (2, False), (4, True)])
    with pytest.raises(ValueError, match="'multiplicity' has no place in a dataset"):
        to(curate(data, cuts=(10, 60)))
    weighted = data.copy().set("data_weight", torch.linspace(0.5, 2, 9))
    with pytest.raises(ValueError, match="'data_weight' has no field of its own.* 'infos/weight'"):
        to(weighted)
    # The way out keeps them; so does a set in which all count once.
    weight = weighted["data_weight"]
    to(curate(data, cuts=(0,)), infos={"weight": weight.numpy()})
    if name.endswith("hdf5"):
        again = datasets.load(name, data_weight="infos/weight").trajectories
        torch.testing.assert_close(again["data_weight"], weight, rtol=0, atol=0)


def test_what_one_layout_refuses(tmp_path: Path) -> None:
    data = random_walks([(4, True), (2, False)])
    with pytest.raises(ValueError, match=r"must end in \.hdf5 or \.h5"):
        write.to_hdf5(tmp_path / "mine.npz", data)
    with pytest.raises(ValueError, match="'no version' is not a Minari id"):
        write.to_minari("no version", data)
    torn = data.clone()
    torn[NEXT_OBSERVATION][1, 0] += 1
    with pytest.raises(ValueError, match="step 2 does not begin where step 1 of its trajectory"):
        write.to_hdf5(tmp_path / "mine.hdf5", torn)
    data[NEXT_OBSERVATION] += 0.01  # as of a noisy sensor
    with pytest.raises(ValueError, match="next observation of step 0 is not the observation of"):
        write.to_minari("x-v0", data)
    write.to_hdf5(tmp_path / "mine.hdf5", data)
    same(data, datasets.load(tmp_path / "mine.hdf5").trajectories)
    data = random_walks([(4, True)])
    data[ACTION][2, 1] = 1.5
    with pytest.raises(ValueError, match="'actions' is out of range at row 2"):
        write.to_minari("x-v0", data, PROVENANCE)


def test_a_full_disk_leaves_nothing(
    target: tuple[Callable[..., None], str],
    tmp_path: Path,
    full_disk: Callable[[int], AbstractContextManager[None]],
) -> None:
    to, name = target
    data = random_walks([(3000, True)])
    with full_disk(100_000), pytest.raises(OSError, match="no space left to write"):
        to(data)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
    to(data)
    assert lengths(datasets.load(name).trajectories).tolist() == [3000]


@pytest.mark.parametrize(
    ("env_id", "sizes"), [("AntMaze_UMaze-v4", (29, 8)), ("AdroitHandDoor-v1", (39, 28))]
)
def test_tasks_of_d4rl_keep_their_conventions_in_minari(
    env_id: str, sizes: tuple[int, int]
) -> None:
    data = random_walks([(4, False)])
    observation, action = (torch.zeros(4, size) for size in sizes)
    data.set(OBSERVATION, observation).set(NEXT_OBSERVATION, observation).set(ACTION, action)
    write.to_minari("d4rl-v0", data, Provenance(env_id, env_kwargs={"conventions": "d4rl"}))
    back = datasets.load("minari:d4rl-v0")
    assert (back.env_id, back.env_kwargs) == (env_id, {"conventions": "d4rl"})
    assert back.reference_scores == datasets.reference_scores(env_id)
    # Minari makes the same environment from its own record of it.
    own = minari.load_dataset("d4rl-v0").recover_environment()
    assert type(own) is type(environments.make(env_id, conventions="d4rl"))
