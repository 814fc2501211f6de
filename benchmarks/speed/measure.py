"""Rows of a speed table: time and memory of two ways, or of one way on data of several sizes.

A module of a subject has ``measure(options)``, which yields its rows and checks one by one, and for
peaks of memory ``job(options, ours=...)``, which returns the call whose memory is measured.
"""

from __future__ import annotations

import ctypes
import json
import math
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from importlib import import_module
from pathlib import Path
from statistics import linear_regression, median
from types import SimpleNamespace
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.speed.options import Options

MB = 1e6
Result = TypeVar("Result")
# A way to do something. One that returns a float has timed itself: the seconds of what counts.
Way = Callable[[], object]


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

    def __str__(self) -> str:
        return f"{self.ratio:8.2f} x  {self.name}"


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
            raise ValueError(f"{problem}: two different computations can't be compared")


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

    def __str__(self) -> str:
        memory = "" if self.mb is None else f"{self.mb:10.1f} MB"
        return f"{self.seconds:10.4g} s {memory}  {self.stage}, {self.size:,} {self.of}"


def scaled(options: Options, **pairs: tuple[int, int]) -> SimpleNamespace:
    """Return sizes by their names; each has one for the paper's scale and a small one."""
    small = options.scale == "small"
    return SimpleNamespace(**{name: pair[small] for name, pair in pairs.items()})


def compare(
    name: str,
    ours: Way,
    peer: Way,
    peer_name: str,
    unit: str,
    repeats: int,
    *,
    calls: int = 1,
    warm_up: int = 1,
    per: float | None = None,
    ours_per: float | None = None,
) -> Comparison:
    """Time two ways in turn, after untimed calls of each; the median of the repeats counts.

    Processor time is wall time on one thread, without other processes. A repeat makes ``calls``
    calls, which are ``per`` units (of ours ``ours_per``), as many by default. The unit begins with
    "s", "ms" or "us".
    """
    repeated = (warm_up, *[calls] * repeats)
    seconds = [(seconds_of(ours, number), seconds_of(peer, number)) for number in repeated]
    factor = {"s": 1.0, "ms": 1e3, "us": 1e6}[unit.split()[0]]
    per = calls if per is None else per
    mine, other = (factor * median(times) for times in zip(*seconds[1:], strict=True))
    values = mine / (per if ours_per is None else ours_per), other / per
    return Comparison(name, *values, f"CPU {unit}", peer_name)


def seconds_of(way: Way, calls: int = 1) -> float:
    """Return the processor seconds of a number of calls, or those that the calls return."""
    start, own = time.process_time(), 0.0
    for _ in range(calls):
        result = way()
        own += result if isinstance(result, float) else 0.0
    return own or time.process_time() - start


def relative_difference(ours: Iterable[Tensor], peer: Iterable[Tensor]) -> float:
    """Return the largest relative difference of two tensors, in the 2-norm."""
    pairs = [(a.double(), b.double()) for a, b in zip(ours, peer, strict=True)]
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def measured(
    stage: str, run: Callable[[], Result], *, size: int, of: str, repeats: int
) -> tuple[Cost, Result]:
    """Return the cost of a stage, with the median of ``repeats`` times, and the stage's result.

    A repeat makes as many calls as take about 20 ms. A stage of a second or more is called once.
    """
    resettable = _reset_peak()
    before, start = peak_bytes(), time.process_time()
    result = run()
    times = [time.process_time() - start]
    mb = (peak_bytes() - before) / MB if resettable else None
    if times[0] < 1:
        calls = math.ceil(0.02 / max(times[0], 1e-4))
        times = [seconds_of(run, calls) / calls for _ in range(repeats)]
    return Cost(stage, size, of, median(times), mb), result


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Return the exponent of the power law closest to costs over sizes, in logs: 1 is linear."""
    logs = ([math.log(value) for value in values] for values in (sizes, costs))
    return linear_regression(*logs).slope


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


def compare_peaks(name: str, peer_name: str, module: str, options: Options) -> Comparison:
    """Compare the MB by which the call that ``module.job`` returns raises its process's peak."""
    given, peaks = json.dumps(asdict(options), default=str), []
    for way in ("ours", "peer"):
        command = [sys.executable, "-m", "benchmarks.speed.measure", module, way, given]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise OSError(f"{module} ended with code {done.returncode}: {last}")
        peaks.append(float(done.stdout.split()[-1]))
    return Comparison(f"peak memory of {name}", peaks[0], peaks[1], "MB", peer_name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    options = Options(**json.loads(sys.argv[3]))
    job = import_module(sys.argv[1]).job(options, ours=sys.argv[2] == "ours")
    before = peak_bytes()
    job()
    print((peak_bytes() - before) / MB)
