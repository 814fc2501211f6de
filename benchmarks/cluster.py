"""Where runs run: this process, the cores of this machine, or a Ray cluster, by one joblib call.

A place runs one item in a process of its own, so that a killed worker (the kernel's, for want of
memory, or a lost node) costs its own item and no other. joblib's own backends do not: a lost
worker ends the whole call, and its Ray backend deals items out in turn, also to busy workers.
"""

from __future__ import annotations

import math
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue
from types import ModuleType
from typing import Any, Literal, Protocol, TypeVar

from filelock import FileLock, Timeout
from joblib import Parallel, delayed
from joblib.externals.loky.process_executor import BrokenProcessPool, ProcessPoolExecutor

Cluster = Literal["ray"]
Item = TypeVar("Item")
Result = TypeVar("Result")

RETRIES = 2
# A store for numbers and error messages; 75 MiB is the least that Ray takes.
_OBJECT_STORE = 100 * 1024**2
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


class WorkerLostError(RuntimeError):
    """The process that worked on an item is gone."""


class Place(Protocol):
    """Somewhere to run items.

    Attributes:
        jobs: items at a time.
    """

    jobs: int

    def run(self, work: Callable[[Item], Result], item: Item) -> Result:
        """``work(item)``; called by ``jobs`` threads at once.

        Raises:
            WorkerLostError: the worker was killed.
        """


def each(
    work: Callable[[Item], Result],
    items: Sequence[Item],
    place: Place,
    tell: Callable[[str], None],
) -> Iterator[tuple[Item, Result | WorkerLostError]]:
    """Run ``work`` on every item; the results as they come.

    An item whose worker is killed is run again, up to ``RETRIES`` times; what it is at its end is
    then the error. What ``work`` itself raises ends everything.

    Args:
        work: takes up by itself what an earlier call left.
        items: in the order to start them.
        place: where.
        tell: takes a line on each lost worker.
    """

    def one(item: Item) -> tuple[Item, Result | WorkerLostError]:
        for _ in range(RETRIES):
            try:
                return item, place.run(work, item)
            except WorkerLostError as error:
                tell(f"{item}: {error}; going on from its last checkpoint")
        try:
            return item, place.run(work, item)
        except WorkerLostError as error:
            return item, error

    jobs = min(place.jobs, max(1, len(items)))
    # The threads only wait for the processes of the place.
    parallel = Parallel(n_jobs=jobs, backend="threading", return_as="generator_unordered")
    yield from parallel(delayed(one)(item) for item in items)


@contextmanager
def place(
    cluster: Cluster | None,
    *,
    items: int,
    jobs: int | None,
    device: str,
    out: Path,
    files: Sequence[Path],
) -> Iterator[Place]:
    """Open a place and close it at the end, with all that still runs there.

    Args:
        cluster: ``"ray"``, or None for the cores of this machine.
        items: how many there will be at most.
        jobs: items at a time; by default one a core, or one a GPU where ``device`` is one of a
            cluster. One at a time at home runs in this process.
        device: of the runs.
        out: folder that runs write to.
        files: that they read.

    Raises:
        ImportError: the cluster's package is not installed.
        ConnectionError: the cluster that the environment names does not answer.
        ValueError: a node of the cluster can't do the work.
    """
    if cluster == "ray":
        with _ray(jobs, device, out, files) as tasks:
            yield tasks
        return
    jobs = min(jobs or cores(), max(1, items))
    if jobs == 1:
        yield _Here()
        return
    processes = _Processes(jobs)
    try:
        yield processes
    finally:
        processes.close()


def cores() -> int:
    """Cores of this machine that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Here:
    """This process."""

    jobs = 1

    def run(self, work: Callable[[Item], Result], item: Item) -> Result:
        return work(item)


class _Processes:
    """Processes of this machine, each a pool of one: a broken pool takes nobody with it."""

    def __init__(self, jobs: int) -> None:
        self.jobs = jobs
        self._closed = False
        self._idle: SimpleQueue[ProcessPoolExecutor] = SimpleQueue()
        self._all: set[ProcessPoolExecutor] = set()
        for _ in range(jobs):
            self._idle.put(self._pool())

    def run(self, work: Callable[[Item], Result], item: Item) -> Result:
        pool = self._idle.get()
        try:
            return pool.submit(work, item).result()
        except BrokenProcessPool as error:
            if self._closed:
                raise
            self._all.discard(pool)
            pool = self._pool()
            raise WorkerLostError(
                "its worker was killed, perhaps for want of memory (a lower --jobs needs less)"
            ) from error
        finally:
            self._idle.put(pool)

    def _pool(self) -> ProcessPoolExecutor:
        # Its process starts at the first item.
        pool = ProcessPoolExecutor(
            1, env=_ONE_THREAD, initializer=_end_with, initargs=(os.getpid(),)
        )
        self._all.add(pool)
        return pool

    def close(self) -> None:
        """Kill what still runs."""
        self._closed = True
        for pool in list(self._all):
            pool.shutdown(wait=False, kill_workers=True)


def _end_with(owner: int) -> None:
    """End this process soon after its owner, whose kill it would not notice."""

    def watch() -> None:
        while os.getppid() == owner:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class _RayTasks:
    """Tasks of a Ray cluster, a core each; Ray chooses the node and ends them with this process."""

    def __init__(self, ray: ModuleType, jobs: int, gpus: float) -> None:
        self.jobs = jobs
        self._ray = ray
        self._running: set[Any] = set()
        # each() tries again, and tells.
        self._task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(_call)
        lost = ray.exceptions
        self._lost = (lost.WorkerCrashedError, lost.NodeDiedError, lost.OutOfMemoryError)

    def run(self, work: Callable[[Item], Result], item: Item) -> Result:
        ref = self._task.options(name=str(item)).remote(work, item)
        self._running.add(ref)
        try:
            result: Result = self._ray.get(ref)
        except self._lost as error:
            raise WorkerLostError(f"its Ray worker was lost ({type(error).__name__})") from error
        finally:
            self._running.discard(ref)
        return result

    def close(self) -> None:
        """Kill what still runs."""
        for ref in list(self._running):
            self._ray.cancel(ref, force=True)


def _call(work: Callable[[Item], Result], item: Item) -> Result:
    return work(item)


@contextmanager
def _ray(jobs: int | None, device: str, out: Path, files: Sequence[Path]) -> Iterator[Place]:
    # A cluster that is started here reports to nobody.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.exceptions
    except ImportError as error:
        raise ImportError(
            "--cluster ray needs the package ray: pip install 'iwsft[cluster]'"
        ) from error
    ours = not ray.is_initialized()
    if ours:
        _connect(ray, jobs)
    try:
        _check_nodes(ray, out, files)
        tasks = _RayTasks(ray, *share(ray.cluster_resources(), jobs, device))
        try:
            yield tasks
        finally:
            tasks.close()
    finally:
        if ours:
            ray.shutdown()


def _connect(ray: ModuleType, jobs: int | None) -> None:
    """Join the cluster of the environment or of this machine, or start one for this process."""
    address = os.environ.get("RAY_ADDRESS")
    host, _, port = (address or "").rpartition(":")
    if host and port.isdecimal():
        try:
            # Ray itself takes minutes to say so.
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ConnectionError(
                f"no Ray cluster answers at RAY_ADDRESS={address} ({error}); start it, or unset "
                "RAY_ADDRESS for one of this machine's cores"
            ) from error
    if address != "local":
        try:
            ray.init(address=address or "auto", logging_level="warning")
            return
        except ConnectionError:
            if address is not None:
                raise
    ray.init(
        address="local",
        num_cpus=jobs or cores(),
        include_dashboard=False,
        object_store_memory=_OBJECT_STORE,
        logging_level="warning",
    )


def share(resources: dict[str, float], jobs: int | None, device: str) -> tuple[int, float]:
    """Items at a time, and the GPUs of one.

    Raises:
        ValueError: the device is no choice in this cluster.
    """
    if not device.startswith("cuda"):
        return jobs or max(1, int(resources.get("CPU", 1))), 0.0
    gpus = int(resources.get("GPU", 0))
    if device != "cuda" or gpus == 0:
        raise ValueError(
            f"--device {device}: the Ray cluster has {gpus} GPUs and hands them out itself; "
            "pass cuda where it has some, or cpu"
        )
    jobs = jobs or gpus
    return jobs, 1 / math.ceil(jobs / gpus)


def _check_nodes(ray: ModuleType, out: Path, files: Sequence[Path]) -> None:
    """Check on every node that it has the code, the folder of the runs and the data.

    Raises:
        ValueError: naming the node, what it lacks and the way out.
    """
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from benchmarks.provenance import versions  # with torch, which a mere worker need not load

    out.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(8)
    path = out / f".shared-{token}"
    nodes = [node for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
    try:
        path.write_text(token)
        with FileLock(path.with_suffix(".lock")):
            looks = {
                node["NodeManagerAddress"]: ray.remote(num_cpus=0, max_retries=0)(lacks)
                .options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], False))
                .remote(path, token, [str(file) for file in files], versions())
                for node in nodes
            }
            for address, look in looks.items():
                try:
                    problem = ray.get(look)
                except ray.exceptions.RayError as error:
                    problem = f"can't run this project: {str(error).strip().splitlines()[-1]}"
                if problem:
                    raise ValueError(
                        f"node {address} of the Ray cluster {problem}; every node needs the "
                        "project, the data files and --out at the same paths on a shared file "
                        "system, and the same packages"
                    )
    finally:
        path.unlink(missing_ok=True)
        path.with_suffix(".lock").unlink(missing_ok=True)
    cpus = int(ray.cluster_resources().get("CPU", 0))
    print(f"Ray cluster of {len(nodes)} nodes, {cpus} cores", file=sys.stderr)


def lacks(path: Path, token: str, files: Sequence[str], wanted: dict[str, str]) -> str | None:
    """What this machine lacks to work on runs that another one owns; None where it lacks nothing.

    Args:
        path: a file that the owner wrote, and whose lock (``.lock``) it holds.
        token: what it wrote.
        files: of the data.
        wanted: versions of the packages.
    """
    from benchmarks.provenance import versions

    try:
        seen = path.read_text()
    except OSError:
        seen = ""
    if seen != token:
        return f"does not see the folder {path.parent} of {socket.gethostname()}"
    try:
        with FileLock(path.with_suffix(".lock"), timeout=0):
            return f"does not see file locks in {path.parent}, which keep runs apart"
    except Timeout:
        pass
    missing = [file for file in files if not Path(file).exists()]
    if missing:
        return f"does not see {', '.join(missing)}"
    has = versions()
    differ = [
        f"{name} {has.get(name)} (not {want})"
        for name, want in wanted.items()
        if has.get(name) != want
    ]
    return f"has {', '.join(differ)}" if differ else None
