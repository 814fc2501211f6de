"""Experiment trackers: rows of metrics for TensorBoard, Weights & Biases, and Trackio."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.runs import CONFIG, Run
from iwsft.files import full_disk_named

BOARD = "tensorboard"
PROJECT = "iwsft"
# A row's step and its other numbers.
Write = Callable[[int, Mapping[str, float]], None]


@contextmanager
def tracked(run: Run[Any], names: Sequence[str]) -> Iterator[Write]:
    """Start trackers for the time of a block, which sends them rows.

    A run that is resumed continues under its name.

    Raises:
        ConnectionError: A tracker does not start, for example without a network or an account.
    """
    with ExitStack() as stack:
        writers = [stack.enter_context(_TRACKERS[name](run)) for name in names]

        def write(step: int, numbers: Mapping[str, float]) -> None:
            for writer in writers:
                writer(step, numbers)

        yield write


@contextmanager
def _tensorboard(run: Run[Any]) -> Iterator[Write]:
    from torch.utils.tensorboard import SummaryWriter

    folder, boards = run.folder / BOARD, list[SummaryWriter]()

    def write(step: int, numbers: Mapping[str, float]) -> None:
        with full_disk_named(folder):
            if not boards:
                # Readers forget what earlier files have from this step on.
                boards.append(SummaryWriter(str(folder), purge_step=step))
            for name, number in numbers.items():
                boards[0].add_scalar(name, number, step)
            boards[0].flush()

    yield write
    # Each row is flushed. The thread of a writer that was interrupted ends minutes later.
    for board in boards:
        with full_disk_named(folder):
            board.close()


@contextmanager
def _wandb(run: Run[Any]) -> Iterator[Write]:
    import wandb

    way_out = "run `wandb login`, or set WANDB_MODE=offline"
    # One id for each folder: a resumed run continues its curve.
    name = hashlib.sha256(str(run.folder.absolute()).encode()).hexdigest()[:16]
    with _started("wandb", way_out):
        started = wandb.init(
            project=PROJECT,
            name=str(run),
            id=name,
            resume="allow",
            dir=run.folder,
            config=_config(run.folder),
        )
    with started:
        yield lambda step, numbers: started.log(dict(numbers), step=step)


@contextmanager
def _trackio(run: Run[Any]) -> Iterator[Write]:
    import trackio

    with _started("trackio", "see its documentation"):
        started = trackio.init(
            project=PROJECT, name=str(run), resume="allow", config=_config(run.folder), embed=False
        )
    try:
        yield lambda step, numbers: started.log(dict(numbers), step=step)
    finally:
        started.finish()


_TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}


@contextmanager
def _started(name: str, way_out: str) -> Iterator[None]:
    """Name a tracker that does not start; each has errors of its own."""
    try:
        yield
    except Exception as error:
        problem = " ".join(str(error).split())
        raise ConnectionError(f"--report-to {name}: {problem}; {way_out}") from error


def _config(folder: Path) -> dict[str, Any]:
    return json.loads((folder / CONFIG).read_text())
