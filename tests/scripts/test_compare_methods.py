"""The rate of a method is chosen by validation, and the script runs the job at it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.results import RecordedRun
from scripts import compare_methods
from scripts.compare_methods import Arguments, beyond, choose


def _run(rate: float, algo: str, seed: int, validation: float) -> RecordedRun:
    variant, result = f"lr-{rate}", {"validation": validation, "score": 1 - validation}
    return RecordedRun(Path(), variant, "arithmetic", f"{variant}/{algo}", seed, result, {}, [])


def test_the_rate_is_the_best_on_validation() -> None:
    runs = [
        *(_run(1e-3, "sft", seed, 0.5) for seed in (5, 6)),
        *(_run(2e-3, "sft", seed, 0.5) for seed in (5, 6)),
        *(_run(1e-3, "dft", seed, share) for seed, share in ((5, 0.2), (6, 0.6))),
        *(_run(2e-3, "dft", seed, share) for seed, share in ((5, 0.5), (6, 0.4))),
        # A run of another seed, and one of two that did not end.
        _run(2e-3, "sft", 0, 0.9),
        _run(4e-3, "dft", 5, 0.9),
    ]
    tried = dict.fromkeys(("sft", "dft"), (1e-3, 2e-3, 4e-3))
    assert choose(runs, tried, (5, 6)) == {"sft": 1e-3, "dft": 2e-3}


def test_the_rate_beyond_an_end_is_as_far_as_its_neighbour() -> None:
    rates = (1e-4, 3e-4, 8e-4)
    assert [beyond(rates, best) for best in rates] == [(3e-5,), (), (2e-3,)]


def test_each_method_is_reported_at_its_own_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The job of the test writes what benchmarks.llm does.

    SFT is best at 0.4, which is one rate beyond the grid, and DFT at the first.
    """
    commands: list[str] = []

    def job(command: list[str], **_: Any) -> Any:
        words = iter(command[3:])
        lists: dict[str, list[str]] = {}
        for word in words:
            if word.startswith("--"):
                lists[word] = name = []
            else:
                name.append(word)
        out, rate = Path(lists["--out"][0]), float(lists.get("--lr", ["0"])[0])
        commands.append(
            f"{out.name} {' '.join(lists['--algo'])} {' '.join(lists['--seeds'])} {rate}"
        )
        (out / "llm/arithmetic/prepared/arithmetic-base-1").mkdir(parents=True, exist_ok=True)
        for algo in lists["--algo"]:
            for seed in map(int, lists["--seeds"]):
                folder = out / "llm/arithmetic" / algo / f"seed-{seed}"
                folder.mkdir(parents=True)
                share = {"sft": rate if rate < 0.5 else 0, "dft": 1 - abs(rate - 0.1)}.get(
                    algo, 0.5
                )
                about = {"benchmark": "llm", "dataset": "arithmetic", "algo": algo, "seed": seed}
                result = {"score": 0.5, "score_name": "x", "interval": [0, 1], "n": 3, "steps": 3}
                more = {"validation": share, "cpu_seconds": len(commands) + seed / 10}
                (folder / "result.json").write_text(json.dumps(about | result | more))
        return type("Done", (), {"returncode": 0})

    monkeypatch.setattr(compare_methods.subprocess, "run", job)
    monkeypatch.setattr(compare_methods, "write_report", lambda *_: None)
    arguments = Arguments(tmp_path, ("sft", "dft"), (0.1, 0.2), 2, (5,), (0, 1))
    compare_methods.main(arguments)
    assert commands == [
        f"{tmp_path.name} base 0 0.0",
        "lr-0.1 sft dft 5 0.1",
        "lr-0.2 sft dft 5 0.2",
        "lr-0.05 dft 5 0.05",
        "lr-0.4 sft 5 0.4",
        "lr-0.8 sft 5 0.8",
        f"{tmp_path.name} dft 0 1 0.1",
        f"{tmp_path.name} sft 0 1 0.4",
    ]
    with pytest.raises(SystemExit, match="must differ"):
        compare_methods.main(Arguments(tmp_path, ("sft",), (0.1, 0.2), 0, (5,), (5,)))
