"""Progress on stderr: lines for files and pipes, bars for terminals."""

from __future__ import annotations

import io
import sys
import time

import pytest
import torch

from iwsft import GaussianPolicy, ImportanceWeightedMLE, evaluate
from iwsft.progress import Progress, describe
from iwsft.samplers import StepSampler
from iwsft.training import Schedule, fit
from iwsft.trajectory import from_steps


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_line_for_each_unfinished_task_at_every_interval(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("iwsft.progress.INTERVAL", 0.05)
    with Progress() as progress:
        progress.update(progress.add_task("ended", total=3), completed=3)
        progress.add_task("[odd] name", total=8, completed=2, note="loss 0.5")
        progress.add_task("endless", total=None, note="waiting")
        progress.add_task("silent", total=None)
        time.sleep(0.2)
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    assert captured.out == "" and len(lines) >= 2
    assert set(lines) == {"[odd] name: 2/8  loss 0.5", "endless: waiting", "silent"}


def test_items_are_counted_where_there_are_no_bars() -> None:
    with Progress() as progress:
        for number in progress.track(range(3), "items"):
            assert progress.tasks[0].completed == number
        assert progress.tasks[0].finished


def test_rate_and_time_left_follow_from_the_amounts() -> None:
    clock = [0.0]
    with Progress() as progress:
        progress.get_time = lambda: clock[0]
        task = progress.add_task("updates", total=1000)
        progress.update(task, completed=0)
        for clock[0], done in ((10.0, 50), (20.0, 100)):
            progress.update(task, completed=done)
        # 5 updates a second leave 900 / 5 = 180 seconds.
        assert describe(progress.tasks[0]) == "100/1000  5/s  3:00 left"


def test_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    # An environment that has no terminal must not decide.
    monkeypatch.setenv("TERM", "xterm")
    policy = GaussianPolicy(3, 1, hidden=(8,))
    steps = {"observation": torch.zeros(8, 3), "action": torch.zeros(8, 1)}
    data = from_steps(steps, torch.zeros(8, dtype=torch.long))
    loss = ImportanceWeightedMLE(policy, proposal="reference")
    fit(loss, StepSampler(data, 4, seed=0), Schedule(3, 0.1), progress=True)
    shown = terminal.getvalue()
    assert "updates" in shown and "3/3" in shown and "loss" in shown
    evaluate(policy, "Pendulum-v1", episodes=2, progress=True)
    assert "episodes" in terminal.getvalue() and "2/2" in terminal.getvalue()
