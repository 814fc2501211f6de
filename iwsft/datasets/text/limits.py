"""Limits of what a chat template, which is somebody's program, may use."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SECONDS = 10.0
GIBIBYTES = 1.0


@contextmanager
def limited() -> Iterator[None]:
    """Limit the memory that the block adds and, in the main thread, its processor time (Linux).

    More than ``SECONDS`` are a TimeoutError, more than ``GIBIBYTES`` a MemoryError. A single
    operation of Python, such as a power of two huge numbers, is not interrupted.
    """
    if sys.platform != "linux":
        yield
        return
    import resource

    end = time.thread_time() + SECONDS

    # The timer counts the time of all threads, so the handler looks at this thread's clock.
    def check(_signal: int, _frame: FrameType | None) -> None:
        if time.thread_time() > end:
            raise TimeoutError(f"it computes for more than {SECONDS:g} seconds")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + int(GIBIBYTES * 2**30)
    in_main = threading.current_thread() is threading.main_thread()
    if in_main:
        handler = signal.signal(signal.SIGVTALRM, check)
        signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS, 0.1)
    resource.setrlimit(resource.RLIMIT_AS, (limit if soft < 0 else min(limit, soft), hard))
    try:
        yield
    except MemoryError as error:
        raise MemoryError(f"it needs more than {GIBIBYTES:g} GiB of memory") from error
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        if in_main:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, handler)
