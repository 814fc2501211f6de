"""The folder of a task's results: settings, and every generation as a line of JSON.

Lines stand in the order of the questions and the samples of each, and hold no times, so that a run
that was killed and went on leaves the same file as one that ran through.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.provenance import write_json
from iwsft.checkpoint import CheckpointError, differences
from iwsft.files import full_disk_named

CONFIG, GENERATIONS, GRADES, RESULT = (
    "config.json",
    "generations.jsonl",
    "grades.jsonl",
    "result.json",
)

Row = dict[str, Any]


def check_claim(folder: Path, config: dict[str, Any], *, resume: bool) -> None:
    """Check that a folder is free, or holds a run of the same settings to go on with.

    Raises:
        FileExistsError: it holds a run, and ``resume`` is off.
        CheckpointError: it holds one of other settings, or something else.
    """
    path = folder / CONFIG
    if not path.exists():
        if (folder / GENERATIONS).exists():
            raise CheckpointError(
                f"{folder} holds generations without their {CONFIG}; move it away, or choose "
                "another --out"
            )
        return
    if not resume:
        raise FileExistsError(
            f"{folder} holds an evaluation; pass --resume to go on with it, or another --out"
        )
    try:
        held = json.loads(path.read_text())["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not what an evaluation writes ({type(error).__name__}); move {folder} "
            "away, or choose another --out"
        ) from error
    differ = differences(held, config["settings"])
    if differ:
        raise CheckpointError(
            f"{folder} holds an evaluation with other settings: {differ}; run with those, or "
            "choose another --out"
        )


class Generations:
    """Appends whole lines to ``generations.jsonl``; a last line that a kill cut short is removed.

    Args:
        folder: of the task, claimed.
        keys: ``(id, sample)`` of all lines that there will be, in their order.

    Attributes:
        rows: the lines that are there.

    Raises:
        CheckpointError: lines that are not those of ``keys``.
    """

    def __init__(self, folder: Path, keys: Sequence[tuple[str, int]]) -> None:
        self._path = folder / GENERATIONS
        self.rows: list[Row] = []
        content = self._path.read_bytes() if self._path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                fits = number <= len(keys) and (row["id"], row["sample"]) == keys[number - 1]
            except (ValueError, KeyError, TypeError):
                fits = False
            if not fits:
                raise CheckpointError(
                    f"{self._path}:{number} is not the generation that belongs there; remove it "
                    "and all lines after it, and run again with --resume"
                )
            self.rows.append(row)
        if len(whole) < len(content):
            os.truncate(self._path, len(whole))

    def append(self, rows: Sequence[Row]) -> None:
        """Write rows; they are on disk after.

        Raises:
            OSError: the disk is full.
        """
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        with full_disk_named(self._path), self._path.open("ab", buffering=0) as file:
            while data:
                data = data[file.write(data) :]
            os.fsync(file.fileno())
        self.rows += rows


def claim(folder: Path, config: dict[str, Any]) -> None:
    """Write the settings, where they do not stand yet."""
    if not (folder / CONFIG).exists():
        write_json(folder / CONFIG, config)
