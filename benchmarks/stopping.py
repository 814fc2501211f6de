"""Ctrl-C and SIGTERM end a command in one line, from its first import on; no heavy imports."""

from __future__ import annotations

import atexit
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []


def watch() -> None:
    """Raise KeyboardInterrupt on either signal, unless the shell ignores it (background jobs)."""
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)


def check() -> None:
    """Raise KeyboardInterrupt where a library replaced or swallowed that of a signal."""
    if _received:
        raise KeyboardInterrupt


@contextmanager
def ends_in_one_line() -> Iterator[None]:
    """End the process with status 130 or 143 and a line on --resume after a signal."""
    try:
        yield
    except SystemExit:
        raise
    except BaseException as error:
        number = signal_behind(error)
        if number is None:
            raise
        print("stopped; the same command with --resume continues", file=sys.stderr)
        raise SystemExit(128 + number) from error
    finally:
        # No further signal disturbs the end of the process, where signals were watched.
        for watched in _SIGNALS:
            if signal.getsignal(watched) is _stop:
                signal.signal(watched, signal.SIG_IGN)


@contextmanager
def command() -> Iterator[None]:
    """A whole command, imports included, that ends in one line after a signal."""
    try:
        with ends_in_one_line():
            yield
    except SystemExit as end:
        if end.code in (130, 143):
            # Python would end by SIGINT where a library was interrupted as it was imported.
            atexit._run_exitfuncs()
            os._exit(int(end.code))
        raise


def signal_behind(error: BaseException) -> int | None:
    """The signal that an error comes from: code that is interrupted may raise one of its own."""
    if _received:
        return _received[0]
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, KeyboardInterrupt):
        cause = cause.__cause__ or cause.__context__
    return None if cause is None else (*cause.args, signal.SIGINT)[0]


def _stop(number: int, frame: FrameType | None) -> None:
    _received.append(number)
    raise KeyboardInterrupt(number)
