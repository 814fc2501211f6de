"""Checkpoints of a fine-tuning run: folders that are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers.trainer_utils import get_last_checkpoint

from iwsft.checkpoint import CORRUPT, CheckpointError, differences
from iwsft.files import full_disk_named, written_whole

SEAL = "iwsft.json"
# A hidden folder of the run, in which a checkpoint is written before it takes its place.
ASIDE = ".partial"
_WAY_OUT = "resume from an earlier checkpoint, or start afresh in another output_dir"


@contextmanager
def written_aside(run: Path) -> Iterator[None]:
    """What goes wrong while a checkpoint is written says that earlier ones are as they were.

    Raises:
        OSError: the disk is full, or a writer failed.
    """
    with full_disk_named(run / ASIDE):
        try:
            yield
        except (RuntimeError, SafetensorError) as error:
            # Writers of torch and safetensors have errors of their own for a full disk.
            raise OSError(
                errno.EIO,
                f"a checkpoint could not be written in {run} ({error}); earlier ones are as they "
                "were; see whether there is space left, and resume",
            ) from error


def write_state(path: Path, state: Mapping[str, Any]) -> None:
    """Write tensors and plain values straight to the disk; a sharded q is large."""
    torch.save(dict(state), path)


def read_state(path: Path) -> dict[str, Any]:
    """Read what :func:`write_state` wrote, onto the CPU.

    Raises:
        CheckpointError: a damaged file.
    """
    try:
        held: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except CORRUPT as error:
        raise CheckpointError(
            f"{path} is corrupt ({type(error).__name__}: {error}); {_WAY_OUT}"
        ) from error
    return held


def seal(folder: Path, settings: Mapping[str, Any], reference: str | None) -> None:
    """Write down the files of a complete checkpoint, with their sizes, and what it belongs to.

    Args:
        folder: of the checkpoint.
        settings: of the run.
        reference: key of its reference log-probs, where it has some.
    """
    held = {"settings": dict(settings), "reference": reference, "files": _sizes(folder)}
    with written_whole(folder / SEAL) as partial:
        partial.write_text(json.dumps(held, indent=2, sort_keys=True))


def publish(folder: Path, place: Path) -> None:
    """Move a sealed checkpoint to its place; one that stands there is replaced."""
    if place.exists():
        old = folder.with_name(f"{folder.name}.old")
        os.replace(place, old)
        os.replace(folder, place)
        shutil.rmtree(old)
        return
    os.replace(folder, place)


def last(run: Path) -> str | None:
    """The folder of a run's last checkpoint; None where it has none, or is not there."""
    found: str | None = get_last_checkpoint(str(run)) if run.is_dir() else None
    return found


def resumed(run: Path, checkpoint: str | bool | None, *, saves: bool) -> Path | None:
    """The checkpoint that a run continues from, None for a new run.

    Args:
        run: Folder of the run.
        checkpoint: Folder of the checkpoint; True for the last one of the run.
        saves: Whether the run writes checkpoints of its own.

    Raises:
        CheckpointError: The run has no checkpoint.
        FileExistsError: A new run would write among the checkpoints of an earlier one.
    """
    newest = last(run)
    if checkpoint is True:
        if newest is None:
            raise CheckpointError(
                f"there is no checkpoint in {run}; train without resume_from_checkpoint"
            )
        return Path(newest)
    if checkpoint:
        return Path(checkpoint)
    if newest is not None and saves:
        raise FileExistsError(
            f"{newest} is the checkpoint of an earlier run; continue that one with "
            "train(resume_from_checkpoint=True), or choose another output_dir"
        )
    return None


def clear(run: Path) -> None:
    """Remove what a killed run has left half-written."""
    if (run / ASIDE).exists():
        shutil.rmtree(run / ASIDE)


def check(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """See that a checkpoint is whole and belongs to a run with these settings.

    Returns:
        The key of the reference log-probs of its run.

    Raises:
        CheckpointError: it is not there, damaged, or of other settings; the message names what.
    """
    try:
        held = json.loads((folder / SEAL).read_bytes())
        stored, files, reference = held["settings"], held["files"], held["reference"]
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{folder} is no checkpoint of this trainer: {SEAL} is missing; {_WAY_OUT}"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / SEAL} is corrupt ({error}); {_WAY_OUT}") from error
    found = _sizes(folder)
    for name, size in files.items():
        if name not in found:
            raise CheckpointError(f"{folder / name} is missing; {_WAY_OUT}")
        if found[name] != size:
            raise CheckpointError(
                f"{folder / name} is corrupt ({found[name]} bytes, {size} were written); {_WAY_OUT}"
            )
    processes = stored["plan"]["processes"]
    if processes != settings["plan"]["processes"]:
        raise CheckpointError(
            f"{folder} was written by {processes} processes, this run has "
            f"{settings['plan']['processes']}: launch as many as before, or start afresh in "
            "another output_dir"
        )
    differ = differences(stored, settings)
    if differ:
        raise CheckpointError(
            f"{folder} belongs to a run with other settings: {differ}; run with those, or start "
            "afresh in another output_dir"
        )
    return None if reference is None else str(reference)


def _sizes(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != SEAL
    }
