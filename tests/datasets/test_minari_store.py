"""Minari sets that Minari itself wrote, offline."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, Space, Tuple
from gymnasium.spaces.utils import flatten
from minari.data_collector import EpisodeBuffer

from iwsft import GaussianPolicy, datasets, environments, evaluate
from iwsft.trajectory import (
    ACTION,
    NEXT_OBSERVATION,
    OBSERVATION,
    REWARD,
    TERMINATED,
    TRUNCATED,
    lengths,
)

if TYPE_CHECKING:
    from tests.datasets.conftest import Served

# Minari misses the author, a permalink and the environment.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* is (set to )?None"),
    pytest.mark.filterwarnings("ignore:.*policies act in"),
]

ACTIONS = Box(-2, 2, (2,), np.float32)


@pytest.fixture(autouse=True)
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return tmp_path


def create(
    space: Space[Any],
    ends: list[tuple[int, bool, bool]],
    *,
    dataset_id: str = "lab/arm/medium-v0",
    actions: Space[Any] = ACTIONS,
    **metadata: Any,
) -> list[EpisodeBuffer]:
    """Random episodes; each of ``ends`` is (steps, terminated, truncated) of one."""
    space.seed(0)
    actions.seed(0)
    rng = np.random.default_rng(0)
    episodes = []
    for steps, terminated, truncated in ends:
        observations = [space.sample() for _ in range(steps + 1)]
        episodes.append(
            EpisodeBuffer(
                observations=stack(observations),
                actions=stack([actions.sample() for _ in range(steps)]),
                rewards=rng.normal(size=steps).tolist(),
                terminations=[False] * (steps - 1) + [terminated],
                truncations=[False] * (steps - 1) + [truncated],
            )
        )
    minari.create_dataset_from_buffers(
        dataset_id=dataset_id,
        buffer=episodes,
        observation_space=space,
        action_space=actions,
        **metadata,
    )
    return episodes


def stack(samples: list[Any]) -> Any:
    if isinstance(samples[0], dict):
        return {key: stack([sample[key] for sample in samples]) for key in samples[0]}
    if isinstance(samples[0], tuple):
        return tuple(stack(list(part)) for part in zip(*samples, strict=True))
    return np.stack(samples)


def one(samples: Any, i: int) -> Any:
    if isinstance(samples, dict):
        return {key: one(part, i) for key, part in samples.items()}
    if isinstance(samples, tuple):
        return tuple(one(part, i) for part in samples)
    return samples[i]


PLAIN = Box(-10, 10, (3,), np.float64)
NESTED = Dict(
    {
        "observation": Box(-1, 1, (2, 2), np.float32),
        "achieved": Dict({"b": Box(-1, 1, (1,), np.float32), "a": Box(-1, 1, (2,), np.float32)}),
        "pair": Tuple((Box(-1, 1, (1,), np.float64), Box(-1, 1, (3,), np.float32))),
    }
)


@pytest.mark.parametrize("space", [PLAIN, NESTED], ids=["box", "nested"])
def test_steps_and_order_of_columns(space: Space[Any]) -> None:
    episodes = create(space, [(4, True, False), (3, False, False), (1, False, True)])
    data = datasets.load("lab/arm/medium-v0")
    packed = data.trajectories
    assert lengths(packed).tolist() == [4, 3, 1]
    row = 0
    for episode in episodes:
        for i in range(len(episode)):
            now, then = one(episode.observations, i), one(episode.observations, i + 1)
            for key, sample in ((OBSERVATION, now), (NEXT_OBSERVATION, then)):
                wanted = np.asarray(flatten(space, sample), np.float32)  # gymnasium's own order
                np.testing.assert_array_equal(packed[key][row], wanted)
            np.testing.assert_array_equal(packed[ACTION][row], episode.actions[i])
            assert packed[REWARD][row].item() == np.float32(episode.rewards[i])
            row += 1
    assert packed[TERMINATED].flatten().int().tolist() == [0, 0, 0, 1, 0, 0, 0, 0]
    assert packed[TRUNCATED].flatten().int().tolist() == [0, 0, 0, 0, 0, 0, 1, 1]
    assert (data.name, data.source) == ("lab-arm-medium-v0", "minari:lab/arm/medium-v0")
    assert (data.env_id, data.reference_scores) == (None, None)
    assert data.action_bounds == (-2.0, 2.0)


def test_an_end_inside_a_stored_episode_cuts_with_its_true_next_observation() -> None:
    (episode,) = create(PLAIN, [(5, True, False)], dataset_id="gone-v0")
    episode.terminations[1] = True
    minari.create_dataset_from_buffers(
        dataset_id="arm-v1", buffer=[episode], observation_space=PLAIN, action_space=ACTIONS
    )
    packed = datasets.load("minari:arm-v1", data_weight=[1, 2, 3, 4, 5]).trajectories
    assert lengths(packed).tolist() == [2, 3]
    assert packed["data_weight"].tolist() == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(
        packed[NEXT_OBSERVATION], np.float32(np.asarray(episode.observations)[1:])
    )


def test_environment_and_reference_scores() -> None:
    create(
        Box(-10, 10, (3,), np.float32),
        [(3, False, True)],
        dataset_id="pendulum-v0",
        actions=Box(-2, 2, (1,), np.float32),
        env="Pendulum-v1",
        ref_min_score=-1500.0,
        ref_max_score=-150.0,
    )
    data = datasets.load("minari:pendulum-v0")
    assert data.env_id == "Pendulum-v1"
    assert data.reference_scores == (-1500.0, -150.0)
    assert data.name == "pendulum-v0"


def test_a_set_that_does_not_fit_its_environment() -> None:
    for size, actions in ((3, 2), (4, 1)):
        create(
            Box(-10, 10, (size,), np.float32),
            [(3, False, True)],
            dataset_id=f"pendulum{size}-v0",
            actions=Box(-2, 2, (actions,), np.float32),
            env="Pendulum-v1",
        )
    with pytest.raises(ValueError, match="actions of size 2, Pendulum-v1 takes size 1"):
        datasets.load("minari:pendulum3-v0")
    with pytest.warns(UserWarning, match="observations of size 4, Pendulum-v1 gives size 3"):
        datasets.load("minari:pendulum4-v0")


def test_what_is_refused() -> None:
    create(Dict({"a": PLAIN, "n": Discrete(3)}), [(2, True, False)], dataset_id="a-v0")
    with pytest.raises(ValueError, match=r"minari:a-v0: the observation space holds Discrete\(3\)"):
        datasets.load("minari:a-v0")
    create(PLAIN, [(2, True, False)], dataset_id="b-v0", actions=Discrete(4))
    with pytest.raises(ValueError, match=r"the action space holds Discrete\(4\)"):
        datasets.load("minari:b-v0")
    (episode,) = create(PLAIN, [(3, True, False)], dataset_id="c-v0")
    episode.actions[1] = 2.5
    minari.create_dataset_from_buffers(
        dataset_id="d-v0", buffer=[episode], observation_space=PLAIN, action_space=ACTIONS
    )
    with pytest.raises(ValueError, match=r" at row 1, column 0 .* -2 to 2"):
        datasets.load("minari:d-v0")
    with pytest.raises(ValueError, match="'no version' is not a Minari id"):
        datasets.load("minari:no version")


def test_a_damaged_store(store: Path) -> None:
    create(PLAIN, [(300, True, False)])
    (file,) = store.rglob("*.hdf5")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"minari:lab/arm/medium-v0 in .* damaged"):
        datasets.load("lab/arm/medium-v0")


def test_a_set_that_the_remote_store_does_not_have(server: Served) -> None:
    """Asks a hub that has nothing, in a process of its own: the address is read at import."""
    server.status = 404
    code = "from iwsft import datasets\ndatasets.load('lab/arm/medium-v7')"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_ENDPOINT": server.base},
        capture_output=True,
        text=True,
        check=False,
    )
    message = result.stderr.rpartition("\nConnectionError: ")[2]
    assert message.startswith("the Minari dataset 'lab/arm/medium-v7' is not in the local store")
    assert "and could not be downloaded" in message
    assert "404" in message
    assert server.requests


def test_a_hub_that_is_not_reached_is_asked_once() -> None:
    """Nothing listens at port 9; the hub's own library asks again and again, and says so."""
    code = "from iwsft import datasets\ndatasets.load('lab/arm/medium-v7')"
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "and could not be downloaded: Connect" in result.stderr.splitlines()[-1]
    assert "Retrying" not in result.stderr


def test_the_whole_environment_is_recorded_and_scored_in() -> None:
    env = gym.wrappers.RescaleAction(gym.make("Pendulum-v1", g=5.0, max_episode_steps=9), -1, 1)
    other = gym.make("Pendulum-v1", max_episode_steps=4)
    space = Box(-10, 10, (3,), np.float32)
    for name, kwargs in (("a-v0", {"env": env}), ("b-v0", {"env": env, "eval_env": other})):
        actions = Box(-1, 1, (1,), np.float32)
        create(space, [(3, False, True)], dataset_id=name, actions=actions, **kwargs)
    data = datasets.load("minari:a-v0")
    made = environments.make(data.env_id, **data.env_kwargs)
    assert made.spec.to_json() == environments.make("Pendulum-v1", **data.env_kwargs).spec.to_json()
    assert (made.unwrapped.g, made.spec.max_episode_steps) == (5.0, 9)
    assert made.action_space.high == 1
    for each in (env, made):
        each.reset(seed=0)
    assert env.step(np.float32([0.3]))[1] == made.step(np.float32([0.3]))[1]
    assert datasets.load("minari:b-v0").env_kwargs == {"max_episode_steps": 4}


def test_a_wrapper_with_statistics_of_its_own_is_named() -> None:
    env = gym.wrappers.NormalizeObservation(gym.make("Pendulum-v1"))
    actions = Box(-1, 1, (1,), np.float32)
    create(Box(-10, 10, (3,), np.float32), [(3, False, True)], actions=actions, env=env)
    with pytest.warns(UserWarning, match="NormalizeObservation has statistics of its own"):
        (note,) = datasets.load("minari:lab/arm/medium-v0").notes
    assert note.endswith("scores are not those of the recorded environment")


@pytest.mark.filterwarnings("ignore:.*is out of date")
@pytest.mark.parametrize("env_id", ["PointMaze_UMaze-v3", "FrankaKitchen-v1"])
def test_policies_of_a_set_of_dictionaries_can_be_scored(env_id: str) -> None:
    env = environments.make(env_id, max_episode_steps=5)
    (episode,) = create(
        env.observation_space,
        [(5, False, True)],
        dataset_id="dict-v0",
        actions=env.action_space,
        env=env,
    )
    data = datasets.load("minari:dict-v0")
    columns = data.trajectories[OBSERVATION].shape[1]
    policy = GaussianPolicy(columns, env.action_space.shape[0])
    assert evaluate(policy, data.env_id, env_kwargs=data.env_kwargs, episodes=1).lengths == [5]
    flat = environments.make(data.env_id, **data.env_kwargs)
    seen = flat.observation(one(episode.observations, 0))
    np.testing.assert_array_equal(data.trajectories[OBSERVATION][0], seen.astype(np.float32))


def test_columns_of_one_number_and_wrong_sizes(store: Path) -> None:
    (episode,) = create(PLAIN, [(3, True, False)], dataset_id="plain-v0")
    plain = datasets.load("minari:plain-v0").trajectories
    names = ("rewards", "terminations", "truncations")
    episode = replace(episode, **{n: np.reshape(getattr(episode, n), (-1, 1)) for n in names})
    spaces = {"observation_space": PLAIN, "action_space": ACTIONS}
    minari.create_dataset_from_buffers(dataset_id="tall-v0", buffer=[episode], **spaces)
    assert (datasets.load("minari:tall-v0").trajectories == plain).all()

    for total in (2, 4):  # metadata of another number of steps
        file = store / "tall-v0" / "data" / "metadata.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "total_steps": total}))
        with pytest.raises(ValueError, match=f"3 steps, the metadata say {total}"):
            datasets.load("minari:tall-v0")
    with h5py.File(store / "plain-v0" / "data" / "main_data.hdf5", "r+") as data:
        short = data["episode_0/observations"][:3]
        del data["episode_0/observations"]
        data["episode_0/observations"] = short
    with pytest.raises(ValueError, match=r"episode 0 has an array of shape \[3, 3\], .* \[4, 3\]"):
        datasets.load("minari:plain-v0")


@pytest.mark.parametrize(
    ("name", "values", "problem"),
    [
        ("terminations", [0.0, 0.5, 1.0], "flags of an end other than 0 and 1"),
        ("truncations", [0, 0, -1], "flags of an end other than 0 and 1"),
        ("rewards", np.ones((3, 2)), r"rewards of shape \[3, 2\], expected \[3\]"),
    ],
)
def test_fields_that_would_be_read_as_something_else(
    store: Path, name: str, values: Any, problem: str
) -> None:
    create(PLAIN, [(3, True, False)], dataset_id="odd-v0")
    with h5py.File(store / "odd-v0" / "data" / "main_data.hdf5", "r+") as data:
        del data[f"episode_0/{name}"]
        data[f"episode_0/{name}"] = values
    with pytest.raises(ValueError, match=f"minari:odd-v0: episode 0 has {problem}"):
        datasets.load("minari:odd-v0")
