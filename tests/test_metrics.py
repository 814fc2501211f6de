"""Metrics of a run: JSON lines, also after an interruption and a resume."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from iwsft.metrics import FILE, MetricsLog, check_limits, read
from iwsft.schedule import Schedule


def rows(first: int, last: int, sign: float = 1.0) -> list[dict[str, float]]:
    return [{"step": step, "loss": sign * step, "ESS": 0.5} for step in range(first, last + 1)]


def log(folder: Path, rows: list[dict[str, float]], *, after: int = 0) -> None:
    metrics = MetricsLog(folder, after=after)
    for row in rows:
        metrics.write(row)


def test_rows_are_read_back(tmp_path: Path) -> None:
    log(tmp_path, rows(1, 5))
    assert read(tmp_path / FILE) == rows(1, 5)


def test_a_row_is_on_disk_at_once(tmp_path: Path) -> None:
    metrics = MetricsLog(tmp_path)
    metrics.write({"step": 1, "loss": 2.0})
    assert read(tmp_path / FILE) == [{"step": 1, "loss": 2.0}]


def test_a_resume_cuts_later_rows_off(tmp_path: Path) -> None:
    log(tmp_path, rows(1, 9))
    log(tmp_path, rows(6, 8, sign=-1), after=5)
    assert read(tmp_path / FILE) == rows(1, 5) + rows(6, 8, sign=-1)


@pytest.mark.parametrize("torn", ['{"st', '{"step": 6, "loss": 1.0}', ""])
def test_a_last_line_cut_short_is_dropped(tmp_path: Path, torn: str) -> None:
    log(tmp_path, rows(1, 5))
    with (tmp_path / FILE).open("a") as file:
        file.write(torn)
    assert read(tmp_path / FILE) == rows(1, 5)
    log(tmp_path, rows(6, 6), after=5)
    assert read(tmp_path / FILE) == rows(1, 6)


def test_another_line_that_is_not_json_is_named(tmp_path: Path) -> None:
    lines = [json.dumps(row) for row in rows(1, 5)]
    lines[2] = lines[2][:7]
    text = "".join(line + "\n" for line in lines)
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ValueError, match=f"{tmp_path / FILE} has a row that is not JSON"):
        MetricsLog(tmp_path, after=5)
    assert (tmp_path / FILE).read_text() == text


def test_values_that_json_lacks_are_absent(tmp_path: Path) -> None:
    log(tmp_path, [{"step": 1, "loss": 1.0, "kl_approx": math.nan, "bound_gap": math.inf}])
    assert read(tmp_path / FILE) == [{"step": 1, "loss": 1.0}]


@pytest.mark.parametrize("size", [300, 1000, 3000])
def test_a_full_disk_is_one_error_and_a_resume_continues(
    tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]], size: int
) -> None:
    with pytest.raises(OSError, match=f"no space left to write {tmp_path}"), full_disk(size):
        log(tmp_path, rows(1, 1000))
    written = read(tmp_path / FILE)
    assert 0 < len(written) < 1000
    assert written == rows(1, len(written))
    log(tmp_path, rows(len(written) + 1, 100), after=len(written))
    assert read(tmp_path / FILE) == rows(1, 100)


def test_a_first_loss_that_is_not_finite_is_not_blamed_on_the_learning_rate() -> None:
    rates = {"": Schedule(9, lr=0.1)}
    with pytest.raises(FloatingPointError, match="first update is not finite; look for NaN"):
        check_limits({"step": 1, "loss": math.inf}, {}, rates)
    with pytest.raises(FloatingPointError, match="finite at update 2; lower the learning rate"):
        check_limits({"step": 2, "loss": math.inf}, {}, rates)
