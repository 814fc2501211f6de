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
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import (
    PREFIX_CHECKPOINT_DIR,
    SaveStrategy,
    TrainOutput,
    get_last_checkpoint,
    rotate_checkpoints,
)

from iwsft.checkpoint import CheckpointError, differences, read
from iwsft.files import full_disk_named, written_whole

SEAL = "iwsft.json"
# A hidden folder of the run, in which a checkpoint is written before it takes its place.
ASIDE = ".partial"
_WAY_OUT = "resume from an earlier checkpoint, or start afresh in another output_dir"


class CheckpointedTrainer(Trainer):
    """A Trainer that writes its checkpoints whole, and resumes only those of the same settings.

    Attributes:
        own_states: Objects that each process saves and restores, by name.
        shared_states: Objects that the first process saves and all processes restore, by name.
        reference_key: Key of the run's reference log-probs, where it has some.
    """

    def __init__(self, **settings: Any) -> None:
        self.own_states: dict[str, Any] = {}
        self.shared_states: dict[str, Any] = {}
        self.reference_key: str | None = None
        self._resumed: Path | None = None
        self._aside = False
        super().__init__(**settings)

    def settings(self) -> dict[str, Any]:
        """Settings that a checkpoint belongs to; each trainer says what its own are."""
        raise NotImplementedError

    def check_finite(self) -> None:
        """Raise if what would be saved is not worth it."""

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train; see :class:`transformers.Trainer`.

        Args:
            resume_from_checkpoint: Folder of a checkpoint; True for the last in ``output_dir``.
            trial: Trial of a search over settings.
            ignore_keys_for_eval: Not used.

        Raises:
            FileExistsError: ``output_dir`` holds checkpoints of an earlier run.
            CheckpointError: The checkpoint is damaged, or has other settings or another number of
                processes.
            FloatingPointError: Loss or weights are no longer finite; checkpoints stay.
        """
        run = Path(str(self.args.output_dir))
        newest = last(run)
        checkpoint = newest if resume_from_checkpoint is True else resume_from_checkpoint or None
        if resume_from_checkpoint is True and newest is None:
            raise CheckpointError(f"there is no checkpoint to resume in {run}")
        if checkpoint is None and newest and self.args.save_strategy != SaveStrategy.NO:
            raise FileExistsError(
                f"{newest} is the checkpoint of an earlier run; continue that one with "
                "train(resume_from_checkpoint=True), or choose another output_dir"
            )
        self._resumed = self.reference_key = None
        if checkpoint is not None:
            self._resumed = Path(checkpoint)
            self.reference_key = check(self._resumed, self.settings())
        result: TrainOutput = super().train(checkpoint, trial, ignore_keys_for_eval)
        return result

    def restore(self) -> None:
        """Load the states of the checkpoint that the run continues from, if it does.

        Raises:
            CheckpointError: A file is damaged.
        """
        if self._resumed is None:
            return
        for name, state in (*self.own_states.items(), *self.shared_states.items()):
            state.load_state_dict(read(self._resumed / self._file(name), _WAY_OUT))

    def _file(self, name: str) -> str:
        own = name in self.own_states
        return f"{name}_{self.accelerator.process_index}.pt" if own else f"{name}.pt"

    def _get_output_dir(self, trial: Any) -> str:
        run = super()._get_output_dir(trial)
        return str(Path(run) / ASIDE) if self._aside else run

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint aside, with the states, and publish it when it is whole."""
        self.check_finite()
        run = Path(self._get_output_dir(trial))
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            clear(run)
        self.accelerator.wait_for_everyone()
        with written_aside(run):
            self._aside = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._aside = False
            folder = run / ASIDE / name
            states = dict(self.own_states)
            if self.args.should_save:
                states |= self.shared_states
            for state, holder in states.items():
                # Straight to the disk; a sharded q is large.
                torch.save(holder.state_dict(), folder / self._file(state))
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                # The files of a complete checkpoint with their sizes, and what it belongs to.
                record = {
                    "settings": self.settings(),
                    "reference": self.reference_key,
                    "files": _sizes(folder),
                }
                with written_whole(folder / SEAL) as partial:
                    partial.write_text(json.dumps(record, indent=2, sort_keys=True))
                if (run / name).exists():
                    os.replace(run / name, folder.with_name(f"{name}.old"))
                os.replace(folder, run / name)
                clear(run)
                rotate_checkpoints(str(run), save_total_limit=self.args.save_total_limit)
        self.accelerator.wait_for_everyone()


@contextmanager
def written_aside(run: Path) -> Iterator[None]:
    """Add to errors of writing that earlier checkpoints are as they were.

    Raises:
        OSError: The disk is full, or a writer failed.
    """
    with full_disk_named(run / ASIDE):
        try:
            yield
        except (RuntimeError, SafetensorError) as error:
            # Writers of torch and safetensors have errors of their own for a full disk.
            message = f"no checkpoint was written in {run}; is the disk full? ({error})"
            raise OSError(errno.EIO, message) from error


def last(run: Path) -> str | None:
    """The folder of a run's last checkpoint; None without one, or without the run's folder."""
    newest: str | None = get_last_checkpoint(str(run)) if run.is_dir() else None
    return newest


def clear(run: Path) -> None:
    """Remove what a killed run has half written."""
    if (run / ASIDE).exists():
        shutil.rmtree(run / ASIDE)


def check(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """Check that a checkpoint is whole and belongs to a run with these settings.

    Returns:
        The key of the reference log-probs of its run.

    Raises:
        CheckpointError: It is missing, damaged, or of other settings; the message says what.
    """
    try:
        record = json.loads((folder / SEAL).read_bytes())
        stored, files, reference = record["settings"], record["files"], record["reference"]
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / SEAL}, the mark of a checkpoint of this trainer, is missing or corrupt; "
            f"{_WAY_OUT}"
        ) from error
    sizes = _sizes(folder)
    for name, size in files.items():
        if sizes.get(name) != size:
            raise CheckpointError(f"{folder / name} is missing or corrupt; {_WAY_OUT}")
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
