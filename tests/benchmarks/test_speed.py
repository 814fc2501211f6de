"""Each subject of the speed benchmark runs, agrees with its peers, writes its rows; never timed."""

from __future__ import annotations

import json
import sys
from functools import cache
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
import tyro
from tensordict import TensorDict

from benchmarks.speed import baselines, control, language, language_updates
from benchmarks.speed.job import main
from benchmarks.speed.measure import Check, Comparison, compare
from benchmarks.speed.options import Options
from iwsft.policies import GaussianPolicy
from iwsft.trajectory import OBSERVATION, lengths
from tests.oracles.critics import PLAIN
from tests.oracles.iql import PlainIQL
from tests.oracles.networks import PlainGaussian

# First words of the rows of each subject.
ROWS = {
    "control": [
        "peak memory of a step",
        "dataset of hopper-replay's",
        *2 * ["iw-SFT(Q) step"],
        "iw-SFT(Q) update",
        "4,500 iw-SFT(Q) updates",
        *2 * ["SFT step"],
        *3 * ["behaviour cloning step"],
        *2 * ["evaluate"],
    ],
    "baselines": [f"{name} update" for name in PLAIN] + 2 * ["behaviour cloning step"],
    "language": [
        "log-prob and gradient",
        "peak memory of log-prob",
        "peak memory of SFT",
        *2 * ["SFT"],
        "log-probs of a batch without gradient",
        *3 * ["iw-SFT update"],
        "SFT update with data weights",
        "DFT update",
        "EAFT update",
    ],
}


def small(subject: Any, **settings: Any) -> Options:
    return Options(subject=subject, scale="small", repeats=1, **settings)


@cache
def report(subject: str, folder: Path) -> dict[str, Any]:
    path = folder / "new" / f"{subject}.json"
    line = [subject, "--scale", "small", "--repeats", "1", "--json", str(path)]
    main(tyro.cli(Options, args=line))
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("speed")


@pytest.mark.parametrize("subject", ROWS)
def test_rows_have_the_schema_and_checks_their_limits(subject: str, folder: Path) -> None:
    out = report(subject, folder / subject)
    assert out["subject"] == subject and out["seed"] == 0
    assert out["settings"]["scale"] == "small" and out["settings"]["threads"] == 1
    assert out["versions"]["torch"] == version("torch") and out["hardware"]["device"] == "cpu"
    names = [row["name"] for row in out["rows"]]
    assert len(set(names)) == len(names)
    assert all(a.startswith(b) for a, b in zip(names, ROWS[subject], strict=True))
    for row in out["rows"]:
        assert set(row) == {"name", "ours", "peer", "ratio", "unit", "peer_name"}
        assert row["ours"] > 0 and row["peer"] > 0
        assert row["ratio"] == pytest.approx(row["peer"] / row["ours"], rel=1e-12)
    assert len(out["checks"]) == {"control": 1, "baselines": 5, "language": 2}[subject]
    limit = 1e-6 if subject == "baselines" else 1e-5
    assert all(0 <= check["value"] <= check["limit"] == limit for check in out["checks"])


def test_a_padded_copy_is_larger_by_the_padding(folder: Path) -> None:
    (row,) = [
        r for r in report("control", folder / "control")["rows"] if "padded copy" in r.values()
    ]
    sizes = lengths(control.hopper_replay(1))
    waste = len(sizes) * int(sizes.max()) / int(sizes.sum())
    # The padded copy holds a mask of one byte a step on top.
    assert waste < row["ratio"] < 1.02 * waste


def test_memory_holds_no_full_logits(folder: Path) -> None:
    shape = language.shape_of(small("language"))
    logits = 4 * shape["tokens"] * shape["vocabulary"] / 1e6
    row = report("language", folder / "language")["rows"][1]
    assert row["unit"] == "MB" and row["peer"] > 2 * logits
    assert 0 < row["ours"] < logits


def test_another_naive_way_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*data: Any, k: float, **settings: Any) -> Any:
        return naive(*data, k=2 * k, **settings)

    naive = control.NaiveIwSft
    monkeypatch.setattr(control, "NaiveIwSft", other)
    with pytest.raises(ValueError, match="gradient of 64 trajectories .* can't be compared"):
        next(control.whole_trajectories(small("control"), 64))


def test_another_update_is_not_timed() -> None:
    class Other(PlainIQL):
        def update(self, batch: Any) -> None:
            super().update(batch.clone().set(("next", "reward"), 2 * batch["next", "reward"]))

    with pytest.raises(ValueError, match="iql: float64 parameters after 4 updates"):
        next(baselines.updates("iql", Other, small("baselines")))


def test_other_log_probs_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def detached(hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor) -> Any:
        return (hidden * weight[target]).sum(-1), None

    monkeypatch.setattr(language, "token_log_prob_and_entropy", detached)
    with pytest.raises(ValueError, match="gradient of log-probs"):
        next(language.log_probs(small("language")))


def test_another_training_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def untrained(ids: torch.Tensor, sizes: Any, **how: Any) -> TensorDict:
        out = packed(ids, sizes, **how)
        return out.set(("tokens", "full"), out["tokens", "full"].flip(0))

    packed = language_updates.packed
    monkeypatch.setattr(language_updates, "packed", untrained)
    with pytest.raises(ValueError, match="losses of 2 updates"):
        next(language_updates.measure(small("language")))


def test_nan_does_not_agree() -> None:
    with pytest.raises(ValueError, match="can't be compared"):
        Check("gradient", float("nan"), 1e-5)


def test_plain_policy_is_the_library_policy() -> None:
    policy, peer = GaussianPolicy(17, 6), PlainGaussian.of_sizes(17, 6)
    peer.copy_(policy.parameters())
    batch = control.cheetah_like(small("control"), 2, 4)
    expected = policy.log_prob(batch.copy())
    torch.testing.assert_close(peer.log_prob(batch["observation"], batch["action"]), expected)


def test_repeats_alternate_and_medians_count_in_the_unit() -> None:
    calls: list[str] = []
    times = {"ours": [9.0, 0.001, 0.5, 0.002], "peer": [9.0, 0.008, 0.016, 9.0]}

    def way(name: str) -> float:
        calls.append(name)
        return times[name][calls.count(name) - 1]

    ways = [lambda: way("ours"), lambda: way("peer")]
    row = compare("a", *ways, "b", "ms per update", 3, per=4)  # type: ignore[misc, arg-type]
    assert calls == ["ours", "peer"] * 4
    assert row == Comparison("a", 0.5, 4.0, "CPU ms per update", "b") and row.ratio == 8
    calls.clear()
    row = compare("a", *ways, "b", "us per step", 1, calls=2, ours_per=3)  # type: ignore[misc, arg-type]
    assert (row.ours, row.peer) == pytest.approx((501_000 / 3, 12_000))


def test_cut_evenly_keeps_steps_and_trajectories() -> None:
    ragged = control.hopper_replay(2)
    even = control.cut_evenly(ragged)
    sizes = lengths(even)
    assert len(sizes) == len(lengths(ragged)) and int(sizes.max() - sizes.min()) <= 1
    assert torch.equal(even[OBSERVATION], ragged[OBSERVATION])


def test_synthetic_transitions_follow_each_other() -> None:
    synthetic = baselines.transitions(small("baselines"))
    following, last = synthetic["next", "observation"], synthetic["next", "done"].squeeze(-1)
    inside = (~last).nonzero().squeeze(-1)
    assert torch.equal(following[inside], synthetic["observation"][inside + 1])
    assert int(last.sum()) == len(lengths(synthetic))
    assert not bool(synthetic["next", "terminated"].any())


def test_bad_settings_end_before_measuring(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--repeats 0: at least 1"):
        Options(subject="control", repeats=0)
    with pytest.raises(ValueError, match="--scale large is for scaling"):
        Options(subject="control", scale="large")
    with pytest.raises(IsADirectoryError, match="is a folder"):
        main(Options(subject="control", json=tmp_path))


@pytest.mark.parametrize("subject", ["control", "baselines", "scaling"])
def test_without_the_folder_tests_the_error_asks_for_a_checkout(
    monkeypatch: pytest.MonkeyPatch, subject: str
) -> None:
    monkeypatch.delitem(sys.modules, f"benchmarks.speed.{subject}", raising=False)
    for name in ("tests", *(name for name in sys.modules if name.startswith("tests."))):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match="folder tests: run this from the root of a checkout"):
        main(Options(subject=subject))


def test_language_needs_no_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("language", "language_updates"):
        monkeypatch.delitem(sys.modules, f"benchmarks.speed.{name}", raising=False)
    for name in ("tests", *(name for name in sys.modules if name.startswith("tests."))):
        monkeypatch.setitem(sys.modules, name, None)
    import_module("benchmarks.speed.language")
    import_module("benchmarks.speed.language_updates")
