"""Checkpoints of a fine-tuning run: folders that are whole or not there."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from iwsft.checkpoint import CheckpointError, differences, read
from iwsft.distributed import from_first
from iwsft.extras import named
from iwsft.files import full_disk_named, write
from iwsft.fingerprint import folder_sha256

with named():
    from safetensors import SafetensorError
    from transformers import EarlyStoppingCallback, Trainer
    from transformers.trainer import TRAINER_STATE_NAME
    from transformers.trainer_callback import ExportableState
    from transformers.trainer_utils import (
        PREFIX_CHECKPOINT_DIR,
        SaveStrategy,
        TrainOutput,
        get_last_checkpoint,
        rotate_checkpoints,
    )

SEAL = "iwsft.json"
# A folder of the run, in which a checkpoint is written before it takes its place. Uploads to the
# hub leave out names that begin like this.
ASIDE = "_partial"
_REPLACED = ".old"
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
        resume_from_checkpoint: str | os.PathLike[str] | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train; see :class:`transformers.Trainer`.

        ``resume_from_checkpoint`` is the folder of a checkpoint, or True for the last one in
        ``output_dir``; by default it is the setting of that name.

        Raises:
            FileExistsError: ``output_dir`` holds checkpoints of an earlier run.
            CheckpointError: The checkpoint is damaged, or of the model alone or other settings.
            FloatingPointError: Loss or weights are no longer finite; checkpoints stay.
        """
        run = Path(str(self.args.output_dir))
        newest = last(run)
        if resume_from_checkpoint is None:
            resume_from_checkpoint = self.args.resume_from_checkpoint
        checkpoint = newest if resume_from_checkpoint is True else resume_from_checkpoint or None
        if resume_from_checkpoint is True and newest is None:
            raise CheckpointError(f"there is no checkpoint to resume in {run}")
        if checkpoint is None and newest and self.args.save_strategy != SaveStrategy.NO:
            raise FileExistsError(
                f"{newest} is the checkpoint of an earlier run; continue that one with "
                "train(resume_from_checkpoint=True), or choose another output_dir"
            )
        if self.args.should_save:
            clear(run)
        self._resumed = self.reference_key = None
        if checkpoint is not None:
            self._resumed = Path(checkpoint)
            self.reference_key = check(self._resumed, self.settings())
            checkpoint = str(self._resumed)
        return super().train(checkpoint, trial, ignore_keys_for_eval)

    def restore(self) -> None:
        """Load the states of the checkpoint that the run continues from, if it does."""
        if self._resumed is None:
            return
        # The folder of the run may have moved.
        run = Path(self._get_output_dir(None))
        best = run / _name(self.state.best_global_step)
        if best.is_dir():
            self.state.best_model_checkpoint = str(best)
        for name, state in (*self.own_states.items(), *self.shared_states.items()):
            state.load_state_dict(read(self._resumed / self._file(name), _WAY_OUT))
        newest = last(run)
        # A kill may have come before older ones were removed, and a finished run saves none again.
        if self.args.should_save and newest and self._resumed.samefile(newest):
            self._rotate(run)

    def _file(self, name: str) -> str:
        own = name in self.own_states
        return f"{name}_{self.accelerator.process_index}.pt" if own else f"{name}.pt"

    def _load_callback_state(self) -> None:
        """Restore what callbacks remember, such as how often early stopping saw no progress."""
        states: Any = self.state.stateful_callbacks
        for callback in self.callback_handler.callbacks:
            saved = states.get(type(callback).__name__)
            if isinstance(callback, ExportableState) and isinstance(saved, dict):
                vars(callback).update(saved["attributes"])

    def _run_epoch(self, *args: Any, **settings: Any) -> None:
        """Train an epoch; nothing where the checkpoint is that of a finished run."""
        # transformers looks whether to stop only after each update.
        finished = self.control.should_training_stop
        finished |= self.state.global_step >= self.state.max_steps
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, EarlyStoppingCallback):
                tried = callback.early_stopping_patience_counter
                finished |= tried >= callback.early_stopping_patience
        self.control.should_training_stop = finished
        if not finished:
            super()._run_epoch(*args, **settings)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint once it is in its place."""
        if not self._aside:
            super()._push_from_checkpoint(checkpoint_folder)

    def _get_output_dir(self, trial: Any) -> str:
        run = super()._get_output_dir(trial)
        return str(Path(run) / ASIDE) if self._aside else run

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write a checkpoint aside, with the states, and publish it when it is whole."""
        self.check_finite()
        run = Path(self._get_output_dir(trial))
        place = run / _name(self.state.global_step)
        folder = run / ASIDE / place.name
        if self.args.should_save:
            clear(run)
        self.accelerator.wait_for_everyone()
        with written_aside(run):
            self._aside = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._aside = False
            states = dict(self.own_states) if not self.args.save_only_model else {}
            if self.args.should_save and not self.args.save_only_model:
                states |= self.shared_states
            for state, holder in states.items():
                # Straight to the disk; a sharded q is large.
                torch.save(holder.state_dict(), folder / self._file(state))
            if self.state.best_global_step == self.state.global_step:
                self.state.best_model_checkpoint = str(place)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                self.state.save_to_json(str(folder / TRAINER_STATE_NAME))
                self._publish(folder, place)
                self._rotate(run)
        self.accelerator.wait_for_everyone()

    def _rotate(self, run: Path) -> None:
        """Remove the oldest checkpoints beyond the limit."""
        rotate_checkpoints(
            str(run),
            save_total_limit=self.args.save_total_limit,
            best_model_checkpoint=self.state.best_model_checkpoint,
        )

    def _publish(self, folder: Path, place: Path) -> None:
        """Seal a checkpoint and move it to its place."""
        record = {
            "settings": self.settings(),
            "reference": self.reference_key,
            "model_only": self.args.save_only_model,
            "files": folder_sha256(folder, without=SEAL),
        }
        write(folder / SEAL, json.dumps(record, indent=2, sort_keys=True))
        if place.exists():
            os.replace(place, folder.with_name(f"{place.name}{_REPLACED}"))
        # After a kill here, the next start does the rest.
        clear(place.parent)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(place))


@contextmanager
def written_aside(run: Path) -> Iterator[None]:
    """Name the folder in errors of writing, such as a full disk, and leave nothing half written."""
    try:
        with full_disk_named(run / ASIDE):
            yield
    except BaseException as error:
        clear(run)
        if not isinstance(error, RuntimeError | SafetensorError):
            raise
        # Writers of torch and safetensors have errors of their own for a full disk.
        message = f"no checkpoint was written in {run}; is the disk full? ({error})"
        raise OSError(errno.EIO, message) from error


def last(run: Path) -> str | None:
    """The folder of a run's last checkpoint; None without one, or without the run's folder."""
    _settle(run)
    return get_last_checkpoint(str(run)) if run.is_dir() else None


def clear(run: Path) -> None:
    """Move a whole checkpoint to its place, and remove what is half written or replaced."""
    _settle(run)
    shutil.rmtree(run / ASIDE, ignore_errors=True)


def _settle(run: Path) -> None:
    """Move a checkpoint that is whole to its place if that is free; else the one it replaces."""
    for folder in sorted((run / ASIDE).glob(_name("*"))):
        place = run / folder.name.removesuffix(_REPLACED)
        whole = folder.suffix == _REPLACED or (folder / SEAL).exists()
        if whole and not place.exists():
            # Another process of the run may have moved it.
            with suppress(FileNotFoundError):
                os.replace(folder, place)


def check(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """Check that a checkpoint is whole and of these settings; return its reference's key."""
    try:
        record = json.loads((folder / SEAL).read_bytes())
        stored, files = dict(record["settings"]), dict(record["files"])
        reference, model_only = record["reference"], record["model_only"]
    except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / SEAL}, the mark of a checkpoint of this trainer, is missing, corrupt or of "
            f"an earlier version; {_WAY_OUT}"
        ) from error
    if model_only:
        raise CheckpointError(f"{folder} was saved with save_only_model=True; {_WAY_OUT}")
    differ = differences(stored, settings)
    if differ:
        raise CheckpointError(
            f"{folder} belongs to a run with other settings: {differ}; run with those, or start "
            "afresh in another output_dir"
        )
    # One process reads all; the others wait.
    now = from_first(lambda: folder_sha256(folder, without=SEAL))
    for name, digest in files.items():
        if now.get(name) != digest:
            raise CheckpointError(f"{folder / name} is missing or corrupt; {_WAY_OUT}")
    own = _name(json.loads((folder / TRAINER_STATE_NAME).read_bytes())["global_step"])
    # It would be found, kept and removed as the checkpoint of another update.
    if re.fullmatch(_name(r"\d+"), folder.name) and folder.name != own:
        raise CheckpointError(f"{folder} is {own} under another name; rename it")
    return None if reference is None else str(reference)


def _name(update: int | str | None) -> str:
    return f"{PREFIX_CHECKPOINT_DIR}-{update}"
