"""Metrics of a run: JSON lines and TensorBoard, cut back to the checkpoint on resume."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType

from iwsft.files import written_whole

FILE = "metrics.jsonl"


class MetricsLog:
    """Appends one JSON object a row to ``metrics.jsonl``, and scalars to TensorBoard.

    Args:
        folder: of the run.
        after: rows of a later step are cut off: a resumed run writes them again.
    """

    def __init__(self, folder: Path, *, after: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = folder / FILE
        kept = [row for row in read(path) if row["step"] <= after] if path.exists() else []
        with written_whole(path) as partial:
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
        self._file = path.open("a")
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=after + 1)

    def write(self, row: dict[str, float]) -> None:
        """Write a row; it has ``step``. NaN stands for no value and is left out."""
        row = {name: value for name, value in row.items() if value == value}
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._board.add_scalar(name, value, int(row["step"]))

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        self._board.close()


def read(path: Path) -> list[dict[str, float]]:
    """Rows of a ``metrics.jsonl``; a last line that a kill cut short is left out."""
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1]]
