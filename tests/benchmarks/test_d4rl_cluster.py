"""Runs over a Ray cluster: two nodes of one core each, on this machine."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from benchmarks import places
from benchmarks.d4rl.__main__ import main
from benchmarks.d4rl.options import Options
from benchmarks.runs import versions
from iwsft import metrics

Job = Callable[..., Path]
STEPS = 300


@pytest.fixture(scope="module")
def raylets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[int]]:
    """A running cluster, named in the environment as a user does it; a process a node."""
    from ray.cluster_utils import Cluster

    before = dict(os.environ)
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    node = {"num_cpus": 1, "object_store_memory": 80 * 1024**2}
    project = Path.cwd()
    # Workers have another working directory than the command.
    os.chdir(tmp_path_factory.mktemp("ray"))
    nodes = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        nodes.add_node(**node)
        os.chdir(project)
        os.environ["RAY_ADDRESS"] = nodes.address
        yield [each.all_processes["raylet"][0].process.pid for each in nodes.list_all_nodes()]
    finally:
        os.chdir(project)
        nodes.shutdown()
        os.environ.clear()
        os.environ.update(before)


def worker(raylets: list[int], name: str) -> int:
    """The process that a task of this name runs in."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            title = (path / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent in raylets and title.startswith(f"ray::{name}".encode()):
            return int(path.name)
    raise AssertionError(f"no worker runs {name}")


def test_runs_over_a_cluster_survive_a_killed_worker(
    job: Job,
    raylets: list[int],
    tiny_dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One of two runs is killed half-way; both end with the numbers they have at home."""
    log = tmp_path / "far" / "d4rl" / "mine" / "bc-10" / "seed-0" / metrics.FILE
    killed: list[int] = []
    ended = threading.Event()

    def kill() -> None:
        while not ended.wait(0.05):
            if log.exists() and any(row["step"] >= STEPS // 4 for row in metrics.read(log)):
                killed.append(worker(raylets, "bc-10 seed 0"))
                os.kill(killed[0], signal.SIGKILL)
                return

    settings: dict[str, Any] = {"steps": STEPS, "eval_episodes": 2, "seeds": (0, 1)}
    killer = threading.Thread(target=kill)
    killer.start()
    data, out = (os.path.relpath(path) for path in (tiny_dataset, tmp_path / "far"))
    try:
        main(Options(algo=("bc-10",), dataset=(data,), cluster="ray", out=Path(out), **settings))
    finally:
        ended.set()
        killer.join()
    assert len(killed) == 1
    printed = capsys.readouterr()
    assert "2 done" in printed.out.splitlines() and "Ray cluster of 2 nodes" in printed.err
    told = [line for line in printed.err.splitlines() if "its Ray worker was lost" in line]
    assert len(told) == 1 and told[0].startswith("bc-10 seed 0: ")
    assert not list((tmp_path / "far").glob(".shared*"))

    home = job(tmp_path / "home", ["bc-10"], **settings)
    for seed in ("seed-0", "seed-1"):
        near, far = (
            json.loads((folder / seed / "result.json").read_text())["episode_returns"]
            for folder in (home / "bc-10", log.parents[1])
        )
        assert near == far


def test_nodes_that_can_not_do_the_work_are_named(tmp_path: Path) -> None:
    """What a node finds when it looks for what the owner of the runs has."""
    lock, data = tmp_path / ".shared-1.lock", tmp_path / "data.hdf5"

    def lacks(wanted: dict[str, str] | None = None) -> str | None:
        return places.lacks(lock, [data], wanted or versions())

    assert "does not see the folder" in str(lacks())
    lock.touch()
    assert "does not see file locks" in str(lacks())
    with FileLock(lock):
        assert lacks() == f"does not see {data}"
        data.touch()
        assert lacks() is None
        assert "torch" in str(lacks(versions() | {"torch": "1.0"}))


def test_a_node_that_lacks_something_stops_the_sweep(raylets: list[int], tmp_path: Path) -> None:
    missing = [tmp_path / "elsewhere.hdf5"]
    where = places.place(
        "ray", items=2, jobs=None, device="cpu", out=tmp_path / "runs", files=missing
    )
    with pytest.raises(ValueError, match=r"node .* does not see .*elsewhere.hdf5"), where:
        pass
    assert not list((tmp_path / "runs").iterdir())


def stopped(tmp_path: Path) -> str:
    with pytest.raises(SystemExit) as ended:
        main(Options(cluster="ray", out=tmp_path / "runs"))
    message = ended.value.code
    assert isinstance(message, str) and "\n" not in message
    assert not (tmp_path / "runs").exists()
    return message


def test_no_cluster_at_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert "error: no Ray cluster answers at RAY_ADDRESS=127.0.0.1:9" in stopped(tmp_path)


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    message = stopped(tmp_path)
    assert message == "error: --cluster ray needs the package ray: pip install 'iwsft[cluster]'"


@pytest.mark.parametrize(
    ("jobs", "device", "wanted"),
    [
        (None, "cpu", (12, 0.0)),
        (3, "cpu", (3, 0.0)),
        (None, "cuda", (4, 1.0)),
        (6, "cuda", (6, 0.5)),
        (9, "cuda", (9, 1 / 3)),
    ],
)
def test_runs_at_a_time(jobs: int | None, device: str, wanted: tuple[int, float]) -> None:
    """No more runs share a GPU than Ray can place: three of two thirds would be one too many."""
    assert places.share({"CPU": 12.0, "GPU": 4.0}, jobs, device) == wanted


@pytest.mark.parametrize(("device", "gpus"), [("cuda", 0.0), ("cuda:1", 4.0)])
def test_a_gpu_that_the_cluster_does_not_hand_out(device: str, gpus: float) -> None:
    with pytest.raises(ValueError, match=f"--device {device}: the Ray cluster has"):
        places.share({"CPU": 12.0, "GPU": gpus}, None, device)
