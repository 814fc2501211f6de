"""The campaigns see what goes wrong; a small share of them finds nothing.

They fork, so they run in fresh processes: a fork has all that earlier tests left in its parent.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from tqdm import tqdm

from scripts.campaigns.__main__ import table
from scripts.campaigns.engine import Campaign, Finding, differences, run, start
from scripts.campaigns.kills import killed, unbroken

# Those whose preparation takes no time; the tests of each part kill the others.
SHARE = ("fit failures", "HDF5 files", "rows", "chat templates", "command lines")


def test_a_small_share_finds_nothing(tmp_path: Path) -> None:
    # No template of this seed runs into its limit of time, which takes ten seconds.
    words = ["--seed", "8", "--seconds", "1", "--processes", "2", "--only", *SHARE]
    done = subprocess.run(
        [sys.executable, "-m", "scripts.campaigns", *words],
        capture_output=True,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for name in SHARE:
        (line,) = (line for line in done.stdout.splitlines() if line.startswith(name + "  "))
        assert int(line.removeprefix(name).split()[0]) > 0


def _case(shared: Path, random: Random, folder: Path) -> Iterator[Finding]:
    number = int(folder.name.removeprefix("case-"))
    yield "tried", ""
    if number == 1:
        time.sleep(100)
    if number == 2:
        yield "lost", f"{random.random():.3f} of {(shared / 'there').read_text()}"


def _hang(_rank: int, folder: Path) -> None:
    campaign = Campaign("made", _case, lambda shared: (shared / "there").write_text("all") and None)
    tallies = [
        run(campaign, folder / str(n), seconds=1, processes=3, seed=4, limit=0.8, only=only)
        for n, only in enumerate((None, 2))
    ]
    whole, alone = tallies
    assert whole.counts["hang"] == whole.counts["lost"] == 1 and whole.counts["tried"] > 10
    lost = (2, "lost", f"{Random('made 4 2').random():.3f} of all")
    assert lost in whole.problems and alone.problems == [lost]
    shown = table({"made": whole})
    assert "made, case 1: hang" in shown and "made, case 2: lost" in shown


def test_a_hang_is_counted_and_the_other_cases_run(
    tmp_path: Path, on_processes: Callable[..., None]
) -> None:
    on_processes(1, _hang, tmp_path)


def _bars(shared: Path, random: Random, folder: Path) -> Iterator[Finding]:
    holder = start(lambda: tqdm.get_lock().acquire() and time.sleep(100), folder / "holder.log")
    time.sleep(0.1)
    holder.end(signal.SIGKILL)
    other = start(lambda: [*tqdm(range(3))], folder / "other.log")
    yield "tried" if other.wait(5) == 0 else "hang", other.log.read_text()


def _killed_at_a_bar(_rank: int, folder: Path) -> None:
    campaign = Campaign("bars", _bars, lambda _: tqdm(range(3)).close())
    assert run(campaign, folder, seconds=1, processes=1, seed=0, only=0).counts == {"tried": 1}


def test_a_process_killed_at_a_progress_bar_holds_up_no_other(
    tmp_path: Path, on_processes: Callable[..., None]
) -> None:
    on_processes(1, _killed_at_a_bar, tmp_path)


def test_a_preparation_that_leaves_a_thread_is_refused(tmp_path: Path) -> None:
    """Forks would wait for the locks that the thread holds."""
    campaign = Campaign("threads", _bars, lambda _: threading.Timer(1, print).start())
    with pytest.raises(RuntimeError, match="threads leaves threads behind"):
        run(campaign, tmp_path, seconds=1, processes=1, seed=0)


def test_one_bit_and_one_file_are_seen(tmp_path: Path) -> None:
    for name in ("whole", "same", "bit", "file"):
        value = torch.tensor([1.0, 2.0])
        if name == "bit":
            value.view(torch.int32)[1] += 1
        (tmp_path / name).mkdir()
        torch.save({"a": [value], "seconds": name}, tmp_path / name / "state.pt")
    (tmp_path / "file" / ".state.pt.7.partial").touch()
    found = {n: differences(tmp_path / "whole", tmp_path / n) for n in ("same", "bit", "file")}
    assert found == {"same": [], "bit": ["state.pt"], "file": [".state.pt.7.partial"]}


def _job_with(_rank: int, folder: Path, fault: str | None) -> None:
    """Kill a job of ten lines that continues after the last, or with a fault does not."""

    def job(resume: bool) -> None:
        path = Path("lines.jsonl")
        done = len(path.read_text().splitlines()) if path.exists() else 0
        if fault == "refuses" and done:
            raise ValueError("half of it is there")
        with path.open("a", buffering=1) as file:
            for number in range(0 if fault == "forgets" else done, 10):
                file.write(f"{number}\n")
                time.sleep(0.01)

    unbroken(job, folder / "whole")
    found: list[str] = []
    for seed in range(4):
        (folder / f"other-{seed}").mkdir()
        os.chdir(folder / f"other-{seed}")
        cases = killed(job, folder / "whole", Random(seed), command=False)
        found += [kind for kind, _ in cases]
    wrong = {None: set(), "forgets": {"different"}, "refuses": {"lost"}}
    assert "tried" in found and set(found) - {"tried", "obscure"} == wrong[fault]


@pytest.mark.parametrize("fault", [None, "forgets", "refuses"])
def test_a_job_that_does_not_resume_is_seen(
    tmp_path: Path, on_processes: Callable[..., None], fault: str | None
) -> None:
    on_processes(1, _job_with, tmp_path, fault)
