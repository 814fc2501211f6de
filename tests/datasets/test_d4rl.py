"""Files in D4RL's layout: the trajectories read from them, and the errors for bad files."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import h5py
import numpy as np
import pytest
import torch

from iwsft import datasets
from iwsft.trajectory import (
    ACTION,
    DATA_WEIGHT,
    NEXT_OBSERVATION,
    OBSERVATION,
    REWARD,
    TERMINATED,
    TRUNCATED,
    lengths,
)

if TYPE_CHECKING:
    from tests.datasets.conftest import Fields

Write = Callable[..., Path]
Make = Callable[..., dict[str, Any]]


def test_locomotion_layout_with_true_next_observations(episode_fields: Make, write: Write) -> None:
    fields = episode_fields([3, 4, 2], obs=11, act=3)
    fields["next_observations"] = np.roll(fields["observations"], -1, axis=0)
    fields["next_observations"][[2, 6, 8]] += 100
    fields["infos/qpos"] = np.full((9, 1), np.nan)  # not ours to judge
    data = datasets.load(write(fields, env_id="Hopper-v4"))
    assert lengths(data.trajectories).tolist() == [3, 4, 2]
    assert data.trajectories[TERMINATED].flatten().nonzero().flatten().tolist() == [2, 8]
    assert data.trajectories[TRUNCATED].flatten().nonzero().flatten().tolist() == [6]
    np.testing.assert_array_equal(data.trajectories[NEXT_OBSERVATION], fields["next_observations"])
    assert (data.env_id, data.name) == ("Hopper-v4", "mine")
    assert data.reference_scores == (-20.272305, 3234.3)


def test_kitchen_layout(episode_fields: Make, write: Write) -> None:
    """No timeouts, flags as floats, ``infos`` an array, terminals at the end of a demonstration."""
    fields = episode_fields([5, 4], obs=60, act=9)
    ends = fields.pop("timeouts") | fields["terminals"]
    fields["terminals"] = ends.astype(np.float32)
    fields["infos"] = np.zeros(9, dtype=np.int64)
    path = write(fields, "mini_kitchen_microwave_kettle_light_slider-v0.hdf5")
    data = datasets.load(path)
    assert lengths(data.trajectories).tolist() == [5, 4]
    assert data.trajectories[TERMINATED].flatten().tolist() == ends.tolist()
    assert not data.trajectories[TRUNCATED].any()
    assert data.trajectories[OBSERVATION].shape == (9, 60)
    assert (data.env_id, data.reference_scores) == ("FrankaKitchen-v1", (0.0, 4.0))


@pytest.mark.parametrize(
    ("file", "tasks"),
    [
        (
            "kitchen_microwave_kettle_light_slider-v0",
            "microwave, kettle, light switch, slide cabinet",
        ),
        (
            "kitchen_microwave_kettle_bottomburner_light-v0",
            "microwave, kettle, light switch, bottom burner",
        ),
    ],
)
def test_kitchen_environment(episode_fields: Make, write: Write, file: str, tasks: str) -> None:
    data = datasets.load(write(episode_fields([3], obs=60, act=9), f"{file}.hdf5"))
    assert data.env_kwargs["tasks_to_complete"] == tasks.split(", ")


def test_adroit_layout(episode_fields: Make, write: Write) -> None:
    """Flags as booleans, infos a group, actions beyond the range that the environment clips."""
    fields = episode_fields([5, 4], obs=39, act=28)
    fields["timeouts"] |= fields["terminals"]
    fields["terminals"][:] = False
    fields["actions"][3, 7], fields["actions"][6, :2] = 1.3, -2.0
    fields["infos/qpos"] = np.zeros((9, 30), np.float32)
    clipped = fields["actions"].clip(-1, 1)
    data = datasets.load(write(fields, "door-human-v1.hdf5"))
    assert lengths(data.trajectories).tolist() == [5, 4]
    assert not data.trajectories[TERMINATED].any()
    np.testing.assert_array_equal(data.trajectories[ACTION], clipped)
    assert data.notes == ("actions of 2 rows clipped to [-1, 1], as AdroitHandDoor-v1 does",)
    assert (data.env_id, data.env_kwargs) == ("AdroitHandDoor-v1", {"conventions": "d4rl"})
    assert data.reference_scores == (-56.512833, 2880.5693087298737)


def test_arguments_of_the_environment_come_with_the_file(
    episode_fields: Make, write: Write
) -> None:
    fields = episode_fields([4], obs=39, act=28)
    assert datasets.load(write(fields)).env_kwargs == {}
    data = datasets.load(write(fields, env_id="Mine-v0", env_kwargs='{"terrain": [1, 2]}'))
    assert data.env_kwargs == {"terrain": [1, 2]}
    # D4RL's arguments belong to D4RL's environment, not to the one that a file names.
    own = datasets.load(write(fields, "door-human-v1.hdf5", env_id="AdroitHandDoor-v1"))
    assert own.env_kwargs == {}
    for wrong in ("terrain=1", "[1, 2]", "[" * 9999):
        with pytest.raises(ValueError, match="'env_kwargs' is .*must be a JSON object"):
            datasets.load(write(fields, env_id="Mine-v0", env_kwargs=wrong))
    for odd in (np.array([b"Hopper-v4"]), np.bytes_(b"\xff\xfe"), 4):
        with pytest.raises(ValueError, match="'env_id' is .*must be text"):
            datasets.load(write(fields, env_id=odd))


def test_trailing_partial_episode_is_kept_truncated(episode_fields: Make, write: Write) -> None:
    fields = episode_fields([3, 3, 2])
    fields["terminals"][-1] = False
    data = datasets.load(write(fields))
    assert lengths(data.trajectories).tolist() == [3, 3, 2]
    assert data.trajectories[TRUNCATED].flatten().int().tolist() == [0, 0, 0, 0, 0, 1, 0, 1]
    assert data.trajectories[TERMINATED].flatten().int().tolist() == [0, 0, 1, 0, 0, 0, 0, 0]


@pytest.mark.parametrize("sizes", [[7], [1], [1, 1, 1]])
def test_one_trajectory_and_single_steps_load(
    episode_fields: Make, write: Write, sizes: list[int]
) -> None:
    assert lengths(datasets.load(write(episode_fields(sizes))).trajectories).tolist() == sizes


def test_other_dtypes_and_columns_are_taken(episode_fields: Make, write: Write) -> None:
    fields = episode_fields([4, 3])
    plain = datasets.load(write(fields))
    fields["observations"] = fields["observations"].astype(np.float64)
    fields["actions"] = fields["actions"].astype(">f8")
    fields["rewards"] = fields["rewards"][:, None]
    fields["terminals"] = fields["terminals"][:, None].astype(np.uint8)
    again = datasets.load(write(fields, "again.h5"))
    assert again.trajectories[ACTION].dtype == plain.trajectories[ACTION].dtype
    assert (again.trajectories == plain.trajectories).all()
    assert again.fingerprint == plain.fingerprint
    assert again.name == "again"


def test_fingerprint_follows_contents_only(
    episode_fields: Make, write: Write, tmp_path: Path
) -> None:
    fields = episode_fields([4, 3], obs=11, act=3)
    first = datasets.load(write(fields, "one.hdf5")).fingerprint
    assert datasets.load(write(fields, "two.hdf5", env_id="Hopper-v4")).fingerprint == first
    for key in ("observations", "actions", "rewards"):
        changed = {**fields, key: fields[key].copy()}
        changed[key].reshape(-1)[0] = np.nextafter(changed[key].reshape(-1)[0], np.float32(0))
        assert datasets.load(write(changed)).fingerprint != first
    for key in ("terminals", "timeouts"):
        changed = {**fields, key: fields[key].copy()}
        changed[key][0] = True
        assert datasets.load(write(changed)).fingerprint != first


def test_environment_of_a_file(episode_fields: Make, write: Write) -> None:
    fields = episode_fields([3], obs=17, act=6)
    assert datasets.load(write(fields)).env_id is None
    assert datasets.load(write(fields)).reference_scores is None
    named = datasets.load(write(fields, "walker2d_full_replay-v2.hdf5"))
    assert named.env_id == "Walker2d-v4"
    assert named.reference_scores == (1.629008, 4592.3)
    own = datasets.load(write(fields, "walker2d-medium-v2.hdf5", env_id="MyWalker-v0"))
    assert (own.env_id, own.reference_scores) == ("MyWalker-v0", None)


@pytest.mark.parametrize("env_id", ["Hopper-v4", "Hopper-v5", "InvertedPendulum-v5"])
def test_data_that_do_not_fit_their_environment(
    episode_fields: Make, write: Write, env_id: str
) -> None:
    columns, actions = {"I": (4, 1), "H": (11, 3)}[env_id[0]]
    fields = episode_fields([5], obs=columns, act=actions)
    right = datasets.load(write(fields, env_id=env_id), scale_actions=True)
    assert not any("size" in note for note in right.notes)
    other = episode_fields([5], obs=columns, act=actions + 1)
    takes = f"mine.hdf5 has actions of size {actions + 1}, {env_id} takes size {actions}"
    with pytest.raises(ValueError, match=takes):
        datasets.load(write(other, env_id=env_id))
    # With a function from observations to these columns, such data can be scored.
    other = episode_fields([5], obs=columns + 1, act=actions)
    gives = f"observations of size {columns + 1}, {env_id} gives size {columns}"
    with pytest.warns(UserWarning, match=gives):
        data = datasets.load(write(other, env_id=env_id), scale_actions=True)
    assert gives in data.notes
    assert data.reference_scores is None


def test_a_wider_action_space_is_taken_from_the_environment(
    episode_fields: Make, write: Write
) -> None:
    fields = episode_fields([4], obs=3, act=1)
    fields["actions"][2] = 1.9
    assert lengths(datasets.load(write(fields, env_id="Pendulum-v1")).trajectories).tolist() == [4]
    fields["actions"][2] = 2.1
    with pytest.raises(ValueError, match=r"'actions' .* at row 2, .* -2 to 2"):
        datasets.load(write(fields, env_id="Pendulum-v1"))
    with pytest.raises(ValueError, match=r"row 2, .*unknown environment 'NoSuchThing-v0'"):
        datasets.load(write(fields, env_id="NoSuchThing-v0"))


def without(key: str) -> Callable[[Fields], None]:
    return lambda fields: fields.__delitem__(key)


def put(key: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Fields], None]:
    return lambda fields: fields.update({key: change(fields[key])})


def at(row: int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(values: np.ndarray) -> np.ndarray:
        values = values.astype(np.float64)
        values[row] = value
        return values

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("observations"), "no field 'observations', only actions, rewards"),
        (without("actions"), "no field 'actions'"),
        (without("rewards"), "no field 'rewards'"),
        (without("terminals"), "no field 'terminals'"),
        (put("observations", lambda a: a[:0]), "holds no steps"),
        (put("observations", lambda a: a[:, 0]), r"'observations' has shape \[7\], expected"),
        (put("observations", lambda a: a[:, :0]), r"'observations' has shape \[7, 0\]"),
        (
            put("actions", lambda a: a[:-1]),
            r"'actions' has shape \[6, 2\].*with 7 rows",
        ),
        (put("rewards", lambda a: a[:-2]), r"'rewards' has shape \[5\]"),
        (put("rewards", lambda a: np.stack([a, a], 1)), r"'rewards' has shape \[7, 2\]"),
        (put("terminals", lambda a: a[:-1]), r"'terminals' has shape \[6\]"),
        (put("timeouts", lambda a: np.append(a, True)), r"'timeouts' has shape \[8\]"),
        (put("terminals", at(4, 0.5)), "'terminals' must be 0 or 1, row 4 is 0.5"),
        (put("timeouts", at(3, np.nan)), "'timeouts' must be 0 or 1, row 3 is nan"),
        (put("observations", at(2, np.nan)), "'observations' is NaN at row 2"),
        (put("rewards", at(6, np.inf)), "'rewards' is infinite or beyond .* row 6"),
        # In the file it is finite.
        (put("rewards", at(1, 1e39)), r"beyond float32 \(3.4e38\) at row 1; scale it, or"),
        (put("actions", at(5, 1.01)), r"'actions' is out of range at row 5.*-1 to 1"),
        (put("actions", at(0, -3)), "'actions' is out of range at row 0"),
        (put("observations", lambda a: a.astype("S4")), "'observations' is .*expected numbers"),
        (put("rewards", lambda a: a.sum()), "'rewards' is .*expected numbers"),
        (
            lambda fields: fields.update(next_observations=fields["observations"][:, :2]),
            r"'next_observations' has shape \[7, 2\], expected .* \[7, 3\]",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_what_is_refused(
    episode_fields: Make, write: Write, change: Callable[[Fields], None], message: str
) -> None:
    fields = episode_fields([4, 3])
    change(fields)
    path = write(fields)
    with pytest.raises(ValueError, match=message) as caught:
        datasets.load(path)
    assert str(path) in str(caught.value)


def test_data_weights_are_a_field_or_an_array(episode_fields: Make, write: Write) -> None:
    fields = episode_fields([3, 4])
    weight = np.array([0.5, -1, 0, 2, 3, 1, 0.25])
    fields["infos/quality"] = weight[:, None]
    path = write(fields)
    assert datasets.load(path).trajectories.get(DATA_WEIGHT, default=None) is None
    for given in ("infos/quality", weight, torch.from_numpy(weight), weight.tolist()):
        data = datasets.load(path, data_weight=given)
        assert data.trajectories[DATA_WEIGHT].tolist() == weight.tolist()
        assert data.trajectories[DATA_WEIGHT].dtype == torch.float32
        assert data.fingerprint != datasets.load(path).fingerprint


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ("quality", "has no field 'quality' for the data weights"),
        (np.ones(6), r"shape \[6\], it must be a number for each of the 7 steps"),
        (np.ones((7, 2)), r"shape \[7, 2\], it must be"),
        (["0.5"] * 7, "the data weight is of type <U3 and"),
        (np.arange(7) / np.arange(1, 8)[::-1] * np.nan, "NaN, infinite or beyond float32 in 7"),
        ([1, 1, 1, np.inf, 1, 1, 1], r"infinite or beyond float32 in 1 places, first \[3\]"),
        ([1, 1, 1e39, 1, 1, 1, 1], r"infinite or beyond float32 in 1 places, first \[2\]"),
        (np.zeros(7), "the data weight is 0 everywhere"),
    ],
)
def test_data_weights_that_are_refused(
    episode_fields: Make, write: Write, given: Any, error: str
) -> None:
    with pytest.raises(ValueError, match=error):
        datasets.load(write(episode_fields([4, 3])), data_weight=given)


def test_a_field_that_is_a_group(episode_fields: Make, write: Write) -> None:
    fields = episode_fields([4])
    fields["rewards/a"] = fields.pop("rewards")
    with pytest.raises(ValueError, match=r"'rewards' is .*group.*expected numbers"):
        datasets.load(write(fields))


@pytest.mark.parametrize("keep", [0, 100, 0.5, 0.99])
def test_a_truncated_file(episode_fields: Make, write: Write, keep: float) -> None:
    path = write(episode_fields([4000, 4000]))
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else int(keep)])
    with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: .*damaged"):
        datasets.load(path)


def test_a_damaged_chunk(episode_fields: Make, tmp_path: Path) -> None:
    path = tmp_path / "damaged.hdf5"
    with h5py.File(path, "w") as file:
        for key, values in episode_fields([4000, 4000]).items():
            file.create_dataset(key, data=values, compression="gzip")
        place = file["actions"].id.get_chunk_info(0)
    data = bytearray(path.read_bytes())
    data[place.byte_offset : place.byte_offset + place.size] = bytes(place.size)
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged.hdf5: 'actions' is damaged .*; delete the file"):
        datasets.load(path)


def test_a_missing_file_names_its_neighbour(
    episode_fields: Make, write: Write, tmp_path: Path
) -> None:
    path = write(episode_fields([3]), "hopper-replay.hdf5")
    with pytest.raises(FileNotFoundError, match=f"did you mean {re.escape(str(path))}"):
        datasets.load(tmp_path / "hoper-replay.hdf5")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        datasets.load(str(tmp_path / "nowhere" / "a.hdf5"))
    with pytest.raises(FileNotFoundError, match="is a folder"):
        datasets.load(tmp_path)


def test_rewards_keep_their_order(episode_fields: Make, write: Write) -> None:
    fields = episode_fields([3, 5])
    data = datasets.load(write(fields))
    np.testing.assert_array_equal(data.trajectories[REWARD][:, 0], fields["rewards"])


def test_a_file_that_another_program_writes(episode_fields: Make, write: Write) -> None:
    """In a process of its own, as HDF5 shares an open file within one."""
    path = write(episode_fields([3]))
    code = f"from iwsft import datasets\ndatasets.load({str(path)!r})"
    with h5py.File(path, "a"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].startswith(f"OSError: {path} cannot be opened: Resource")
    assert lengths(datasets.load(path).trajectories).tolist() == [3]
