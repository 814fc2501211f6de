"""``fit`` with failures at its calls: errors, kills, a full disk; then it is resumed."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch

from iwsft import EMA, GaussianPolicy, HardSync, ImportanceWeightedMLE
from iwsft.samplers import StepSampler, TrajectorySampler
from iwsft.training import Schedule, fit
from iwsft.trajectory import REF_LOG_PROB, from_steps
from scripts.campaigns.engine import LIMIT, Campaign, Finding, differences, start
from scripts.campaigns.kills import unbroken

EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.fsync", "os.scandir", "os.listdir")
ERRORS = (errno.EIO, errno.ENOSPC, errno.EACCES, errno.EMFILE)
PROPOSALS = ("cached", "lagged")


def _train(proposal: str) -> Callable[[bool], None]:
    def job(_: bool) -> None:
        torch.manual_seed(0)
        lengths = torch.tensor([5, 1, 7, 3])
        steps = int(lengths.sum())
        data = from_steps(
            {"observation": torch.randn(steps, 3), "action": 2 * torch.rand(steps, 2) - 1},
            torch.arange(4).repeat_interleave(lengths),
        )
        data[REF_LOG_PROB] = -1.5 - torch.rand(steps)
        loss = ImportanceWeightedMLE(GaussianPolicy(3, 2, hidden=(8,)), proposal=proposal)  # type: ignore[arg-type]
        updater: EMA | HardSync
        if proposal == "cached":
            updater = HardSync(loss, every=3, trajectories=data)
        else:
            updater = EMA(loss, decay=0.8)
        kind: type[Any] = StepSampler if proposal == "cached" else TrajectorySampler
        schedule = Schedule(steps=8, lr=0.01)
        settings = {"lr": 0.01}
        fit(
            loss,
            kind(data, 4, seed=1),
            schedule,
            updater=updater,
            folder=Path("run"),
            settings=settings,
            checkpoint_every=2,
            log_every=1,
        )

    return job


def _failing(folder: Path, at: int, fail: Callable[[str], None]) -> Callable[[], int]:
    """Call ``fail`` at one of this process's calls on files of the run; a counter of them."""
    calls = 0
    sync = os.fsync

    def audited_sync(number: Any) -> None:
        sys.audit("os.fsync", os.readlink(f"/proc/self/fd/{number}"))
        sync(number)

    def look(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal calls
        if event not in EVENTS or not isinstance(arguments[0], str | Path):
            return
        path = os.path.abspath(arguments[0])
        if event != "os.fsync" and not path.startswith(str(folder)):
            return
        calls += 1
        if calls == at:
            fail(path)

    os.fsync = audited_sync  # type: ignore[assignment]
    sys.addaudithook(look)
    return lambda: calls


def _prepare(shared: Path) -> None:
    for proposal in PROPOSALS:
        unbroken(_train(proposal), shared / proposal)
        folder = shared / f"{proposal}.counted"

        def count(proposal: str = proposal, folder: Path = folder) -> None:
            folder.mkdir()
            os.chdir(folder)
            counter = _failing(folder, -1, lambda _: None)
            _train(proposal)(True)
            folder.with_suffix(".json").write_text(json.dumps(counter()))

        # The counter can't be taken away again.
        start(count, folder.with_suffix(".log")).wait(None)


def _case(shared: Path, random: Random, folder: Path) -> Iterator[Finding]:
    proposal = random.choice(PROPOSALS)
    job = _train(proposal)
    calls = json.loads((shared / f"{proposal}.json").read_text())
    log = Path("..") / f"{folder.name}.log"
    for _ in range(random.randint(1, 2)):
        how = random.choice(["error", "error", "kill", "full"])
        at, number, size = random.randint(1, calls), random.choice(ERRORS), random.randrange(20_000)

        def fail(path: str, how: str = how, number: int = number) -> None:
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(number, os.strerror(number), path)

        def work(how: str = how, at: int = at, size: int = size) -> None:
            if how == "full":
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            else:
                _failing(folder, at, fail)
            job(True)

        log.unlink(missing_ok=True)
        child = start(work, log)
        yield "tried", ""
        if child.wait(LIMIT / 2) is None:
            child.end(signal.SIGKILL)
            yield "hang", f"{how} at call {at}"
        said = log.read_text().strip()
        last = said.splitlines()[-1] if said else ""
        clear = "run" in last and "Error" in last
        # The log itself is on the full disk.
        if child.code == 1 and how == "error" and not clear:
            yield "obscure", f"{how} at call {at} of {calls}: {last[:300]}"
    log.unlink(missing_ok=True)
    child = start(lambda: job(True), log)
    if child.wait(None) != 0:
        yield "lost", f"resumed, it ends with {child.code}: {log.read_text()[-300:]}"
        return
    differing = differences(shared / proposal, folder)
    if differing:
        yield "different", ", ".join(differing)


CAMPAIGNS = (Campaign("fit failures", _case, _prepare),)
