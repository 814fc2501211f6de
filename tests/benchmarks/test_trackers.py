"""Rows of runs as the trackers' own readers find them."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.d4rl.__main__ import main
from benchmarks.d4rl.options import Options
from benchmarks.runs import CONFIG, Run
from benchmarks.trackers import BOARD, tracked
from iwsft import metrics

RUN = Path("d4rl") / "mine"


def board(folder: Path, name: str) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder / BOARD)).Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def a_run(out: Path) -> Run[Options]:
    run = Run("mine", "sft", 0, Options(out=out))
    object.__setattr__(run, "benchmark", "d4rl")
    run.folder.mkdir(parents=True)
    (run.folder / CONFIG).write_text(json.dumps({"algo": "sft", "settings": {"lr": 0.1}}))
    return run


def test_a_board_shows_what_the_metrics_have(tiny_dataset: Path, tmp_path: Path) -> None:
    """Also of a run that is the training of its reference policy."""
    common = {
        "reference_steps": 20,
        "steps": 20,
        "jobs": 1,
        "eval_episodes": 1,
        "curve_episodes": 0,
    }
    data, algos = (str(tiny_dataset),), ("bc", "sft")
    main(Options(algo=algos, dataset=data, out=tmp_path, report_to=("tensorboard",), **common))
    for algo in algos:
        folder = tmp_path / RUN / algo / "seed-0"
        rows = metrics.read(folder / metrics.FILE)
        assert len(rows) == 20
        expected = [(row["step"], pytest.approx(row["loss"])) for row in rows]
        assert board(folder, "loss") == expected


def test_a_resumed_run_has_no_row_twice(tmp_path: Path) -> None:
    run = a_run(tmp_path)
    for steps, sign in ((range(1, 9), 1), (range(6, 10), -1)):
        with tracked(run, ["tensorboard"]) as write:
            for step in steps:
                write(step, {"loss": sign * step})
    signed = [*range(1, 6), *(-step for step in range(6, 10))]
    assert board(run.folder, "loss") == [(abs(step), step) for step in signed]


def test_weights_and_biases_without_a_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is written offline are the package's own messages, in the format of LevelDB's logs."""
    wandb = pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2 as messages

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = a_run(tmp_path)
    with tracked(run, ["wandb"]) as write:
        for step in (1, 5):
            write(step, {"loss": 0.5 * step})
    # It reads its environment once.
    wandb.teardown()
    (path,) = run.folder.glob("wandb/offline-run-*/*.wandb")
    # A header, then records of check sum, length, type and message; so few fill one block.
    content, position, losses = path.read_bytes(), 7, {}
    while position < len(content):
        length, kind = struct.unpack_from("<HB", content, position + 4)
        assert kind == 1
        record = messages.Record.FromString(content[position + 7 : position + 7 + length])
        row = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
        if "loss" in row:
            losses[int(row["_step"])] = float(row["loss"])
        position += 7 + length
    assert losses == {1: 0.5, 5: 2.5}


def test_a_tracker_that_does_not_start_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without an account or a network."""
    pytest.importorskip("wandb")
    for name, value in {"WANDB_MODE": "online", "HOME": str(tmp_path), "NETRC": "none"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:9")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with (
        pytest.raises(ConnectionError, match="--report-to wandb: .*WANDB_MODE=offline"),
        tracked(a_run(tmp_path / "runs"), ["wandb"]),
    ):
        pass
