"""The rows of metrics that ``fit`` writes: at which updates, and with which outputs of the loss."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from iwsft import metrics
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
