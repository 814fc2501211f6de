"""A signal ends a command also where it arrives in code that swallows exceptions."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys

import pytest
from tensordict import TensorDict

from benchmarks.stopping import ends_in_one_line
from iwsft.datasets.d4rl import damage_named

SWALLOWED = {
    "a weak reference's callback": "thing = Thing(); r = weakref.ref(thing, signalled); del thing",
    "__del__": "Thing.__del__ = signalled; Thing()",
    "the garbage collector": "gc.callbacks[:] = [signalled]; gc.collect()",
    "a bare except": "\n        try: signalled()\n        except: pass",
    "a callback of C": "ctypes.CFUNCTYPE(ctypes.c_int)(signalled)()",
    "no such code": "signalled()",
}


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("code", SWALLOWED.values(), ids=SWALLOWED.keys())
def test_a_swallowed_signal_is_raised_again(code: str, how: signal.Signals) -> None:
    program = f"""
import ctypes, gc, os, signal, time, weakref
from benchmarks import stopping

class Thing: pass

def signalled(*_):
    gc.callbacks.clear()
    os.kill(os.getpid(), {how.value})
    return 0

# A shell ignores it for what it runs in the background.
signal.signal({how.value}, signal.SIG_DFL)
stopping.watch()
with stopping.command():
    try:
        {code}
        time.sleep(30)
        print("it has gone on")
    finally:
        # Cleaning up takes a while, in which the signal is not raised again.
        for _ in range(20):
            time.sleep(0.01)
        print("clean")
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        timeout=25,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )
    assert (done.returncode, done.stdout) == (128 + how, "clean\n")
    assert done.stderr == "stopped; the same command with --resume continues\n"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_error_of_interrupted_code_is_the_interruption(
    number: signal.Signals, capsys: pytest.CaptureFixture[str]
) -> None:
    """tensordict and h5py raise an error of their own where a Ctrl-C interrupts them."""
    with pytest.raises(SystemExit) as end, ends_in_one_line(), damage_named("a file", "its end"):
        try:
            raise KeyboardInterrupt(number)
        except KeyboardInterrupt as interrupt:
            raise SystemError("returned a result with an exception set") from interrupt
    assert end.value.code == 128 + number
    with pytest.raises(SystemExit) as end, ends_in_one_line():
        try:
            raise KeyboardInterrupt(number)
        finally:
            bool(TensorDict({}, []))
    assert end.value.code == 128 + number
    # Nothing was watched, so there may be nothing to continue.
    assert capsys.readouterr().err == "stopped\nstopped\n"


def test_a_warning_is_one_line_in_a_command_and_in_the_processes_of_its_runs() -> None:
    program = """
import warnings
from pathlib import Path
from benchmarks import places, stopping, sweep
from benchmarks.sweep import Stack, Summary

def work(stack):
    warnings.warn("of a run:\\n  look", stacklevel=1)

with stopping.command():
    warnings.warn("of the command", stacklevel=1)
    with places.place(None, items=2, jobs=2) as place:
        sweep.run_all(work, [Stack(())] * 2, place, Summary())
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, check=True
    )
    # On a busy machine loky's tracker of semaphores prints lines of its own at the end.
    told = {line for line in done.stderr.splitlines() if re.search("run|command|look", line)}
    assert told == {"warning: of the command", "warning: of a run: look"}
