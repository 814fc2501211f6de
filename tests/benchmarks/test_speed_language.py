"""The language subject of the speed benchmark runs, agrees with full logits, writes its rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

from benchmarks.speed import language, language_updates
from benchmarks.speed.job import main
from benchmarks.speed.measure import DisagreementError
from benchmarks.speed.options import Options

SMALL = Options(subject="language", scale="small", repeats=1)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("speed") / "language.json"
    line = ["language", "--scale", "small", "--repeats", "1", "--json", str(path)]
    main(tyro.cli(Options, args=line))
    return json.loads(path.read_text())


def test_rows_of_memory_time_and_steps(report: dict[str, Any]) -> None:
    names = [row["name"] for row in report["rows"]]
    assert [name.split(",")[0] for name in names] == [
        "log-prob and gradient",
        "peak memory of log-prob and gradient",
        "peak memory of SFT",
        *2 * ["SFT"],
        "log-probs of a batch without gradient",
        *3 * ["iw-SFT update"],
        "SFT update with data weights",
        "DFT update",
        "EAFT update",
    ]
    assert len(set(names)) == 12
    for row in report["rows"]:
        assert row["ours"] > 0 and row["ratio"] == pytest.approx(row["peer"] / row["ours"])


def test_memory_holds_no_full_logits(report: dict[str, Any]) -> None:
    sizes = language.SIZES["small"]
    logits = 4 * sizes.tokens * sizes.vocabulary / 1e6
    row = report["rows"][1]
    assert row["unit"] == "MB" and row["peer"] > 2 * logits
    assert 0 < row["ours"] < 1.5 * logits


def test_agreement_is_reported(report: dict[str, Any]) -> None:
    gradients, losses = report["checks"]
    assert "gradient" in gradients["name"] and "against TRL's" in losses["name"]
    assert 0 < gradients["value"] <= gradients["limit"] == 1e-5
    assert 0 <= losses["value"] <= losses["limit"] == 1e-5


def test_another_computation_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def detached(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> Any:
        return (hidden * weight[target]).sum(-1), None

    monkeypatch.setattr(language, "token_log_prob_and_entropy", detached)
    with pytest.raises(DisagreementError, match="gradient of log-probs"):
        next(language.log_probs(SMALL, language.SIZES["small"]))


def test_another_training_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def untrained(ids: torch.Tensor, sizes: language_updates.Sizes, **how: Any) -> Any:
        return packed(ids, replace(sizes, trained=sizes.trained - 1), **how)

    packed = language_updates.packed
    monkeypatch.setattr(language_updates, "packed", untrained)
    with pytest.raises(DisagreementError, match="losses of 2 updates"):
        next(language_updates.measure(SMALL, language_updates.SIZES["small"]))


def test_a_dataset_is_refused() -> None:
    with pytest.raises(ValueError, match="random tokens; leave --dataset out"):
        next(language.measure(Options(subject="language", dataset=Path("x.hdf5"))))
