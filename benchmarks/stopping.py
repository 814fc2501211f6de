"""Errors that a user can mend, Ctrl-C and SIGTERM end a command in one line; warnings are one.

They do so from its first import on, so nothing heavy is imported here.
"""

from __future__ import annotations

import _thread
import atexit
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from iwsft.extras import named, require

# What settings, data, disk and network can cause. Anything else is a bug and keeps its traceback.
_EXPECTED = (
    *(FloatingPointError, ImportError, KeyError, MemoryError),
    *(OSError, OverflowError, ValueError),
)
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_received: list[int] = []
# How to continue what a signal stops.
_way_out: list[str] = []


def watch(way_out: str = "the same command with --resume continues") -> None:
    """Raise KeyboardInterrupt on either signal, unless the shell ignores it (background jobs).

    The signal is raised again where code swallows the exception, until the command ends. Then a
    line says that it is stopped, and the way out.
    """
    _way_out[:] = [way_out]
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    tell = sys.unraisablehook

    def silent(problem: Any) -> None:
        if not isinstance(problem.exc_value, _Interrupt):
            tell(problem)

    sys.unraisablehook = silent


def check() -> None:
    """Raise KeyboardInterrupt where a library replaced or swallowed that of a signal."""
    if _received:
        raise KeyboardInterrupt


def expected() -> tuple[type[BaseException], ...]:
    """The errors that a user can mend."""
    # Its base is that of most bugs.
    out_of_memory = getattr(sys.modules.get("torch"), "OutOfMemoryError", MemoryError)
    return (*_EXPECTED, out_of_memory)


@contextmanager
def ends_in_one_line() -> Iterator[None]:
    """End the process with one line on an error that a user can mend.

    After a signal the status is 130 or 143.
    """
    try:
        with named():
            yield
    except SystemExit:
        raise
    except BaseException as error:
        number = signal_behind(error)
        if number is not None:
            print("; ".join(["stopped", *_way_out]), file=sys.stderr)
            raise SystemExit(128 + number) from error
        if isinstance(error, expected()):
            raise SystemExit(f"error: {one_line(error)}") from error
        raise


@contextmanager
def command(*packages: str) -> Iterator[None]:
    """A whole command, imports included, that ends in one line; it needs ``packages``."""
    try:
        try:
            with ends_in_one_line(), plain_warnings():
                require(*packages)
                yield
        finally:
            # No further signal disturbs the end of the process, where signals were watched.
            for watched in _SIGNALS:
                if signal.getsignal(watched) is _stop:
                    signal.signal(watched, signal.SIG_IGN)
    except SystemExit as end:
        if end.code in (130, 143):
            # Python would end by SIGINT where a library was interrupted as it was imported.
            atexit._run_exitfuncs()
            with suppress(OSError):
                sys.stdout.flush()
            os._exit(int(end.code))
        raise


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Write a warning as one line, without the place in the source that Python adds."""
    before = warnings.formatwarning
    warnings.formatwarning = lambda message, *_, **__: f"warning: {one_line(message)}\n"
    try:
        yield
    finally:
        warnings.formatwarning = before


@contextmanager
def warnings_until(words: str) -> Iterator[None]:
    """Cut warnings off at these words, which begin a way out that the command does not have."""
    caught: list[warnings.WarningMessage] = []
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for each in caught:
            warnings.warn(str(each.message).partition(words)[0], each.category, stacklevel=3)


def one_line(error: object) -> str:
    """The message of an error or a warning, without what Python puts around it."""
    text = str(error)
    if isinstance(error, KeyError) and error.args:
        # Its text is the repr of its argument: a sentence of ours, or a mere key.
        key = error.args[0]
        text = key if isinstance(key, str) and " " in key else f"there is no entry {key!r}"
    if isinstance(error, OSError) and error.strerror is not None:
        text = ": ".join(filter(None, (error.strerror, error.filename)))
        if isinstance(error, FileExistsError | NotADirectoryError):
            text += " (a file is in the way; choose another path)"
    return printable_text(" ".join(text.split()) or type(error).__name__)


def printable_text(text: str) -> str:
    """A text that shows control characters as a terminal can't obey them."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


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
    raise _Interrupt(number)


class _Interrupt(KeyboardInterrupt):
    """The exception of a signal. It dies before the command ends only where code swallows it.

    Python itself does so in callbacks of weak references, in ``__del__`` and in ``copyreg``.
    """

    process = 0

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.process = os.getpid()

    def __del__(self) -> None:
        # The handler is gone once the command ends. Forked processes have an end of their own.
        if signal.getsignal(self.args[0]) is _stop and os.getpid() == self.process:
            # threading's threads begin under locks, which the code here may hold.
            _thread.start_new_thread(_raise_again, self.args)


def _raise_again(number: int) -> None:
    # Outside of the code that swallowed it.
    time.sleep(0.01)
    signal.pthread_kill(threading.main_thread().ident or 0, number)
