"""Rows of a speed table: time and memory of two ways, or of one way on data of several sizes."""

from __future__ import annotations

import ctypes
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from statistics import linear_regression, median
from typing import Literal, TypeVar

import torch

MB = 1e6
Result = TypeVar("Result")


@dataclass(frozen=True)
class Comparison:
    """One comparison: ``ratio`` is peer / ours, above 1 where ours is faster or smaller."""

    name: str
    ours: float
    peer: float
    unit: str
    peer_name: str
    ratio: float = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "ratio", self.peer / self.ours)

    @property
    def line(self) -> str:
        """The ratio in a line."""
        return f"{self.ratio:8.2f} x  {self.name}"


class DisagreementError(RuntimeError):
    """Ours and the peer do not compute the same."""


@dataclass(frozen=True)
class Check:
    """A figure that is at most its limit; otherwise the rows compare different computations."""

    name: str
    value: float
    limit: float

    def __post_init__(self) -> None:
        # NaN does not agree either.
        if not self.value <= self.limit:
            problem = f"{self.name} is {self.value:.3g}, more than {self.limit:.3g}"
            raise DisagreementError(f"{problem}: two different computations can't be compared")


@dataclass(frozen=True)
class Cost:
    """Processor seconds of a stage on data of one size, and the MB by which it raises the peak.

    The memory is None where the system does not let a process reset its peak (Linux does).
    """

    stage: str
    size: int
    of: str
    seconds: float
    mb: float | None

    @property
    def line(self) -> str:
        """The cost in a line."""
        memory = "" if self.mb is None else f"{self.mb:10.1f} MB"
        return f"{self.seconds:10.4g} s {memory}  {self.stage}, {self.size:,} {self.of}"


def measured(
    stage: str, *, size: int, of: str, run: Callable[[], Result], repeats: int
) -> tuple[Cost, Result]:
    """Return the cost of a stage, with the median of ``repeats`` times, and the stage's result.

    A repeat makes as many calls as take about 20 ms. A stage of a second or more is called once.
    """

    def seconds(calls: int) -> float:
        start = time.process_time()
        for _ in range(calls):
            run()
        return (time.process_time() - start) / calls

    resettable = _reset_peak()
    before, start = peak_bytes(), time.process_time()
    result = run()
    times = [time.process_time() - start]
    mb = (peak_bytes() - before) / MB if resettable else None
    if times[0] < 1:
        calls = math.ceil(0.02 / max(times[0], 1e-4))
        times = [seconds(calls) for _ in range(repeats)]
    return Cost(stage, size, of, median(times), mb), result


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the exponent of the power law closest to costs over sizes, in logs: 1 is linear."""
    logs = ([math.log(value) for value in values] for values in (sizes, costs))
    return linear_regression(*logs).slope


@dataclass(frozen=True)
class Times:
    """Processor seconds of each repeat: wall time on one thread, without other processes."""

    ours: list[float]
    peer: list[float]

    def row(
        self,
        name: str,
        peer_name: str,
        unit: Literal["s", "ms", "us"],
        of: str,
        *,
        per: float = 1.0,
        ours_per: float | None = None,
    ) -> Comparison:
        """Return the medians, divided by ``per`` (ours by ``ours_per``): the unit's time ``of``."""
        factor = {"s": 1.0, "ms": 1e3, "us": 1e6}[unit]
        ours = factor * median(self.ours) / (per if ours_per is None else ours_per)
        peer = factor * median(self.peer) / per
        return Comparison(name, ours, peer, f"CPU {unit} {of}", peer_name)


def paired(
    ours: Callable[[], object],
    peer: Callable[[], object],
    repeats: int,
    *,
    calls: int = 1,
    before: Callable[[], object] = lambda: None,
) -> Times:
    """Time two ways in turn, each repeat a number of calls, so that both see the same machine.

    ``before`` runs before each repeat, untimed. Call both once before, for costs of a first call.
    """
    times = Times([], [])
    for _ in range(repeats):
        before()
        for way, seconds in ((ours, times.ours), (peer, times.peer)):
            start = time.process_time()
            for _ in range(calls):
                way()
            seconds.append(time.process_time() - start)
    return times


def peak_bytes() -> int:
    """Return the largest resident memory that this process has had."""
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux ru_maxrss of a child starts at its parent's peak; VmHWM does not.
        lines = status.read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _reset_peak() -> bool:
    """Set this process's peak memory to what it holds now; return whether the system can."""
    with suppress(OSError, AttributeError):
        # Memory that was freed, but not returned, would hide what is taken next.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        return True
    return False


def peak_mb_of_child(module: str, **arguments: object) -> float:
    """Return the MB by which the job that ``module.job`` makes raises its own process's peak."""
    command = [sys.executable, "-m", "benchmarks.speed.measure", module, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(f"{module} ended with code {done.returncode}: {last}")
    return float(done.stdout.split()[-1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    job = import_module(sys.argv[1]).job(**json.loads(sys.argv[2]))
    before = peak_bytes()
    job()
    print((peak_bytes() - before) / MB)
