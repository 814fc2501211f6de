"""Metrics of a run: JSON lines and TensorBoard, cut back to the checkpoint on resume."""

from __future__ import annotations

import json
import math
import os
import socket
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from iwsft.files import full_disk_named, written_whole

FILE = "metrics.jsonl"
BOARD = "tensorboard"


class MetricsLog:
    """Appends one JSON object a row to ``metrics.jsonl``, and its scalars to TensorBoard.

    A row is on disk when :meth:`write` returns.

    Args:
        folder: of the run.
        after: rows of a later step are cut off: a resumed run writes them again.

    Raises:
        ValueError: a row on disk, other than a last one that a kill cut short, is no JSON.
        OSError: the disk is full.
    """

    def __init__(self, folder: Path, *, after: int = 0) -> None:
        self._path = folder / FILE
        try:
            rows = read(self._path) if self._path.exists() else []
        except ValueError as error:
            raise ValueError(
                f"{self._path} has a row that is not JSON ({error}); remove that row and run again"
            ) from error
        kept = "".join(json.dumps(row) + "\n" for row in rows if row["step"] <= after)
        with written_whole(self._path) as partial:
            partial.write_text(kept)
        self._lines = _Appended(self._path)
        self._board = _Board(folder / BOARD, after=after)

    def write(self, row: dict[str, float]) -> None:
        """Write a row; it has ``step``. NaN and infinity, which JSON lacks, are left out."""
        row = {name: value for name, value in row.items() if math.isfinite(value)}
        self._lines.write((json.dumps(row) + "\n").encode())
        self._board.write(row)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lines.close()
        self._board.close()


def read(path: Path) -> list[dict[str, float]]:
    """Rows of a ``metrics.jsonl``; a last line that a kill cut short is left out."""
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]


class _Appended:
    """Appends bytes to a file, unbuffered, so that a kill loses nothing that was written."""

    def __init__(self, path: Path) -> None:
        self._path = path
        with full_disk_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("ab", buffering=0)

    def write(self, data: bytes) -> None:
        with full_disk_named(self._path):
            while data:
                data = data[self._file.write(data) :]

    def close(self) -> None:
        self._file.close()


class _Board:
    """A TensorBoard event file, one event a row.

    torch's SummaryWriter writes from a thread, where a full disk ends in a traceback of its own,
    and keeps rows in memory for up to two minutes.
    """

    def __init__(self, folder: Path, *, after: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = _Appended(folder / name)
        self._records = RecordWriter(self._file)
        self._event: Any = Event
        self._add(file_version="brain.Event:2")
        # Tells readers to forget what earlier files hold from this step on.
        self._add(step=after + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, row: dict[str, float]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [
            Summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name != "step"
        ]
        self._add(step=int(row["step"]), summary=Summary(value=scalars))

    def close(self) -> None:
        self._file.close()

    def _add(self, **content: Any) -> None:
        self._records.write(self._event(wall_time=time.time(), **content).SerializeToString())
