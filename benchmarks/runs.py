"""Folders of runs: claimed before anything is trained, kept for one process at a time."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from benchmarks.provenance import write_json
from iwsft import checkpoint
from iwsft.checkpoint import CheckpointError, differences
from iwsft.files import full_disk_named

CONFIG, RESULT = "config.json", "result.json"


@dataclass
class Summary:
    """What became of all that was asked for: counts, and one line for each that is not done."""

    done: int = 0
    finished_before: int = 0
    failed: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def leave_out(self, reason: str) -> None:
        """Count a dataset, or algorithms on one, that can't be run, and tell."""
        self.left_out.append(reason)
        tell(f"left out: {reason}")

    def __str__(self) -> str:
        counts = [f"{self.done} done"]
        if self.finished_before:
            counts.append(f"{self.finished_before} finished before")
        lines = []
        for title, reasons in (("failed", self.failed), ("left out", self.left_out)):
            if reasons:
                counts.append(f"{len(reasons)} {title}")
                lines += [f"{title}: {reason}" for reason in reasons]
        return "\n".join([", ".join(counts), *lines])


def tell(line: str) -> None:
    """Write a line to stderr in one go, so that those of several processes do not mix."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def claim(
    root: Path, configs: Mapping[Path, dict[str, Any]], *, same: Sequence[str], resume: bool
) -> list[Path]:
    """Claim the folders of all runs, or none, by writing ``config.json``; the unfinished ones.

    Args:
        root: a folder above all of them.
        configs: folder of a run -> what its ``config.json`` shall hold.
        same: entries in which a run that is there must agree.
        resume: go on with runs that are there.

    Raises:
        FileExistsError: folders that hold a run, and ``resume`` is off.
        CheckpointError: with ``resume``, folders that hold one of other settings.
        OSError: ``root`` can't be written.
    """
    with full_disk_named(root):
        root.mkdir(parents=True, exist_ok=True)
    # Two commands at once don't both find a folder free.
    with FileLock(root / ".claim.lock"):
        held = {folder: _held(folder, same) for folder in configs}
        taken = [str(folder) for folder in configs if held[folder] is not None]
        if taken and not resume:
            raise FileExistsError(
                f"{', '.join(taken)}: {'a run is' if len(taken) == 1 else 'runs are'} there "
                "already; pass --resume to continue and to keep what is finished, or another --out"
            )
        for folder, config in configs.items():
            found = held[folder]
            if found is not None:
                _check_same(folder, found, {name: config[name] for name in same})
        free = [folder for folder in configs if held[folder] is None]
        try:
            for folder in free:
                write_json(folder / CONFIG, configs[folder])
        except OSError:
            for folder in free:
                (folder / CONFIG).unlink(missing_ok=True)
            raise
    return [folder for folder in configs if not (folder / RESULT).exists()]


@contextmanager
def alone_in(folder: Path, *, wait: bool) -> Iterator[None]:
    """Keep other processes out of a folder that trains, and clear what a killed one left half-way.

    Args:
        folder: made where it is missing.
        wait: until another process is done.

    Raises:
        FileExistsError: another process works there, and ``wait`` is off.
    """
    with full_disk_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        held = FileLock(folder / ".lock").acquire(timeout=-1 if wait else 0)
    except Timeout as error:
        raise FileExistsError(
            f"another process works in {folder}; wait for it or end it, then pass --resume"
        ) from error
    with held:
        for stale in (folder / checkpoint.FOLDER).glob(".*.partial"):
            stale.unlink()
        yield


def _held(folder: Path, same: Sequence[str]) -> dict[str, Any] | None:
    """The ``config.json`` of a folder; empty where only a result stands, None where no run is."""
    path = folder / CONFIG
    if not path.exists():
        return {} if (folder / RESULT).exists() else None
    try:
        config = json.loads(path.read_text())
        return {name: config[name] for name in same}
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not what a run writes ({type(error).__name__}: {error}); move {folder} "
            "away, or choose another --out"
        ) from error


def _check_same(folder: Path, held: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    differ = differences(held, wanted)
    if differ:
        raise CheckpointError(
            f"{folder} holds a run with other settings: {differ}; run with those, or choose "
            "another --out"
        )
