from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts.compare_losses import Options, main


def write(folder: Path, algo: str, losses: list[float], score: float = 0.5) -> None:
    """A finished run's files, as far as they are read."""
    run = folder / algo / "seed-0"
    run.mkdir(parents=True)
    result = {"benchmark": "llm", "dataset": "sums", "algo": algo, "seed": 0, "cpu_seconds": 1.0}
    result |= {"score": score, "score_name": "exact match", "interval": [0, 1], "n": 9}
    (run / "result.json").write_text(json.dumps({**result, "steps": len(losses)}))
    config = {"versions": {}, "hardware": {}, "command": "python -m benchmarks.llm"}
    (run / "config.json").write_text(json.dumps(config))
    if losses:
        rows = [{"step": n, "loss": loss} for n, loss in enumerate(losses, 1)]
        rows.insert(1, {"step": 1, "eval_loss": 9.0})
        (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_largest_relative_difference_of_runs_in_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    for folder, losses, score in ((one, [2.0, 4.0, 1.0], 0.25), (other, [2.0, 4.1, 3.0], 0.75)):
        write(folder, "sft", losses, score)
        write(folder, "base", [])
    write(one, "iw-sft", [1.0])
    main(Options(one, other, first=2))
    assert capsys.readouterr().out == "sums sft seed 0: losses 2.5e-02 apart, scores 0.250 0.750\n"
    main(Options(one, other))
    assert "2.0e+00 apart" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("losses", "other", "message"),
    [
        ([1.0, 2.0], [1.0], "sft seed 0 logged 2 and 1 losses"),
        ([1.0], [], "share no trained run"),
    ],
)
def test_runs_that_cannot_be_compared(
    tmp_path: Path, losses: list[float], other: list[float], message: str
) -> None:
    write(tmp_path / "one", "sft", losses)
    write(tmp_path / "other", "sft" if other else "base", other)
    with pytest.raises(SystemExit, match=message):
        main(Options(tmp_path / "one", tmp_path / "other"))


def test_damaged_run_is_named(tmp_path: Path) -> None:
    for name in ("one", "other"):
        write(tmp_path / name, "sft", [1.0])
    (tmp_path / "other" / "sft" / "seed-0" / "result.json").write_text("{")
    with pytest.raises(SystemExit, match=r"error: .*seed-0/result.json is not JSON"):
        main(Options(tmp_path / "one", tmp_path / "other"))


def test_at_least_one_update(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--first 0: at least 1"):
        main(Options(tmp_path, tmp_path, first=0))
