"""Cases in warm processes: each is bounded in time, and what goes wrong is counted by its kind."""

from __future__ import annotations

import atexit
import faulthandler
import io
import json
import os
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib import import_module
from itertools import count
from pathlib import Path
from random import Random

from tqdm import tqdm

from scripts.compare_numbers import values_of

KINDS = ("lost", "different", "silent", "hang", "obscure")
# Seconds after which a case hangs. A case takes a few, also where all cores are in use.
LIMIT = 90.0
Finding = tuple[str, str]


@dataclass(frozen=True)
class Campaign:
    """Cases of one kind.

    ``warm`` names modules that are loaded once, before any process is forked. ``prepare`` writes
    what all cases share into a folder; it runs in the process that is forked. ``case`` takes that
    folder, its own source of random numbers and an empty folder. It yields the kind and the text of
    each problem, and ``("tried", "")`` for each thing that it tried.
    """

    name: str
    case: Callable[[Path, Random, Path], Iterator[Finding]]
    prepare: Callable[[Path], None] = lambda _: None
    warm: tuple[str, ...] = ()


@dataclass
class Tally:
    """Counts of a campaign, and its problems with the numbers of their cases."""

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[tuple[int, str, str]] = field(default_factory=list)

    def add(self, number: int, kind: str, text: str) -> None:
        """Count one finding of a case."""
        self.counts[kind] += 1
        if kind != "tried":
            self.problems.append((number, kind, text))


def run(
    campaign: Campaign,
    scratch: Path,
    *,
    seconds: float,
    processes: int,
    seed: int,
    only: int | None = None,
    limit: float = LIMIT,
) -> Tally:
    """Run cases 0, 1, ... for some seconds on several processes, or one of them alone.

    A process that takes more than ``limit`` seconds for a case is ended with all its children, and
    counts as a hang. The numbers of a case depend on the seed and its number alone.
    """
    # All forks would share tqdm's own lock, which a killed one never releases.
    tqdm.set_lock(threading.RLock())
    tqdm.monitor_interval = 0
    for module in campaign.warm:
        import_module(module)
    shared = scratch / "shared"
    shared.mkdir(parents=True)
    _prepare(campaign, shared)
    until = time.monotonic() + seconds
    tally = Tally()
    workers: dict[int, _Worker] = {}
    for slot in range(1 if only is not None else processes):
        first = slot if only is None else only
        stride = processes if only is None else 0
        workers[slot] = _Worker(campaign, shared, scratch, seed, first, stride, until)
    while workers:
        time.sleep(0.05)
        for slot, worker in list(workers.items()):
            worker.read(tally)
            if worker.late(limit):
                worker.end()
                tally.add(worker.number, "hang", f"no end after {limit:g} s")
                del workers[slot]
                if only is None and time.monotonic() < until:
                    following = worker.number + processes
                    again = (seed, following, processes, until)
                    workers[slot] = _Worker(campaign, shared, scratch, *again)
            elif worker.ended():
                worker.read(tally)
                if worker.child.code != 0:
                    raise RuntimeError(
                        f"case {worker.number} of {campaign.name} ends with {worker.child.code}:\n"
                        + worker.child.log.read_text()[-3000:]
                    )
                del workers[slot]
    return tally


def _prepare(campaign: Campaign, shared: Path) -> None:
    """Prepare the campaign in this process, whose forks then have all that it has loaded."""
    here, said, before = Path.cwd(), io.StringIO(), {*threading.enumerate()}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with redirect_stdout(said), redirect_stderr(said):
            campaign.prepare(shared)
    except (Exception, SystemExit) as error:
        said.write(traceback.format_exc())
        raise RuntimeError(f"{campaign.name} can't be prepared:\n{said.getvalue()}") from error
    finally:
        os.chdir(here)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    threads = {*threading.enumerate()} - before
    if threads:
        # A fork has the locks that they hold, and not the threads that release them.
        raise RuntimeError(f"{campaign.name} leaves threads behind: {threads}")


class _Worker:
    """A process that runs every ``stride``-th case, and logs when each begins."""

    def __init__(
        self,
        campaign: Campaign,
        shared: Path,
        scratch: Path,
        seed: int,
        first: int,
        stride: int,
        until: float,
    ) -> None:
        self.number, self._since, self._read = first, time.monotonic(), 0
        self._path = scratch / f"from-{first}.jsonl"
        self._path.touch()

        def work() -> None:
            os.setsid()
            with self._path.open("a", buffering=1) as log:
                for number in count(first, stride or 1):
                    print(json.dumps([number, "began", ""]), file=log)
                    folder = scratch / f"case-{number}"
                    folder.mkdir()
                    os.chdir(folder)
                    random = Random(f"{campaign.name} {seed} {number}")
                    for kind, text in campaign.case(shared, random, folder):
                        print(json.dumps([number, kind, text]), file=log)
                    os.chdir(scratch)
                    shutil.rmtree(folder, ignore_errors=True)
                    if not stride or time.monotonic() > until:
                        return

        self.child = start(work, scratch / f"from-{first}.log")

    def read(self, tally: Tally) -> None:
        """Take what the process has logged since the last look."""
        lines = self._path.read_text().split("\n")[:-1]
        for line in lines[self._read :]:
            self.number, kind, text = json.loads(line)
            self._since = time.monotonic()
            if kind != "began":
                tally.add(self.number, kind, text)
        self._read = len(lines)

    def late(self, limit: float) -> bool:
        """Whether its case takes too long."""
        return time.monotonic() - self._since > limit and not self.ended()

    def ended(self) -> bool:
        """Whether it has no more cases."""
        return self.child.wait(0) is not None

    def end(self) -> None:
        """Kill it and all processes that it started."""
        os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait(None)


@dataclass
class Child:
    """A forked process with its output in a file; ``code`` is below 0 where a signal ended it."""

    pid: int
    log: Path
    code: int | None = None

    def wait(self, seconds: float | None) -> int | None:
        """Return its exit code; None if it has not ended by then."""
        until = None if seconds is None else time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, 0 if until is None else os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif until is not None and time.monotonic() >= until:
                return None
            else:
                time.sleep(0.002)
        return self.code

    def end(self, how: signal.Signals) -> None:
        """Send it a signal, if it has not ended."""
        if self.wait(0) is None:
            os.kill(self.pid, how)


def start(work: Callable[[], object], log: Path) -> Child:
    """Fork a process for ``work``, whose output goes to ``log``; it has begun at the return."""
    begun, begins = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        os.close(begins)
        os.read(begun, 1)
        os.close(begun)
        return Child(pid, log)
    code = 1
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1)
        # Where it hangs.
        faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
        # What the parent does at its end, such as to remove its folders, is its own.
        atexit._clear()
        os.write(begins, b".")
        work()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        # Neither a second signal nor a full disk brings this process back into its parent's code.
        try:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            sys.stdout.flush()
        finally:
            os._exit(code)


def differences(whole: Path, other: Path) -> list[str]:
    """Name the files of two folders whose numbers differ, bit for bit, or that one folder lacks.

    Times, versions, commands and the machine are left out, and so are locks.
    """
    ours, theirs = _files(whole), _files(other)
    return sorted(
        name
        for name in ours | theirs
        if name not in ours & theirs or values_of(whole / name) != values_of(other / name)
    )


def _files(folder: Path) -> set[str]:
    return {
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.suffix != ".lock"
        if path.name != ".lock" and path.suffix not in (".png", ".log")
    }
