"""The rows of metrics that ``fit`` writes: at which updates, and with which outputs of the loss."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from iwsft import checkpoint, metrics
from iwsft.training import Row, fit
from tests.test_training import JOBS, SCHEDULE, STEPS, train


def test_rows_are_logged_at_the_first_the_last_and_every_nth_update(tmp_path: Path) -> None:
    train(JOBS["cached, steps, hard sync"](), tmp_path)
    rows = metrics.read(tmp_path / metrics.FILE)
    due = {1, STEPS, *range(3, STEPS + 1, 3), *range(4, STEPS + 1, 4)}
    assert [row["step"] for row in rows] == sorted(due)
    assert [row["step"] for row in rows if "bound_gap" in row] == [*range(4, STEPS + 1, 4)]
    for row in rows:
        assert row["lr"] == pytest.approx(SCHEDULE.lr * SCHEDULE.factor(int(row["step"]) - 1))
    assert [row["wall_seconds"] for row in rows] == sorted(row["wall_seconds"] for row in rows)


@pytest.mark.parametrize("log_every", [STEPS, STEPS + 1, 10**9])
def test_rows_of_few_updates_are_the_first_and_the_last(tmp_path: Path, log_every: int) -> None:
    made, rows = JOBS["cached, steps, hard sync"](), list[Row]()
    options: dict[str, Any] = {"log_every": log_every, "report": rows.append, "folder": tmp_path}
    fit(made.loss, made.sampler, SCHEDULE, updater=made.updater, **options)
    assert [row["step"] for row in rows] == [1, STEPS]
    assert [row["step"] for row in metrics.read(tmp_path / metrics.FILE)] == [1, STEPS]


def test_the_disk_has_the_rows_before_the_checkpoint_that_counts_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine that stops loses what no ``fsync`` has written."""
    kept: dict[Path, str] = {}
    counted: list[tuple[int, list[int]]] = []
    fsync = os.fsync

    def follow(number: int) -> None:
        fsync(number)
        path = Path(os.readlink(f"/proc/self/fd/{number}"))
        kept[path] = path.read_text() if path.name == metrics.FILE else ""
        if path.parent.name == checkpoint.FOLDER:
            rows = map(json.loads, kept.get(tmp_path / metrics.FILE, "").splitlines())
            step = checkpoint.read(path, "")["state"]["step"]
            counted.append((step, [row["step"] for row in rows]))

    monkeypatch.setattr(os, "fsync", follow)
    made = JOBS["cached, steps, hard sync"]()
    options: dict[str, Any] = {"log_every": 1, "checkpoint_every": 3, "folder": tmp_path}
    fit(made.loss, made.sampler, SCHEDULE, updater=made.updater, **options)
    ends = sorted({*range(3, STEPS + 1, 3), STEPS})
    assert counted == [(end, [*range(1, end + 1)]) for end in ends]


def test_rows_have_the_outputs_that_the_user_selected() -> None:
    """Between rows ``fit`` computes the loss alone; that changes neither rows nor parameters."""
    every = {"ESS", "kl_approx", "clip_fraction", "weight_mean", "weight_max", "log_prob"}
    ends = []
    for chosen, log_every in ((every, 1), (every, 1000), ({"ESS"}, 7)):
        made, rows = JOBS["cached, steps, hard sync"](), list[Row]()
        if chosen != every:
            made.loss.select_out_keys("loss_iw_mle", *chosen)
        keys = list(made.loss.out_keys)
        options: dict[str, Any] = {"log_every": log_every, "report": rows.append}
        fit(made.loss, made.sampler, SCHEDULE, updater=made.updater, **options)
        assert rows and all(every & row.keys() == chosen for row in rows)
        assert made.loss.out_keys == keys
        assert set(made.loss(made.sampler.sample()).keys()) == set(keys)
        ends.append([torch.tensor(rows[-1]["ESS"]), *made.loss.parameters()])
    for one, other in itertools.pairwise(ends):
        assert all(map(torch.equal, one, other))
