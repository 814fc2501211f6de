"""A small dataset and the job run on it."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from benchmarks import __main__ as console
from benchmarks import stopping
from benchmarks.d4rl.__main__ import main
from benchmarks.d4rl.options import Options
from iwsft import environments

# Tiny settings of a run that takes about a second.
TINY: dict[str, Any] = {
    "steps": 20,
    "reference_steps": 20,
    "eval_episodes": 2,
    "curve_episodes": 0,
    "jobs": 1,
}


@pytest.fixture(autouse=True)
def unwatched(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command that runs in the process of the tests leaves its watch of signals to no other."""
    monkeypatch.setattr(stopping, "_way_out", [])
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """``call(word, ...)``: the console command."""

    def run(*words: str) -> None:
        monkeypatch.setattr(sys, "argv", ["iwsft", *words])
        console.main()

    return run


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 Hopper episodes of random actions in D4RL's layout; the paper has no set of its name."""
    fields = "observations actions rewards next_observations terminals timeouts"
    columns: dict[str, list[Any]] = {field: [] for field in fields.split()}
    env = environments.make("Hopper-v4")
    env.action_space.seed(0)
    for episode in range(40):
        observation, _ = env.reset(seed=episode)
        ended = False
        while not ended:
            action = env.action_space.sample()
            following, reward, terminated, truncated, _ = env.step(action)
            ended = terminated or truncated
            row = (observation, action, reward, following, terminated, truncated)
            for key, value in zip(columns, row, strict=True):
                columns[key].append(value)
            observation = following
    env.close()
    path = tmp_path_factory.mktemp("data") / "mine.hdf5"
    with h5py.File(path, "w") as file:
        for key, values in columns.items():
            array = np.asarray(values)
            file[key] = array if array.dtype == bool else array.astype(np.float32)
        file.attrs["env_id"] = "Hopper-v4"
    return path


@pytest.fixture(scope="session")
def job(tiny_dataset: Path) -> Callable[..., Path]:
    """``job(out, algo, ...)``: run the command line on the small dataset; the dataset's folder."""

    def run(out: Path, algo: Sequence[str], **settings: Any) -> Path:
        values = {**TINY, "dataset": str(tiny_dataset), **settings}
        dataset = values.pop("dataset")
        main(Options(algo=tuple(algo), dataset=(dataset,), out=out, **values))
        return out / "d4rl" / Path(dataset).stem

    return run


@pytest.fixture(scope="session")
def read_json() -> Callable[[Path], dict[str, Any]]:
    return lambda path: json.loads(path.read_text())
