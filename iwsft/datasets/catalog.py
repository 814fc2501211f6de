"""D4RL's datasets by name: file, mirrors, environment, checksum and reference scores.

File names are those of D4RL's own list (https://github.com/Farama-Foundation/D4RL, Apache-2.0).
Environments are those of gymnasium and gymnasium-robotics whose observations have the columns of
the files. Their arguments make the tasks D4RL's: locomotion has v4 (v5 changed physics and
rewards), AntMaze and Adroit have the conventions of :mod:`iwsft.d4rl_conventions`, and Kitchen the
four tasks and D4RL's sensor noise.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import resources
from typing import Any

MIRRORS_VARIABLE = "IWSFT_D4RL_MIRRORS"
_BERKELEY = "https://rail.eecs.berkeley.edu/datasets/offline_rl"
_HUGGING_FACE = "https://huggingface.co/datasets/imone/D4RL/resolve/main"
_D4RL = {"conventions": "d4rl"}


@dataclass(frozen=True)
class Entry:
    """A dataset of D4RL.

    ``path`` is that of the file below Berkeley's download root; mirrors have only its last part.
    ``env_kwargs`` are for :func:`iwsft.environments.make`. The SHA-256 of the file is None where it
    is not known.
    """

    name: str
    path: str
    env_id: str
    env_kwargs: Mapping[str, Any] = field(default_factory=dict)
    sha256: str | None = None

    @property
    def filename(self) -> str:
        """The name of the file."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def url(self) -> str:
        """The address of the file at D4RL itself."""
        return f"{_BERKELEY}/{self.path}"

    @property
    def urls(self) -> list[str]:
        """All addresses of the file, in the order to try.

        The base URLs in the environment variable ``IWSFT_D4RL_MIRRORS`` (separated by commas) come
        first; the file's name is appended to each.
        """
        bases = os.environ.get(MIRRORS_VARIABLE, "").replace(",", " ").split()
        mirrors = [f"{base.rstrip('/')}/{self.filename}" for base in bases]
        return [*mirrors, self.url, f"{_HUGGING_FACE}/{self.filename}"]


def find(name: str) -> Entry | None:
    """Find the entry of a D4RL name, or of a D4RL file name (``hopper_medium_replay-v2.hdf5``)."""
    return CATALOG.get(name.removesuffix(".hdf5")) or _BY_FILENAME.get(name)


def reference_scores(
    name_or_env_id: str, env_kwargs: Mapping[str, Any] | None = None
) -> tuple[float, float] | None:
    """Return the returns that D4RL scores as 0 and 100 (https://arxiv.org/abs/2004.07219), or None.

    Args:
        name_or_env_id: D4RL's name of a dataset (``hopper-medium-v2``), or the id of a D4RL task's
            environment (``Hopper-v4``).
        env_kwargs: Arguments of the environment; those of D4RL's task by default. Others make
            another task, which has no such returns.
    """
    table = _reference_table()
    if env_kwargs is None and name_or_env_id in table:
        return table[name_or_env_id]
    tasks = [entry for entry in CATALOG.values() if entry.env_id == name_or_env_id]
    if tasks and env_kwargs is not None and all(entry.env_kwargs != env_kwargs for entry in tasks):
        from iwsft import environments

        given = environments.complete(name_or_env_id, env_kwargs)
        tasks = [x for x in tasks if environments.complete(x.env_id, x.env_kwargs) == given]
    return table[tasks[0].name] if tasks else None


@cache
def _reference_table() -> dict[str, tuple[float, float]]:
    text = (resources.files("iwsft.datasets") / "data" / "d4rl_reference_scores.json").read_text()
    return {name: (low, high) for name, (low, high) in json.loads(text)["scores"].items()}


def _locomotion() -> list[Entry]:
    kinds = ("random", "medium", "expert", "medium-replay", "medium-expert", "full-replay")
    entries = []
    for task in ("HalfCheetah", "Hopper", "Walker2d", "Ant"):
        for kind in kinds:
            path = f"gym_mujoco_v2/{task.lower()}_{kind.replace('-', '_')}-v2.hdf5"
            entries.append(Entry(f"{task.lower()}-{kind}-v2", path, f"{task}-v4"))
    return entries


def _antmaze() -> list[Entry]:
    mazes = {
        "umaze": ("u-maze", False, False, "UMaze"),
        "umaze-diverse": ("u-maze", True, True, "UMaze"),
        "medium-play": ("big-maze", True, False, "Medium"),
        "medium-diverse": ("big-maze", True, True, "Medium"),
        "large-play": ("hardest-maze", True, False, "Large"),
        "large-diverse": ("hardest-maze", True, True, "Large"),
    }
    return [
        Entry(
            f"antmaze-{maze}-{version}",
            f"{folder}/Ant_maze_{file}_noisy_multistart_{starts}_multigoal_{goals}_sparse{tail}.hdf5",
            f"AntMaze_{size}-v4",
            _D4RL,
        )
        for version, folder, tail in (("v0", "ant_maze_new", ""), ("v2", "ant_maze_v2", "_fixed"))
        for maze, (file, starts, goals, size) in mazes.items()
    ]


def _kitchen() -> list[Entry]:
    files = {
        "complete": (
            "mini_kitchen_microwave_kettle_light_slider",
            "slide cabinet",
            "cd797c38cd52dfbe3f960cef73935cc724847abd189e47a703a7a2315ed60a81",
        ),
        "partial": (
            "kitchen_microwave_kettle_light_slider",
            "slide cabinet",
            "57bfd9c5fe88a7cf702bbaf8b7cd800d30cd869e7f73416007238d26cd859800",
        ),
        "mixed": (
            "kitchen_microwave_kettle_bottomburner_light",
            "bottom burner",
            "a30382a50278fdaea2e2d88e5f2836a95bcf9b581d252617872fd6537302721b",
        ),
    }
    noise = {"robot_noise_ratio": 0.1, "object_noise_ratio": 0.1}
    tasks = ["microwave", "kettle", "light switch"]
    return [
        Entry(
            f"kitchen-{kind}-v0",
            f"kitchen/{file}-v0.hdf5",
            "FrankaKitchen-v1",
            {"tasks_to_complete": [*tasks, fourth], **noise},
            sha256,
        )
        for kind, (file, fourth, sha256) in files.items()
    ]


def _adroit() -> list[Entry]:
    v0 = {
        "human": "{task}-v0_demos_clipped",
        "cloned": "{task}-demos-v0-bc-combined",
        "expert": "{task}-v0_expert_clipped",
    }
    v1 = {kind: f"{{task}}-{kind}-v1" for kind in v0}
    return [
        Entry(
            f"{task}-{kind}-{version}",
            f"{folder}/{file.format(task=task)}.hdf5",
            f"AdroitHand{task.capitalize()}-v1",
            _D4RL,
        )
        for version, folder, files in (("v0", "hand_dapg", v0), ("v1", "hand_dapg_v1", v1))
        for task in ("pen", "hammer", "door", "relocate")
        for kind, file in files.items()
    ]


CATALOG = {entry.name: entry for entry in _locomotion() + _antmaze() + _kitchen() + _adroit()}
_BY_FILENAME = {entry.filename: entry for entry in CATALOG.values()}
# Columns of observation and action of these environments, with D4RL's arguments.
SIZES = {
    **{"HalfCheetah-v4": (17, 6), "Hopper-v4": (11, 3), "Walker2d-v4": (17, 6), "Ant-v4": (27, 8)},
    **dict.fromkeys(("AntMaze_UMaze-v4", "AntMaze_Medium-v4", "AntMaze_Large-v4"), (29, 8)),
    **{"AdroitHandPen-v1": (45, 24), "AdroitHandHammer-v1": (46, 26)},
    **{"AdroitHandDoor-v1": (39, 28), "AdroitHandRelocate-v1": (39, 30)},
    "FrankaKitchen-v1": (60, 9),
}
