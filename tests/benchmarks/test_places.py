"""Places of runs: processes of this machine, and a Ray cluster of two nodes with a core each."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import places, runs, stopping
from benchmarks.d4rl.__main__ import main
from benchmarks.d4rl.options import Options
from benchmarks.d4rl.run import Run
from benchmarks.d4rl.train import train_and_score
from benchmarks.places import run_on_node
from benchmarks.runs import PACKAGES, RESULT, versions
from benchmarks.sweep import RETRIES, Summary, run_all
from iwsft import metrics
from iwsft.files import write_json

Job = Callable[..., Path]
STEPS = 300
RUNS: dict[str, Any] = {"steps": STEPS, "eval_episodes": 2, "curve_episodes": 1, "seeds": (0, 1)}


@pytest.fixture(scope="module")
def raylets(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[int]]:
    """A running cluster, named in the environment as a user does it; each node is a process."""
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


def status(pid: int | str) -> tuple[str, int]:
    """State and parent of a process; "X" of one that is gone."""
    try:
        state, parent, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "X", 0
    return state, int(parent)


def workers(owners: list[int], title: bytes) -> list[int]:
    """The children of processes that have a title."""
    pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
    children = [pid for pid in pids if status(pid)[1] in owners]
    return [pid for pid in children if title in Path(f"/proc/{pid}/cmdline").read_bytes()]


def wait(due: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while not due():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def undisturbed(job: Job, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs in this process."""
    return job(tmp_path_factory.mktemp("undisturbed"), ["bc-10"], **RUNS)


@pytest.mark.parametrize("cluster", [None, "ray"])
def test_a_killed_worker_costs_no_run(
    undisturbed: Path,
    tiny_dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
    cluster: places.Cluster | None,
) -> None:
    """SIGKILL half-way, as the kernel sends it: both runs end with the numbers of this process."""
    owners, title, loss = [os.getpid()], b"LokyProcess", "its worker was killed"
    if cluster is not None:
        owners, title = request.getfixturevalue("raylets"), b"ray::mine bc-10 seed 0"
        loss = "its Ray worker was lost"
    out = tmp_path / "runs"
    logs = [out / "d4rl" / "mine" / "bc-10" / f"seed-{seed}" / metrics.FILE for seed in (0, 1)]
    ended = threading.Event()

    def half_way() -> bool:
        rows = [metrics.read(log) if log.exists() else [] for log in logs]
        return all(any(row["step"] >= STEPS // 4 for row in log) for log in rows)

    def kill() -> None:
        while not ended.wait(0.02):
            if half_way():
                os.kill(workers(owners, title)[0], signal.SIGKILL)
                return

    killer = threading.Thread(target=kill)
    killer.start()
    # A cluster's workers have another working directory.
    data, relative = (os.path.relpath(path) for path in (tiny_dataset, out))
    try:
        main(
            Options(
                algo=("bc-10",),
                dataset=(data,),
                cluster=cluster,
                jobs=2,
                out=Path(relative),
                **RUNS,
            )
        )
    finally:
        ended.set()
        killer.join()
    printed = capsys.readouterr()
    assert "2 done" in printed.out.splitlines()
    assert ("Ray cluster of 2 nodes" in printed.err) == (cluster is not None)
    (line,) = (line for line in printed.err.splitlines() if loss in line)
    assert line.startswith("mine bc-10 seed ") and "it continues from its last checkpoint" in line
    for log in logs:
        results = [
            json.loads((folder / "result.json").read_text())["episode_returns"]
            for folder in (log.parent, undisturbed / "bc-10" / log.parent.name)
        ]
        assert results[0] == results[1]


def test_a_run_that_kills_its_workers_is_given_up_and_the_others_end(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    attempts = tmp_path / "attempts"

    def work(run: runs.Run[Any]) -> None:
        if run.algo == "bad":
            with attempts.open("a") as file:
                file.write("x")
            os.kill(os.getpid(), signal.SIGKILL)
        write_json(run.folder / RESULT, {"threads": os.environ.get("OMP_NUM_THREADS")})

    made, summary = runs_of(tmp_path, "a", "bad", "b", "c"), Summary()
    with places.place(None, items=4, jobs=2) as place:
        run_all(work, made, place, summary)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.endswith(": done")]
    error = lines.pop()
    for run in made:
        path = run.folder / RESULT
        assert run.algo == "bad" or json.loads(path.read_text()) == {"threads": "1"}
    (failed,) = summary.failed
    assert summary.done == 3 and error == f"error: {failed}"
    assert len(attempts.read_text()) == 1 + RETRIES and len(lines) == RETRIES
    assert all(
        line.startswith("mine bad seed 0: its worker was killed") for line in (*lines, failed)
    )


def runs_of(out: Path, *algos: str) -> list[runs.Run[Any]]:
    """Runs of algorithms with these names, for whose class workers import no benchmark."""

    class Made(runs.Run[Any]):
        benchmark = "made"

    return [Made("mine", algo, 0, SimpleNamespace(out=out)) for algo in algos]


def own_workers(folder: Path) -> None:
    """Own two workers that touch a file and sleep."""

    def work(run: runs.Run[Any]) -> None:
        (folder / run.algo).touch()
        time.sleep(300)

    stopping.watch()
    with places.place(None, items=2, jobs=2) as place:
        run_all(work, runs_of(folder, "a", "b"), place, Summary())


# Not SIGINT: a suite that runs in the background of a shell ignores it, and so would the owner.
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_their_owner(tmp_path: Path, how: signal.Signals) -> None:
    owner = multiprocessing.get_context("fork").Process(target=own_workers, args=(tmp_path,))
    owner.start()
    assert owner.pid is not None
    wait(lambda: len(list(tmp_path.iterdir())) == 2)
    pids = workers([owner.pid], b"LokyProcess")
    os.kill(owner.pid, how)
    owner.join()
    assert len(pids) == 2
    wait(lambda: all(status(pid)[0] in "XZ" for pid in pids))


def test_a_node_that_does_not_see_the_folder_is_named(tmp_path: Path) -> None:
    run = Run("mine", "bc", 0, Options(out=tmp_path), "mine.hdf5")
    with pytest.raises(FileNotFoundError, match=f"does not see {run.folder}; every node"):
        train_and_score([run], [lambda *_: None])
    assert not run.folder.exists()


def stopped(tmp_path: Path) -> str:
    with pytest.raises(SystemExit) as ended:
        main(Options(cluster="ray", out=tmp_path / "runs"))
    message = ended.value.code
    assert isinstance(message, str) and "\n" not in message
    assert not (tmp_path / "runs").exists()
    return message


def test_a_node_with_other_packages_runs_nothing() -> None:
    assert run_on_node(len, "item", versions(PACKAGES)) == 4
    with pytest.raises(ValueError, match=r"has torch .* \(not 0\.1\); install the same packages"):
        run_on_node(pytest.fail, "item", {**versions(PACKAGES), "torch": "0.1"})


def test_no_cluster_at_the_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert "error: no Ray cluster answers at RAY_ADDRESS=127.0.0.1:9" in stopped(tmp_path)


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)  # as if it were not installed
    message = stopped(tmp_path)
    assert message == "error: ray is not installed: pip install 'iwsft[cluster]'"


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
