"""Batches of the trainer: settings of its loader, padding, and the tokens that it counts."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tiny import model, trainer, trajectories


def test_a_loader_has_the_settings_of_the_run(tmp_path: Path) -> None:
    for persistent, workers in ((True, 1), (False, 1), (True, 0)):
        loader = trainer(
            tmp_path,
            dataloader_num_workers=workers,
            dataloader_persistent_workers=persistent,
            dataloader_prefetch_factor=3 if workers else None,
        ).get_train_dataloader()
        assert loader.persistent_workers == (persistent and workers > 0)
        assert loader.prefetch_factor == (3 if workers else None)
        assert (loader.multiprocessing_context is not None) == (workers > 0)


@pytest.mark.parametrize("pad", [None, 5])
def test_padding_and_operations_of_a_batch(tmp_path: Path, pad: int | None) -> None:
    data = trajectories()
    keys = {*data.keys(True, True)}
    tokenizer = None if pad is None else SimpleNamespace(pad_token_id=pad)
    run = trainer(tmp_path, data=data, processing_class=tokenizer, proposal="reference")
    assert {*data.keys(True, True)} == keys
    parameters = sum(p.numel() for p in model().parameters())
    loader = iter(run.get_train_dataloader())
    for _ in range(3):
        (batch,), draws = run.get_batch_samples(loader, 1, torch.device("cpu"))
        tokens = batch["tokens", "full"]
        assert {*tokens[~batch["masks", "all_attention_mask"]].tolist()} == {pad or 0}
        assert run.floating_point_ops(batch) == 6 * parameters * tokens.numel()
        loss, out = run.compute_loss(run.model, batch, True, draws)
        assert float(loss) == pytest.approx(float(-out["log_prob"]), rel=1e-5)


def test_tokens_seen(tmp_path: Path) -> None:
    data, seen = trajectories(), {}
    for which in ("no", "all", "non_padding"):
        run = trainer(tmp_path, max_steps=3, include_num_input_tokens_seen=which)
        run.train()
        seen[which] = run.state.num_input_tokens_seen
    # Three updates are an epoch.
    assert seen["non_padding"] == len(data) < seen["all"]
    assert seen["no"] == 0
