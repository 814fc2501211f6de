"""Where runs run: this process, processes of this machine, or a Ray cluster."""

from __future__ import annotations

import logging
import math
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from joblib.externals.loky.process_executor import BrokenProcessPool, ProcessPoolExecutor

from benchmarks.runs import PACKAGES, tell, versions
from iwsft.extras import require

Cluster = Literal["ray"]
Item = TypeVar("Item")
Result = TypeVar("Result")

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")


@dataclass(frozen=True)
class Place:
    """Somewhere to run ``jobs`` items at a time; ``submit`` starts ``work(item)``."""

    jobs: int
    submit: Callable[[Callable[[Any], Any], Any], Future[Any]]
    # Errors of a future whose worker was killed, and what they mean.
    lost: tuple[type[Exception], ...] = ()
    loss: str = ""


def place(
    cluster: Cluster | None, *, items: int, jobs: int | None, device: str = "cpu"
) -> AbstractContextManager[Place]:
    """A place for the time of a ``with`` block, which ends everything that still runs there.

    It is this machine, or a Ray cluster, and takes at most ``items`` items on ``device``. ``jobs``
    of them run at a time: by default one per core, or one per GPU of a cluster. One at a time on
    this machine runs in this process.

    Raises:
        ImportError: The cluster's package is not installed.
        ConnectionError: The cluster that the environment names does not answer.
        ValueError: The cluster does not have the device, or a node has other packages.
    """
    if cluster == "ray":
        return _ray_place(jobs, device)
    jobs = min(jobs or cores(), max(1, items))
    return nullcontext(Place(1, _run_here)) if jobs == 1 else _processes(jobs)


def cores() -> int:
    """Number of cores of this machine that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _run_here(work: Callable[[Any], Any], item: Any) -> Future[Any]:
    """Run an item at once, in this process."""
    future: Future[Any] = Future()
    future.set_result(work(item))
    return future


@contextmanager
def _processes(jobs: int) -> Iterator[Place]:
    """Processes of this machine, each a pool of one, because a killed worker breaks its pool."""
    idle: list[ProcessPoolExecutor] = []
    busy: dict[Future[Any], ProcessPoolExecutor] = {}
    start: Any = {"env": _ONE_THREAD, "initializer": _end_with, "initargs": (os.getpid(),)}

    def submit(work: Callable[[Any], Any], item: Any) -> Future[Any]:
        for future in [future for future in busy if future.done()]:
            pool = busy.pop(future)
            if not isinstance(future.exception(), BrokenProcessPool):
                idle.append(pool)
        pool = idle.pop() if idle else ProcessPoolExecutor(1, **start)
        try:
            # Ctrl-C reaches this process alone, which then ends its workers: they inherit the mask.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            future = pool.submit(work, item)
        except BrokenProcessPool:  # killed while it had nothing to do
            return submit(work, item)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        busy[future] = pool
        return future

    loss = "its worker was killed, perhaps for lack of memory (a lower --jobs needs less)"
    try:
        yield Place(jobs, submit, (BrokenProcessPool,), loss)
    finally:
        for pool in (*idle, *busy.values()):
            pool.shutdown(wait=False, kill_workers=True)


def _end_with(owner: int) -> None:
    """End this process soon after its owner, whose kill it would not notice."""

    def watch() -> None:
        while os.getppid() == owner:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _ray_place(jobs: int | None, device: str) -> Iterator[Place]:
    """The cluster that RAY_ADDRESS names, one that runs on this machine, or a new one of it."""
    # A cluster that is started here reports to nobody.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    require("ray")
    import ray
    from ray.exceptions import NodeDiedError, OutOfMemoryError, WorkerCrashedError

    _check_address(os.environ.get("RAY_ADDRESS", ""))
    # A program that uses Ray already keeps its connection.
    starts = not ray.is_initialized()
    if starts:
        ray.init(include_dashboard=False, logging_level=logging.WARNING)
    try:
        resources, nodes = ray.cluster_resources(), sum(node["Alive"] for node in ray.nodes())
        tell(f"Ray cluster of {nodes} nodes, {int(resources.get('CPU', 0))} cores")
        jobs, gpus = share(resources, jobs, device)
        # The sweep tries again, and says so.
        task: Any = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0)(run_on_node)
        packages = versions(PACKAGES)

        def submit(work: Callable[[Any], Any], item: Any) -> Future[Any]:
            return task.options(name=str(item)).remote(work, item, packages).future()

        loss = "its Ray worker was lost, with its node or for lack of memory"
        yield Place(jobs, submit, (NodeDiedError, OutOfMemoryError, WorkerCrashedError), loss)
    finally:
        if starts:
            ray.shutdown()


def run_on_node(work: Callable[[Item], Result], item: Item, packages: dict[str, str]) -> Result:
    """Run an item on a node of a cluster, if its packages are those of the command."""
    own = versions(PACKAGES)
    differing = [
        f"{name} {own.get(name)} (not {wanted})"
        for name, wanted in packages.items()
        if own.get(name) != wanted
    ]
    if differing:
        node = f"node {socket.gethostname()} of the Ray cluster has {', '.join(differing)}"
        raise ValueError(f"{node}; install the same packages on every node")
    return work(item)


def _check_address(address: str) -> None:
    """Check that something answers; Ray itself takes minutes to find that nothing does."""
    host, _, port = address.rpartition(":")
    if host and port.isdecimal():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            problem = f"no Ray cluster answers at RAY_ADDRESS={address} ({error})"
            raise ConnectionError(f"{problem}; start it, or unset RAY_ADDRESS") from error


def share(resources: dict[str, float], jobs: int | None, device: str) -> tuple[int, float]:
    """Number of items at a time, and the share of a GPU of each."""
    if not device.startswith("cuda"):
        return jobs or max(1, int(resources.get("CPU", 1))), 0.0
    gpus = int(resources.get("GPU", 0))
    if device != "cuda" or gpus == 0:
        problem = f"the Ray cluster has {gpus} GPUs and hands them out itself"
        raise ValueError(f"--device {device}: {problem}; pass cuda where it has some, or cpu")
    jobs = jobs or gpus
    return jobs, 1 / math.ceil(jobs / gpus)
