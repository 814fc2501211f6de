"""The baselines' speed subject runs, agrees with its plain peers and writes its rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro

from benchmarks.speed import baselines
from benchmarks.speed.job import main
from benchmarks.speed.measure import DisagreementError
from benchmarks.speed.options import Options
from tests.oracles.critics import PLAIN
from tests.oracles.iql import PlainIQL

SMALL = Options(subject="baselines", scale="small", repeats=1)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("speed") / "baselines.json"
    line = ["baselines", "--scale", "small", "--repeats", "1", "--json", str(path)]
    main(tyro.cli(Options, args=line))
    return json.loads(path.read_text())


def test_a_row_an_algorithm_and_cloning(report: dict[str, Any]) -> None:
    names = [row["name"] for row in report["rows"]]
    assert [name.split()[0] for name in names] == ["iql", "awac", "td3-bc", "rebrac", "cql"] + [
        "behaviour"
    ] * 2
    for row in report["rows"]:
        assert row["ours"] > 0 and row["ratio"] == pytest.approx(row["peer"] / row["ours"])


def test_agreement_is_checked_for_each(report: dict[str, Any]) -> None:
    assert len(report["checks"]) == len(PLAIN) == 5
    for check in report["checks"]:
        assert 0 <= check["value"] <= check["limit"] == 1e-6


def test_another_computation_is_not_timed() -> None:
    class Other(PlainIQL):
        def update(self, batch: Any) -> None:
            super().update(batch.clone().set(("next", "reward"), 2 * batch["next", "reward"]))

    sizes = baselines.SIZES["small"]
    rows = baselines.updates("iql", Other, baselines.transitions(SMALL, sizes), sizes, SMALL)
    with pytest.raises(DisagreementError, match="iql: float64 parameters after 4 updates"):
        next(rows)


def test_synthetic_transitions_follow_each_other() -> None:
    synthetic = baselines.transitions(SMALL, baselines.SIZES["small"])
    following, last = synthetic["next", "observation"], synthetic["next", "done"].squeeze(-1)
    inside = (~last).nonzero().squeeze(-1)
    assert torch.equal(following[inside], synthetic["observation"][inside + 1])
    assert int(last.sum()) == baselines.SIZES["small"].trajectories
    assert not bool(synthetic["next", "terminated"].any())


def test_a_file_is_read(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="nowhere.hdf5"):
        next(
            baselines.measure(
                Options(subject="baselines", dataset=tmp_path / "nowhere.hdf5", scale="small")
            )
        )
