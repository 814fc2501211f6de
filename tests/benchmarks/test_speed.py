"""The speed benchmark runs, agrees with its naive peer and writes its rows; never timed here."""

from __future__ import annotations

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from torch import Tensor

from benchmarks.speed import control as data
from benchmarks.speed.control import SameDraws
from benchmarks.speed.job import main
from benchmarks.speed.measure import Check, Comparison, DisagreementError, Times, paired
from benchmarks.speed.options import Options
from iwsft.policies import GaussianPolicy
from iwsft.trajectory import MULTIPLICITY, OBSERVATION, lengths
from tests.oracles.networks import PlainGaussian


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("speed") / "new" / "control.json"
    line = ["control", "--scale", "small", "--repeats", "1", "--json", str(path)]
    main(tyro.cli(Options, args=line))
    assert [p.name for p in path.parent.iterdir()] == ["control.json"]
    return json.loads(path.read_text())


def test_rows_have_the_schema_and_ratio_is_peer_over_ours(report: dict[str, Any]) -> None:
    assert len(report["rows"]) == 12
    for row in report["rows"]:
        assert set(row) == {"name", "ours", "peer", "ratio", "unit", "peer_name"}
        assert row["ours"] > 0 and row["peer"] > 0
        assert row["ratio"] == pytest.approx(row["peer"] / row["ours"], rel=1e-12)
    names = [row["name"] for row in report["rows"]]
    assert len(set(names)) == len(names)


def test_file_says_what_was_measured_on_what(report: dict[str, Any]) -> None:
    assert report["subject"] == "control" and report["seed"] == 0
    assert report["settings"]["scale"] == "small" and report["settings"]["threads"] == 1
    assert report["versions"]["torch"] == version("torch")
    assert report["hardware"]["device"] == "cpu"


def test_gradient_agreement_is_reported(report: dict[str, Any]) -> None:
    (check,) = report["checks"]
    assert 0 < check["value"] <= check["limit"] == 1e-5


def test_a_padded_copy_is_larger_by_the_padding(report: dict[str, Any]) -> None:
    (row,) = [r for r in report["rows"] if r["peer_name"] == "padded copy"]
    sizes = lengths(data.hopper_replay(1))
    waste = len(sizes) * int(sizes.max()) / int(sizes.sum())
    # The padded copy holds a mask of one byte a step on top.
    assert waste < row["ratio"] < 1.02 * waste


def test_naive_way_samples_the_same_trajectories() -> None:
    both = SameDraws(None, trajectories=40, steps=5, draws=32, seed=1)
    both.ours.step()
    batch, draws = both.ours.batch, both.draws()
    assert batch is not None and len(draws) == 32
    ours = batch[OBSERVATION].double() * batch[MULTIPLICITY][:, None]
    naive = both.naive.observation[draws].double()
    torch.testing.assert_close(ours.sum(0), naive.sum((0, 1)))


def test_gradients_differ_where_the_naive_q_is_another() -> None:
    both = SameDraws(None, trajectories=40, steps=5, draws=32, seed=1)
    both.ours.step()
    both.naive.q.copy_(2 * p for p in both.naive.policy.parameters())
    both.naive.step(both.draws())
    assert both.disagreement() > 1e-3
    with pytest.raises(DisagreementError, match="can't be compared"):
        Check("gradient", both.disagreement(), 1e-5)


def test_nan_does_not_agree() -> None:
    with pytest.raises(DisagreementError):
        Check("gradient", float("nan"), 1e-5)


def test_plain_policy_is_the_library_policy(seed: int = 3) -> None:
    torch.manual_seed(seed)
    policy, peer = GaussianPolicy(17, 6), PlainGaussian.of_sizes(17, 6)
    peer.copy_(policy.parameters())
    batch = data.cheetah_like(None, 2, 4, seed)
    expected: Tensor = policy.log_prob(batch.copy())
    torch.testing.assert_close(peer.log_prob(batch["observation"], batch["action"]), expected)


def test_repeats_alternate_and_each_pair_is_prepared() -> None:
    calls: list[str] = []
    times = paired(
        lambda: calls.append("ours"),
        lambda: calls.append("peer"),
        2,
        before=lambda: calls.append("before"),
    )
    assert calls == ["before", "ours", "peer"] * 2
    assert len(times.ours) == len(times.peer) == 2


def test_row_takes_medians_in_its_unit() -> None:
    row = Times([0.001, 0.5, 0.002], [0.008, 0.016, 9.0]).row("a", "b", "ms", "per update", per=4)
    assert row == Comparison("a", 0.5, 4.0, "CPU ms per update", "b")
    assert row.ratio == 8
    other = Times([0.002], [0.008]).row("a", "b", "us", "per step", per=4, ours_per=2)
    assert (other.ours, other.peer) == pytest.approx((1000, 2000))


def test_cut_evenly_keeps_steps_and_trajectories() -> None:
    ragged = data.hopper_replay(2)
    even = data.cut_evenly(ragged)
    sizes = lengths(even)
    assert len(sizes) == len(lengths(ragged)) and int(sizes.max() - sizes.min()) <= 1
    assert torch.equal(even[OBSERVATION], ragged[OBSERVATION])


def test_bad_settings_end_before_measuring(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--repeats 0: at least 1"):
        Options(subject="control", repeats=0)
    with pytest.raises(SystemExit, match="is a folder"):
        main(Options(subject="control", json=tmp_path))
    with pytest.raises(SystemExit, match="nowhere.hdf5"):
        main(Options(subject="control", dataset=tmp_path / "nowhere.hdf5", scale="small"))


def test_without_the_oracles_the_error_asks_for_a_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("benchmarks.speed.control")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "tests.oracles.networks", None)
    with pytest.raises(SystemExit, match="tests/oracles: run this from the root of a checkout"):
        main(Options(subject="control"))
