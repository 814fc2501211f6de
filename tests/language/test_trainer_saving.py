"""What transformers remembers of a checkpoint holds; what does not resume exactly is refused."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny import ImportanceWeightedTrainer, Stop, losses, trainer, trajectories
from transformers import EarlyStoppingCallback
from transformers import trainer as hf_trainer

from iwsft.checkpoint import CheckpointError
from iwsft.language import saving

SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
# The likelihood of held-out random tokens is best after a few updates.
JUDGED: dict[str, Any] = {
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "metric_for_best_model": "eval_loss",
    "greater_is_better": False,
    "learning_rate": 3e-2,
    "proposal": "reference",
    "eval_trajectories": trajectories(4, seed=5),
}
LAGGED = {"proposal": "lagged", "ema_decay": 0.9}


def _parameters(run: ImportanceWeightedTrainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in run.model.parameters()]


def _equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def _best(run: ImportanceWeightedTrainer) -> int:
    """The update after which the held-out loss was least."""
    rows = [row for row in run.state.log_history if "eval_loss" in row]
    return int(min(rows, key=lambda row: row["eval_loss"])["step"])


def _steps(folder: Path) -> set[int]:
    return {int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*")}


@pytest.mark.parametrize("limit", [None, 2, 1])
@pytest.mark.parametrize("strategy", ["steps", "best"])
def test_the_best_checkpoint_is_where_the_state_says(
    tmp_path: Path, strategy: str, limit: int | None
) -> None:
    run = trainer(tmp_path, **{**JUDGED, "save_strategy": strategy, "save_total_limit": limit})
    run.train()
    best = _best(run)
    assert 1 < best < 7
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    kept = _steps(tmp_path)
    if limit is None:
        assert kept >= {1, best}
    elif strategy == "steps":
        # With one place only, transformers leaves the best at the end.
        assert kept == ({best, 7} if limit == 2 else {best})
    for step in kept:
        state = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
        recorded = Path(state["best_model_checkpoint"])
        assert recorded.parent == tmp_path
        assert limit is not None or recorded.is_dir()


def test_the_best_checkpoint_moves_with_the_run(tmp_path: Path) -> None:
    own = {**JUDGED, "save_total_limit": 2}
    first = trainer(tmp_path / "first", callbacks=[Stop(6)], **own)
    first.train()
    best = _best(first)
    shutil.move(tmp_path / "first", tmp_path / "moved")
    run = trainer(tmp_path / "moved", **own)
    run.train(resume_from_checkpoint=True)
    assert run.state.best_model_checkpoint == str(tmp_path / "moved" / f"checkpoint-{best}")
    assert _steps(tmp_path / "moved") == {best, 7}


def _relative(folder: Path) -> str:
    return os.path.relpath(folder)


def _with_slash(folder: Path) -> str:
    return f"{folder}/"


def _itself(folder: Path) -> Path:
    return folder


@pytest.mark.parametrize("form", [str, _itself, _relative, _with_slash])
def test_a_checkpoint_is_named_in_any_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    whole = trainer(tmp_path, **SAVED, **LAGGED)
    whole.train()
    where = form(tmp_path / "checkpoint-2")
    by_argument = trainer(tmp_path, **SAVED, **LAGGED)
    by_argument.train(resume_from_checkpoint=where)
    by_setting = trainer(tmp_path, resume_from_checkpoint=str(where), **SAVED, **LAGGED)
    by_setting.train()
    for run in (by_argument, by_setting):
        assert _equal(_parameters(run), _parameters(whole))
        rows = [row["weight_mean"] for row in run.state.log_history if "loss" in row]
        assert rows == [row["weight_mean"] for row in whole.state.log_history if "loss" in row]


@pytest.mark.parametrize(
    "own",
    [
        # In the middle of an epoch of three updates, and at the end of one.
        {"max_steps": 4, "proposal": "cached", "sync_every": 3},
        {"max_steps": 3, **LAGGED},
        {"max_steps": -1, "num_train_epochs": 1},
        {"callbacks": True, **JUDGED},
    ],
    ids=["within an epoch", "at its end", "by epochs", "early stopping"],
)
def test_a_finished_run_is_not_trained_further(tmp_path: Path, own: dict[str, Any]) -> None:
    own = {**SAVED, "save_steps": 1, **own}

    def make() -> ImportanceWeightedTrainer:
        callbacks = [EarlyStoppingCallback(1)] if own.get("callbacks") else []
        return trainer(tmp_path, **{**own, "callbacks": callbacks})

    run = make()
    run.train()
    again = make()
    for _ in range(2):
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == run.state.global_step
        assert _equal(_parameters(again), _parameters(run))


def test_early_stopping_counts_on_over_a_kill(tmp_path: Path) -> None:
    own = {**JUDGED, "max_steps": 12}
    whole = trainer(tmp_path / "whole", callbacks=[EarlyStoppingCallback(3)], **own)
    whole.train()
    best = _best(whole)
    assert whole.state.global_step == best + 3
    callbacks = [EarlyStoppingCallback(3), Stop(best + 1)]
    trainer(tmp_path / "killed", callbacks=callbacks, **own).train()
    resumed = trainer(tmp_path / "killed", callbacks=[EarlyStoppingCallback(3)], **own)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == whole.state.global_step
    assert losses(resumed) == losses(whole)


def test_a_model_alone_is_not_resumed(tmp_path: Path) -> None:
    trainer(tmp_path, save_only_model=True, **SAVED, **LAGGED).train()
    assert not list(tmp_path.glob("checkpoint-4/q_0.pt"))
    for where in (True, tmp_path / "checkpoint-2"):
        with pytest.raises(CheckpointError, match="was saved with save_only_model=True"):
            trainer(tmp_path, **SAVED, **LAGGED).train(resume_from_checkpoint=where)


def test_a_flipped_bit_in_any_file_is_seen(tmp_path: Path) -> None:
    own = {**SAVED, **LAGGED, "max_steps": 2}
    trainer(tmp_path, **own).train()
    names = sorted(path.name for path in (tmp_path / "checkpoint-2").iterdir())
    assert {"model.safetensors", "optimizer.pt", "q_0.pt", "weights.pt", "rng_state.pth"} < {*names}
    run = trainer(tmp_path, **own)
    for name in names:
        file = tmp_path / "checkpoint-2" / name
        content = file.read_bytes()
        damaged = bytearray(content)
        damaged[len(damaged) * 3 // 5] ^= 0x40
        file.write_bytes(damaged)
        if name == saving.SEAL:
            # Its settings, key or checksums no longer fit, or it can't be read.
            with pytest.raises((CheckpointError, FileNotFoundError, ValueError)):
                run.train(resume_from_checkpoint=True)
        else:
            with pytest.raises(CheckpointError, match=f"{name} is missing or corrupt"):
                run.train(resume_from_checkpoint=True)
        file.write_bytes(content)
    (tmp_path / "checkpoint-2").rename(tmp_path / "checkpoint-7")
    with pytest.raises(CheckpointError, match="checkpoint-7 is checkpoint-2 under another name"):
        run.train(resume_from_checkpoint=True)
    best = (tmp_path / "checkpoint-7").rename(tmp_path / "best")
    run.train(resume_from_checkpoint=str(best))


@pytest.mark.parametrize(
    "own",
    [
        *({"learning_rate": 1e-4}, {"weight_decay": 0.1}, {"adam_beta2": 0.9}, {"optim": "sgd"}),
        *({"lr_scheduler_type": "constant"}, {"warmup_steps": 2}, {"max_grad_norm": 0.1}),
    ],
)
def test_settings_of_updates_that_a_run_keeps_when_it_is_resumed(
    tmp_path: Path, own: dict[str, Any]
) -> None:
    trainer(tmp_path, **SAVED).train()
    (name,) = own
    with pytest.raises(CheckpointError, match=f"optimizer.{name}="):
        trainer(tmp_path, **{**SAVED, **own}).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_an_earlier_version(tmp_path: Path) -> None:
    trainer(tmp_path, **SAVED).train()
    seal = tmp_path / "checkpoint-4" / saving.SEAL
    record = json.loads(seal.read_text())
    del record["model_only"]
    seal.write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="iwsft.json.* of an earlier version"):
        trainer(tmp_path, **SAVED).train(resume_from_checkpoint=True)


@pytest.mark.parametrize("strategy", ["checkpoint", "all_checkpoints"])
def test_an_upload_is_of_a_whole_checkpoint_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strategy: str
) -> None:
    uploads: list[tuple[str, set[str]]] = []

    class Hub:
        def create_repo(self, *args: Any, **kwargs: Any) -> Any:
            return SimpleNamespace(repo_id="me/run")

        def upload_folder(self, *, folder_path: str, **kwargs: Any) -> Any:
            if "path_in_repo" in kwargs:
                files = {path.name for path in Path(folder_path).iterdir()}
                uploads.append((str(folder_path), files))
            return SimpleNamespace(done=lambda: True)

    monkeypatch.setattr(hf_trainer, "hf_api", Hub)
    run = trainer(tmp_path, push_to_hub=True, hub_strategy=strategy, **SAVED, **LAGGED)
    run.train()
    assert [folder for folder, _ in uploads] == [
        str(tmp_path / "checkpoint-2"),
        str(tmp_path / "checkpoint-4"),
    ]
    for _, files in uploads:
        assert {"model.safetensors", "optimizer.pt", "q_0.pt", saving.SEAL} < files


def test_what_a_kill_left_half_written_goes(tmp_path: Path) -> None:
    trainer(tmp_path, **SAVED).train()
    half = tmp_path / saving.ASIDE / "checkpoint-6"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_bytes(b"half")
    trainer(tmp_path, **SAVED).train(resume_from_checkpoint=True)
    assert not (tmp_path / saving.ASIDE).exists()


def test_a_checkpoint_that_a_kill_kept_from_removal_goes(tmp_path: Path) -> None:
    trainer(tmp_path, **SAVED).train()
    earlier = tmp_path / "checkpoint-2"
    (earlier / saving.SEAL).unlink()
    trainer(tmp_path, **SAVED, save_total_limit=1).train(resume_from_checkpoint=True)
    assert _steps(tmp_path) == {4}


def test_resumption_from_an_earlier_checkpoint_keeps_it_until_it_saves(tmp_path: Path) -> None:
    trainer(tmp_path, **SAVED).train()
    run = trainer(tmp_path, **SAVED, save_total_limit=1, callbacks=[Stop(3)])
    run.train(resume_from_checkpoint=tmp_path / "checkpoint-2")
    assert _steps(tmp_path) == {2, 4}


def test_a_kill_at_any_step_of_a_replacement_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in place of each call that moves or removes files, while checkpoint 4 is replaced."""
    run = trainer(tmp_path / "run", **SAVED)
    run.train()
    publish, codes, moved = run._publish, [], []
    fresh = tmp_path / "run" / "checkpoint-4" / "fresh"

    def killed(folder: Path, place: Path) -> None:
        (folder / fresh.name).touch()
        for at in itertools.count(1):
            calls = itertools.count(1)

            def look(event: str, _: Any, at: int = at, calls: Any = calls) -> None:
                if event in ("os.rename", "os.remove", "shutil.rmtree") and next(calls) == at:
                    os._exit(9)

            shutil.copytree(tmp_path / "run", tmp_path / "before")
            pid = os.fork()
            if pid == 0:
                sys.addaudithook(look)
                publish(folder, place)
                os._exit(0)
            codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            newest = saving.last(tmp_path / "run")
            assert newest == str(place)
            saving.check(place, run.settings())
            moved.append(fresh.exists())
            if codes[-1] == 0:
                return
            shutil.rmtree(tmp_path / "run")
            shutil.move(tmp_path / "before", tmp_path / "run")

    monkeypatch.setattr(run, "_publish", killed)
    run.train(resume_from_checkpoint=tmp_path / "run" / "checkpoint-2")
    assert set(codes) == {0, 9}
    # From some step on it is the new one.
    assert moved == sorted(moved) and {*moved} == {False, True}
    assert not (tmp_path / "run" / saving.ASIDE).exists()
