"""Generated HDF5 files, Minari sets and run folders: what is accepted must be the truth."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from benchmarks.d4rl.__main__ import main as control_main
from benchmarks.d4rl.options import Options as ControlOptions
from benchmarks.report.scores import cells
from benchmarks.results import CONTROL, read_all, read_runs
from benchmarks.stopping import expected
from iwsft import datasets
from iwsft.trajectory import ACTION, NEXT_OBSERVATION, OBSERVATION, REWARD, TERMINATED, lengths
from scripts.campaigns.engine import Campaign, Finding
from scripts.campaigns.kills import write_steps

Array = NDArray[Any]


@dataclass
class Episode:
    """The truth of an episode: T + 1 observations, T actions and rewards, and how it ends."""

    observations: Array
    actions: Array
    rewards: Array
    terminated: bool


def draw_episodes(random: Random) -> list[Episode]:
    """One to six short episodes, whose numbers are exact in any dtype."""
    generator = np.random.default_rng(random.getrandbits(32))
    # Three columns and more: states of two episodes are not equal by chance.
    observation, action = int(generator.integers(3, 7)), int(generator.integers(1, 4))

    def numbers(*shape: int) -> Array:
        return generator.integers(-64, 65, shape) / 64

    sizes = generator.integers(1, 13, generator.integers(1, 7))
    return [
        Episode(
            numbers(n + 1, observation),
            numbers(n, action),
            generator.integers(-3, 9, n).astype(float),
            bool(generator.integers(2)),
        )
        for n in sizes
    ]


def refusal(error: Exception, names: Sequence[str]) -> Iterator[Finding]:
    """An error must be one that a user can mend, and name one of ``names``."""
    text = str(error)
    if not isinstance(error, (*expected(), TypeError)) or not any(name in text for name in names):
        yield "obscure", f"{type(error).__name__}: {text[:300]}"


def compare(data: Any, episodes: list[Episode], *, following: bool) -> Iterator[Finding]:
    """Compare loaded trajectories with the truth; ``following``: also the next observations."""
    steps = data.trajectories
    sizes = lengths(steps).tolist()
    true_sizes = [len(episode.rewards) for episode in episodes]
    if sizes != true_sizes:
        yield "silent", f"episodes of {sizes} steps, right: {true_sizes}"
        return
    whole = {
        OBSERVATION: np.concatenate([e.observations[:-1] for e in episodes]),
        ACTION: np.concatenate([e.actions for e in episodes]),
        REWARD: np.concatenate([e.rewards for e in episodes])[:, None],
    }
    if following:
        whole[NEXT_OBSERVATION] = np.concatenate([e.observations[1:] for e in episodes])
    for key, true in whole.items():
        if not np.array_equal(steps[key].numpy(), true.astype(np.float32)):
            yield "silent", f"{key} differ"
    ends = steps[TERMINATED].squeeze(-1).numpy()[np.cumsum(sizes) - 1]
    if ends.tolist() != [episode.terminated for episode in episodes]:
        yield "silent", "episodes end in another way"


# ---- HDF5 files in D4RL's layout


def _columns(episodes: list[Episode]) -> dict[str, Array]:
    sizes = [len(episode.rewards) for episode in episodes]
    ends = np.isin(np.arange(sum(sizes)), np.cumsum(sizes) - 1)
    terminated = np.repeat([episode.terminated for episode in episodes], sizes)
    return {
        "observations": np.concatenate([e.observations[:-1] for e in episodes]),
        "actions": np.concatenate([e.actions for e in episodes]),
        "rewards": np.concatenate([e.rewards for e in episodes]),
        "next_observations": np.concatenate([e.observations[1:] for e in episodes]),
        "terminals": ends & terminated,
        "timeouts": ends & ~terminated,
    }


def _hdf5_case(_: Path, random: Random, folder: Path) -> Iterator[Finding]:
    episodes = draw_episodes(random)
    columns = _columns(episodes)
    for key, value in columns.items():
        if value.dtype == bool:
            columns[key] = value.astype(random.choice(["?", "u1", "i8", "f4"]))
        else:
            kinds = ["f2", "f4", "f8"] + (["i4"] if key == "rewards" else [])
            columns[key] = value.astype(random.choice(kinds))
        if columns[key].ndim == 1 and random.random() < 0.3:
            columns[key] = columns[key][:, None]
    following = random.random() < 0.7
    if not following:
        del columns["next_observations"]
    # Without timeouts, what tells one episode from the next is that its observations do not go on.
    known = True
    if random.random() < 0.3:
        del columns["timeouts"]
        known = following or all(episode.terminated for episode in episodes[:-1])
    damage = random.choice([None, *_DAMAGE]) if random.random() < 0.6 else None
    if damage is not None:
        _DAMAGE[damage](columns, random)
    path = folder / "generated.hdf5"
    with h5py.File(path, "w") as file:
        for key, value in columns.items():
            file[key] = value
        if random.random() < 0.3:
            file["infos/qpos"] = np.zeros(3)
            file.attrs["algorithm"] = "sac"
    cut = damage is None and random.random() < 0.3
    if cut:
        path.write_bytes(path.read_bytes()[: random.randrange(path.stat().st_size)])
    yield "tried", ""
    try:
        data = datasets.load(path)
    except Exception as error:
        yield from refusal(error, [path.name])
        if damage is None and not cut and known:
            yield "lost", f"a right file is refused: {error}"
        return
    if damage is not None:
        yield "silent", f"{damage} is accepted"
    elif known:
        yield from compare(data, episodes, following=following)


def _field(columns: dict[str, Array], random: Random, *names: str) -> str:
    return random.choice([name for name in names if name in columns])


def _with(value: object, *names: str) -> Callable[[dict[str, Array], Random], None]:
    """Put a value into a row of one of the fields."""

    def change(columns: dict[str, Array], random: Random) -> None:
        name = _field(columns, random, *names)
        columns[name] = columns[name].astype("f4")
        columns[name][random.randrange(len(columns[name]))] = value

    return change


def _changed(by: Callable[[Array], Array], *names: str) -> Callable[..., None]:
    """Change one of the fields, by default any."""

    def change(columns: dict[str, Array], random: Random) -> None:
        name = _field(columns, random, *(names or columns))
        columns[name] = by(columns[name])

    return change


def _without(columns: dict[str, Array], random: Random) -> None:
    del columns[_field(columns, random, "observations", "actions", "rewards", "terminals")]


def _empty(columns: dict[str, Array], random: Random) -> None:
    for name in columns:
        columns[name] = columns[name][:0]


def _other_width(columns: dict[str, Array], random: Random) -> None:
    columns["next_observations"] = np.zeros((len(columns["actions"]), 9), "f4")


_NUMBERS = ("observations", "actions", "rewards", "next_observations")
_DAMAGE: dict[str, Callable[[dict[str, Array], Random], None]] = {
    "NaN": _with(np.nan, *_NUMBERS),
    "infinity": _with(np.inf, *_NUMBERS),
    "a flag of 2": _with(2, "terminals", "timeouts"),
    "a flag of 0.5": _with(0.5, "terminals", "timeouts"),
    "a shorter field": _changed(lambda x: x[:-1] if len(x) > 1 else x.repeat(2, 0)),
    "a missing field": _without,
    "text": _changed(lambda x: np.array([b"a"] * len(x))),
    "complex numbers": _changed(lambda x: x.astype("c8"), *_NUMBERS[:3]),
    "no rows": _empty,
    "two rewards a step": _changed(lambda x: np.stack([x, x], 1).reshape(len(x), -1), "rewards"),
    "next observations of another width": _other_width,
}


# ---- Minari sets


def _prepare_minari(shared: Path) -> None:
    """A small set of a box space, with the truth beside it."""
    os.environ["MINARI_DATASETS_PATH"] = str(shared / "store")
    import gymnasium as gym
    import minari
    from minari.data_collector import EpisodeBuffer

    episodes = draw_episodes(Random(0))
    buffers = [
        EpisodeBuffer(
            id=number,
            observations=e.observations.astype("f4"),
            actions=e.actions.astype("f4"),
            rewards=list(e.rewards),
            terminations=[False] * (len(e.rewards) - 1) + [e.terminated],
            truncations=[False] * (len(e.rewards) - 1) + [not e.terminated],
        )
        for number, e in enumerate(episodes)
    ]
    width, action = episodes[0].observations.shape[1], episodes[0].actions.shape[1]
    minari.create_dataset_from_buffers(
        "made/set-v0",
        buffer=buffers,
        observation_space=gym.spaces.Box(-2, 2, (width,), np.float32),
        action_space=gym.spaces.Box(-1, 1, (action,), np.float32),
    )


def _minari_case(shared: Path, random: Random, folder: Path) -> Iterator[Finding]:
    shutil.copytree(shared / "store", folder / "store")
    os.environ["MINARI_DATASETS_PATH"] = str(folder / "store")
    data = folder / "store" / "made" / "set-v0" / "data"
    path = data / random.choice(["main_data.hdf5", "metadata.json"])
    change = random.choice(["none", "cut", "episode", "metadata"])
    if change == "cut":
        path.write_bytes(path.read_bytes()[: random.randrange(path.stat().st_size)])
    elif change == "episode":
        change = _change_episode(data / "main_data.hdf5", random)
    elif change == "metadata":
        content = json.loads((data / "metadata.json").read_text())
        name = random.choice(sorted(content))
        content[name] = random.choice([None, -1, "x", [], 10**9])
        change = f"{name} is {content[name]!r} in metadata.json"
        (data / "metadata.json").write_text(json.dumps(content))
    yield "tried", change
    try:
        loaded = datasets.load("minari:made/set-v0")
    except Exception as error:
        yield from refusal(error, ["minari:made/set-v0", "set-v0"])
        if change == "none":
            yield "lost", f"a right set is refused: {error}"
        return
    for kind, text in compare(loaded, draw_episodes(Random(0)), following=True):
        yield kind, f"{change}: {text}"


def _change_episode(path: Path, random: Random) -> str:
    """Change a field or the total of an episode; what was changed."""
    with h5py.File(path, "r+") as file:
        group = file[random.choice(list(file))]
        name = random.choice(["total_steps", "observations", "actions", "rewards", "terminations"])
        if name == "total_steps":
            group.attrs[name] = int(group.attrs[name]) + random.choice([-1, 1, 1000])
            return f"total_steps of {group.name}"
        values = group[name][()]
        how = random.choice(["shorter", "longer", "wider", "gone"])
        del group[name]
        if how == "shorter":
            group[name] = values[:-1]
        elif how == "longer":
            group[name] = np.concatenate([values, values[-1:]])
        elif how == "wider":
            group[name] = np.stack([values, values], -1)
        return f"{name} of {group.name} {how}"


# ---- run folders


def _prepare_folders(shared: Path) -> None:
    write_steps(shared, episodes=12)
    control_main(
        ControlOptions(
            algo=("bc", "sft-q"),
            dataset=(str(shared / "data.hdf5"),),
            seeds=(0, 1),
            steps=4,
            reference_steps=4,
            eval_episodes=1,
            curve_episodes=0,
            jobs=1,
            out=shared / "runs",
        )
    )


def _folders_case(shared: Path, random: Random, folder: Path) -> Iterator[Finding]:
    shutil.copytree(shared / "runs", folder / "runs")
    files = sorted(
        path
        for path in (folder / "runs").rglob("*")
        if path.name in ("result.json", "config.json", "metrics.jsonl")
        if "reference" not in path.parts
    )
    path = random.choice(files)
    how = random.choice(["cut", "empty", "folder", "NaN", "other kind", "array", "bytes", "gone"])
    if how == "cut":
        path.write_bytes(path.read_bytes()[: random.randrange(path.stat().st_size)])
    elif how in ("empty", "array", "bytes"):
        path.write_bytes({"empty": b"", "array": b"[1, 2]\n", "bytes": b"\xff\xfe\x00"}[how])
    elif how in ("folder", "gone"):
        path.unlink()
        if how == "folder":
            path.mkdir()
    else:
        lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        row = random.randrange(len(lines))
        content = json.loads(lines[row])
        name = random.choice(sorted(content))
        content[name] = float("nan") if how == "NaN" else random.choice([None, [1], {}, True])
        how = f"{name} is {content[name]!r}"
        lines[row] = json.dumps(content)
        path.write_text("\n".join(lines) + "\n")
    yield "tried", ""
    try:
        finished, others = read_all(folder / "runs", CONTROL)
        read = {cell.algo: cell.mean for cell in cells(finished)}
        damaged = [run for run in others if run.damage]
    except Exception as error:
        yield from refusal(error, [str(path.relative_to(folder / "runs")), path.parent.name])
        return
    left_out = {run.folder.relative_to(folder / "runs") for run in damaged}
    if left_out - {path.parent.relative_to(folder / "runs")}:
        yield "lost", f"{path.name}, {how}: {left_out} are left out"
    for run in damaged:
        if path.name not in run.damage:
            yield "obscure", f"{path.name}, {how}: {run.damage}"
    runs = read_runs(shared / "runs", CONTROL)
    others = [run for run in runs if run.folder.relative_to(shared / "runs") not in left_out]
    right = {cell.algo: cell.mean for cell in cells(others)}
    # A run whose result is gone is unfinished.
    if how not in ("gone", "folder") and read != right and path.name == "result.json":
        yield "silent", f"{path.name}, {how}: scores {read}, right: {right}"


CAMPAIGNS = (
    Campaign("HDF5 files", _hdf5_case),
    Campaign("Minari sets", _minari_case, _prepare_minari),
    Campaign("run folders", _folders_case, _prepare_folders),
)
