"""Limits of what a chat template, which is somebody's program, may use."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SECONDS = 10.0
BYTES = 2**30


@contextmanager
def limited(seconds: float = SECONDS, bytes_: int = BYTES) -> Iterator[None]:
    """Limit the processor time and the memory of the block.

    Time is limited in the main thread of a Unix process, memory on Linux. A single operation of
    Python, such as a power of two huge numbers, is not interrupted.

    Raises:
        TimeoutError: The block has computed for more than ``seconds``.
        MemoryError: The block needs more than ``bytes_`` beyond what the process has.
    """
    with _limited_memory(bytes_), _limited_time(seconds):
        yield


@contextmanager
def _limited_time(seconds: float) -> Iterator[None]:
    if not hasattr(signal, "SIGVTALRM") or threading.current_thread() != threading.main_thread():
        yield
        return
    end = time.thread_time() + seconds

    # The timer counts the time of all threads, so the handler looks at this thread's clock.
    def check(_signal: int, _frame: FrameType | None) -> None:
        if time.thread_time() > end:
            raise TimeoutError(f"it computes for more than {seconds:g} seconds")

    handler = signal.signal(signal.SIGVTALRM, check)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, seconds / 10)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)


@contextmanager
def _limited_memory(bytes_: int) -> Iterator[None]:
    pages = Path("/proc/self/statm")
    if not pages.exists():
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = int(pages.read_text().split()[0]) * resource.getpagesize() + bytes_
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    except MemoryError as error:
        raise MemoryError(f"it needs more than {bytes_ / 2**30:g} GiB of memory") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
