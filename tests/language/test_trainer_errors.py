"""The trainer refuses bad input before it spends time, and never loses a saved file."""

from __future__ import annotations

import json
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import losses, model, trainer, trajectories
from torch import Tensor
from transformers import TrainerCallback, TrainingArguments

from iwsft import CausalLMPolicy, ImportanceWeights, weights
from iwsft.checkpoint import CheckpointError
from iwsft.language import ImportanceWeightedConfig, ImportanceWeightedTrainer, saving
from iwsft.language.loss import token_loss
from iwsft.trajectory import STANDARD_SCORE, pad

SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
CACHED = {**SAVED, "proposal": "cached", "sync_every": 3}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"proposal": "cached"}, "proposal='cached' needs sync_every"),
        ({"proposal": "current", "sync_every": 5}, "sync_every=5 changes nothing"),
        ({"proposal": "cached", "sync_every": 0}, "sync_every=0"),
        ({"proposal": "cached", "sync_every": 1.5}, "sync_every=1.5 must be a whole number"),
        ({"proposal": "lagged"}, "proposal='lagged' needs ema_decay"),
        ({"proposal": "lagged", "ema_decay": 1.0}, "must be in"),
        ({"proposal": "theta"}, "proposal='theta' must be one of"),
        ({"layout": "ragged"}, "layout='ragged' must be one of"),
        ({"pad_to_multiple_of": 0}, "pad_to_multiple_of=0 must be at least 1"),
        ({"load_best_model_at_end": True, "eval_strategy": "no"}, "load_best_model_at_end"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1 is not supported"),
        ({"dataloader_drop_last": True}, "dataloader_drop_last=True is not supported"),
        ({"dataloader_in_order": False}, "dataloader_in_order=False is not supported"),
        ({"train_sampling_strategy": "sequential"}, "train_sampling_strategy='sequential'"),
        ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy='group_by"),
        ({"bf16_full_eval": True}, "bf16_full_eval=True is not supported"),
        ({"enable_jit_checkpoint": True}, "enable_jit_checkpoint=True is not supported"),
        ({"accelerator_config": {"split_batches": True}}, "can't split or dispatch batches"),
        ({"metric_for_best_model": "accuracy"}, "'accuracy' is unknown; metrics are eval_loss"),
        ({"token_budget": 10}, "more than token_budget=10"),
        ({"max_length": 4}, "max_length=4 cuts rows of text alone"),
    ],
)
def test_settings(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, **settings)


@pytest.mark.parametrize("chain", ["auto", [], [weights.Temperature(2.0)]], ids=str)
def test_weights_that_are_no_chain(tmp_path: Path, chain: Any) -> None:
    with pytest.raises(TypeError, match=r"importance_weights=.* must be a chain: Imp"):
        trainer(tmp_path, importance_weights=chain)
    with pytest.raises(TypeError, match=r"importance_weights=.* must be a chain: Imp"):
        token_loss(CausalLMPolicy(model()), importance_weights=chain)


def test_settings_without_effect_are_named(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="without effect here: eval_accumulation_steps, label_n"):
        trainer(tmp_path, eval_accumulation_steps=2, label_names=["labels"])
    with pytest.warns(UserWarning, match="without effect here: metric_for_best_model without"):
        trainer(tmp_path, metric_for_best_model="loss")
    for own, problem in (
        ({"token_budget": 64, "per_device_train_batch_size": 2}, "per_device_.* with token_budget"),
        ({"layout": "packed", "pad_to_multiple_of": 16}, "pad_to_multiple_of with layout='packed'"),
        ({"include_for_metrics": ["loss"]}, "include_for_metrics"),
    ):
        with pytest.warns(UserWarning, match=f"without effect here: {problem}"):
            trainer(tmp_path, **own)


class _Centred:
    """A transform that the library does not know, and that compares weights."""

    compares = True

    def __call__(self, log_weight: Tensor, share: Tensor) -> Tensor:
        return log_weight - (share * log_weight).sum() / share.sum()


@pytest.mark.parametrize("transform", [weights.SelfNormalize(), weights.TargetESS(0.5), _Centred()])
def test_a_transform_that_compares_needs_the_whole_update(tmp_path: Path, transform: Any) -> None:
    own = {"importance_weights": ImportanceWeights(trajectory=[transform]), "proposal": "current"}
    trainer(tmp_path, **own)
    with pytest.raises(ValueError, match="into 2 micro-batches; use one, or .* proposal='cached'"):
        trainer(tmp_path, gradient_accumulation_steps=2, **own)


@pytest.mark.parametrize("scores", [None, 0.5])
def test_scores_that_choose_nothing(tmp_path: Path, scores: float | None) -> None:
    data = trajectories()
    if scores is not None:
        data.set(STANDARD_SCORE, torch.full((len(data),), scores))
    with pytest.raises(ValueError, match=r"missing or all equal.*graded scores"):
        trainer(tmp_path, data=data, importance_weights=ImportanceWeights.auto())


def test_a_chain_that_must_overflow(tmp_path: Path) -> None:
    chain = ImportanceWeights(step=[weights.ClipRatio(min=1e9)], reduce="sum")
    with pytest.raises(OverflowError, match="a trajectory of 16 steps"):
        trainer(tmp_path, importance_weights=chain)


def test_held_out_data_are_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="eval_trajectories"):
        trainer(tmp_path).evaluate()
    with pytest.raises(ValueError, match="eval_trajectories"):
        trainer(tmp_path, eval_trajectories=trajectories()).evaluate(trajectories())


@pytest.mark.parametrize("own", [{"max_steps": 4}, {**SAVED, "logging_steps": 100}], ids=str)
def test_a_loss_that_is_not_finite(tmp_path: Path, own: dict[str, Any]) -> None:
    """It is seen where a line is logged, and where a checkpoint is saved."""
    run = trainer(tmp_path, learning_rate=1e30, proposal="reference", **own)
    with pytest.raises(FloatingPointError, match="no longer finite.*lower learning_rate"):
        run.train()
    assert not list(tmp_path.glob("checkpoint-*"))


def test_there_is_nothing_to_resume(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no checkpoint to resume in"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
    # Another process of the run makes the folder.
    run = trainer(tmp_path / "later", **SAVED)
    (tmp_path / "later").rmdir()
    run.train()
    assert (tmp_path / "later" / "checkpoint-4").is_dir()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run with cached weights that saved two checkpoints."""
    folder = tmp_path_factory.mktemp("finished")
    trainer(folder, **CACHED).train()
    return folder


@pytest.fixture
def saved(finished: Path, tmp_path: Path) -> Path:
    """A copy of ``finished``."""
    return Path(shutil.copytree(finished, tmp_path, dirs_exist_ok=True))


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"proposal": "current", "sync_every": None}, "proposal='cached' .now 'current'"),
        ({"seed": 3}, "plan.seed=42 .now 3"),
        ({"gradient_accumulation_steps": 2}, "plan.accumulation=1 .now 2"),
        ({"importance_weights": ImportanceWeights(reduce="sum")}, "importance_weights="),
        ({"data": trajectories(seed=1)}, "trajectories="),
    ],
)
def test_a_checkpoint_of_another_run(saved: Path, own: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        trainer(saved, **{**CACHED, **own}).train(resume_from_checkpoint=True)


def test_a_checkpoint_of_other_scores_that_choose_the_temperature(tmp_path: Path) -> None:
    runs = []
    for turned in (False, False, True):
        data = trajectories()
        score = data["collector", "traj_ids"].double()
        data.set(STANDARD_SCORE, -score if turned else score)
        auto = {**CACHED, "importance_weights": ImportanceWeights.auto(), "data": data}
        runs.append(trainer(tmp_path, **auto))
    for run in runs[:2]:
        run.train(resume_from_checkpoint=run is not runs[0])
    with pytest.raises(CheckpointError, match="other settings: scores="):
        runs[2].train(resume_from_checkpoint=True)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.pt", "weights.pt", "iwsft.json"])
def test_a_checkpoint_without_one_of_its_files(saved: Path, name: str) -> None:
    (saved / "checkpoint-4" / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name}.*resume from an earlier checkpoint"):
        trainer(saved, **CACHED).train(resume_from_checkpoint=True)


def test_the_reference_is_gone(saved: Path) -> None:
    shutil.rmtree(saved / "reference")
    with pytest.raises(FileNotFoundError, match="the reference of this run.*is gone"):
        trainer(saved, **CACHED).train(resume_from_checkpoint=True)


KILLED = {"proposal": "cached", "sync_every": 3, "max_steps": 12, "save_steps": 1}


def _continue(folder: Path) -> None:
    torch.set_num_threads(1)
    run = trainer(folder, **{**SAVED, **KILLED})
    run.train(resume_from_checkpoint=any(folder.glob("checkpoint-*")) or None)


def test_a_kill_while_a_checkpoint_is_written(forkserver: Any, tmp_path: Path) -> None:
    """Whenever it comes, the run continues from a whole checkpoint to the same end."""
    whole = trainer(tmp_path / "whole", **{**SAVED, **KILLED})
    whole.train()
    folder = tmp_path / "killed"
    for wait in (0.0, 0.05):
        before = len(list(folder.glob("checkpoint-*")))
        child = forkserver.Process(target=_continue, args=(folder,))
        child.start()
        while len(list(folder.glob("checkpoint-*"))) < before + 2 and child.is_alive():
            time.sleep(0.002)
        time.sleep(wait)
        child.kill()
        child.join()
        for checkpoint in folder.glob("checkpoint-*"):
            assert (checkpoint / saving.SEAL).exists()
    resumed = trainer(folder, **{**SAVED, **KILLED})
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    for ours, theirs in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_old_checkpoints_go_when_a_new_one_is_whole(tmp_path: Path) -> None:
    trainer(tmp_path, **{**SAVED, "save_steps": 1, "save_total_limit": 2}).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-4",
    ]
    assert not (tmp_path / saving.ASIDE).exists()


def test_no_space_for_a_checkpoint(full_disk: Any, tmp_path: Path) -> None:
    """Files may not grow beyond 64 KiB from the second checkpoint on: as on a full disk."""
    with ExitStack() as stack, pytest.raises(OSError, match="space"):

        class Full(TrainerCallback):
            def on_save(self, *args: Any, **kwargs: Any) -> None:
                stack.enter_context(full_disk(1 << 16))

        trainer(tmp_path, callbacks=[Full()], **SAVED).train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (tmp_path / saving.ASIDE).exists()
    trainer(tmp_path, **SAVED).train(resume_from_checkpoint=True)
    assert (tmp_path / "checkpoint-4").is_dir()
    assert json.loads((tmp_path / "checkpoint-4" / saving.SEAL).read_text())["files"]


def test_wrong_arguments_are_named(tmp_path: Path) -> None:
    class Held:
        trajectories = trajectories()

    with pytest.raises(TypeError, match="not a Held; pass its .trajectories"):
        trainer(tmp_path, data=Held())  # type: ignore[arg-type]
    for weight, message in (
        (torch.nan, "'data_weight' is NaN, infinite or"),
        (0.0, "'data_weight' is 0 everywhere"),
        (-1.0, "'data_weight' is negative, and this loss then has no lower bound"),
    ):
        data = trajectories()
        with pytest.raises(ValueError, match=message):
            trainer(tmp_path, data=data.set("data_weight", torch.full((len(data),), weight)))
    with pytest.raises(ValueError, match=r"the trajectories are locked: pass trajectories.copy"):
        trainer(tmp_path, data=trajectories().lock_())
    with pytest.raises(ValueError, match=r"padded; use trajectory.pack\(trajectories\)"):
        trainer(tmp_path, data=pad(trajectories()))
    untrained = trajectories()
    untrained["masks", "all_assistant_mask"].zero_()
    with pytest.raises(ValueError, match="trajectory 0 has every step masked; drop it"):
        trainer(tmp_path, data=untrained)
    with pytest.raises(TypeError, match="ImportanceWeightedConfig, not TrainingArguments"):
        ImportanceWeightedTrainer(
            model(), TrainingArguments(str(tmp_path), use_cpu=True), trajectories=trajectories()
        )
    with pytest.warns(UserWarning, match="torch.bfloat16, which round small steps"):
        trainer(tmp_path, model=model().bfloat16())
    rows = [{"prompt": "1+1=", "completion": "2"}]
    args = ImportanceWeightedConfig(str(tmp_path), use_cpu=True)
    for own, message in (
        ({}, "nothing to train on: pass trajectories= or train_dataset="),
        ({"train_dataset": rows}, "train_dataset has rows of text: pass the tokenizer"),
        ({"train_dataset": rows, "trajectories": trajectories()}, "pass one of them"),
        ({"train_dataset": trajectories()}, "pass token trajectories as trajectories="),
        (
            {"trajectories": trajectories(), "eval_dataset": {"train": rows, "test": rows}},
            r"eval_dataset has several parts \(train, test\): pass the rows of one",
        ),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            ImportanceWeightedTrainer(model(), args, **own)


def test_checkpoints_of_an_earlier_run_stay(saved: Path) -> None:
    with pytest.raises(FileExistsError, match="checkpoint-4 is the checkpoint of an earlier run"):
        trainer(saved, **CACHED).train()


def test_trajectories_that_the_model_cannot_read(tmp_path: Path) -> None:
    """The trainer refuses them when it is made, wherever they are in the data."""
    data = trajectories()
    data["tokens", "full"][-1] = 97
    with pytest.raises(ValueError, match="token 97 is outside the vocabulary"):
        trainer(tmp_path, data=data)
    data = trajectories()
    data["collector", "traj_ids"][:] = 0
    with pytest.raises(ValueError, match="a trajectory has 149 tokens, Qwen2ForCausalLM reads 64"):
        trainer(tmp_path, eval_trajectories=data)
