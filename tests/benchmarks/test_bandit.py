"""The bandit benchmark against the closed forms of the paper's Section 3.5."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro
from scipy.optimize import brentq
from tensordict import TensorDictBase

from benchmarks.bandit.experiment import (
    ARMS,
    BanditRun,
    draw_pulls,
    limits,
    main,
    summary,
    table,
    train,
    training_data,
)
from benchmarks.bandit.options import Options
from benchmarks.llm.options import ALGORITHMS
from benchmarks.options import parse
from iwsft.trajectory import REWARD, lengths, select


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Any, list[BanditRun]]]:
    out = tmp_path_factory.mktemp("bandit") / "deep" / "folder"
    return out, main(Options(seeds=2, pulls=600, out=out))


def test_data_are_the_successes_of_a_uniform_policy() -> None:
    pulls = draw_pulls(20_000, seed=3)
    data = training_data(ALGORITHMS["sft"], pulls)
    assert lengths(data).tolist() == [1] * len(data)
    assert bool((data[REWARD] == 1).all())
    # 3/4 of the pulls are rewarded, 2/3 of those are right; within 4 standard errors.
    assert len(data) / 20_000 == pytest.approx(3 / 4, abs=4 * math.sqrt(3 / 16 / 20_000))
    right = float(data["action"][:, 1].double().mean())
    assert right == pytest.approx(2 / 3, abs=4 * math.sqrt(2 / 9 / len(data)))
    assert torch.equal(data["action"].sum(-1), torch.ones(len(data), dtype=torch.int64))
    assert torch.equal(pulls["action"], draw_pulls(20_000, seed=3)["action"])
    few = draw_pulls(20_000, seed=3, right=0.2)["action"][:, 1].double().mean()
    assert float(few) == pytest.approx(0.2, abs=4 * math.sqrt(0.16 / 20_000))


def test_a_file_for_a_folder_is_refused_before_the_training(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    # Training would refuse a seed without a success, see below.
    with pytest.raises(NotADirectoryError):
        main(Options(seeds=50, pulls=1, out=tmp_path / "file" / "bandit"))


def test_a_figure_of_other_settings_is_not_overwritten(tmp_path: Path) -> None:
    options = Options(seeds=1, pulls=20, steps=2, out=tmp_path)
    main(options)
    first = (tmp_path / "bandit.json").read_text()
    with pytest.raises(FileExistsError, match=r"other settings: steps=2 \(now 3\); .*--out"):
        main(replace(options, steps=3))
    assert (tmp_path / "bandit.json").read_text() == first
    # The same settings have the same numbers, also where the folder has moved.
    moved = tmp_path.rename(tmp_path.with_name("moved"))
    main(replace(options, out=moved))
    again = json.loads((moved / "bandit.json").read_text())
    assert again["algorithms"] == json.loads(first)["algorithms"]
    (moved / "bandit.json").write_text(first[:-10])
    with pytest.raises(ValueError, match=r"bandit\.json is not JSON .*: mend it"):
        main(replace(options, out=moved))


def test_data_without_a_success_are_refused() -> None:
    with pytest.raises(ValueError, match="none of the 1 pulls .*--pulls"):
        for seed in range(50):
            draw_pulls(1, seed)


def test_sft_copies_the_successes(finished: tuple[Path, dict[Any, list[BanditRun]]]) -> None:
    for run in finished[1]["sft"]:
        assert run.right[0] == 0.5 and run.reward[0] == 0.75
        assert run.right[-1] == pytest.approx(run.successes, abs=1e-5)
        n = 450
        assert run.right[-1] == pytest.approx(2 / 3, abs=4 * math.sqrt(2 / 9 / n))
        assert run.reward[-1] == pytest.approx(5 / 6, abs=2 * math.sqrt(2 / 9 / n))


def test_iw_sft_finds_the_better_arm(finished: tuple[Path, dict[Any, list[BanditRun]]]) -> None:
    for run in finished[1]["iw-sft"]:
        assert run.right[0] == 0.5
        assert run.right[-1] > 0.99 and run.reward[-1] > 0.99
        assert bool((np.diff(run.right) > 0).all())


@pytest.mark.parametrize("algorithm", ["sft", "iw-sft"])
def test_every_update_is_the_gradient_step_by_hand(algorithm: Any) -> None:
    run = train(algorithm, draw_pulls(300, seed=1), steps=30, lr=0.7)
    share = np.array([1 - run.successes, run.successes])
    logits = np.zeros(2)
    for right in run.right:
        p = np.exp(logits) / np.exp(logits).sum()
        assert right == pytest.approx(p[1], rel=1e-4)
        weight = p / 0.5 if algorithm == "iw-sft" else np.ones(2)
        # d/dz of sum_a share_a w_a log p_a, w held constant.
        logits += 0.7 * (share * weight - (share @ weight) * p)


def test_figure_and_numbers_are_written(finished: tuple[Path, dict[Any, list[BanditRun]]]) -> None:
    out, runs = finished
    assert sorted(path.name for path in out.iterdir()) == ["bandit.json", "bandit.png"]
    assert (out / "bandit.png").read_bytes().startswith(b"\x89PNG")
    content = json.loads((out / "bandit.json").read_text())
    assert content["settings"]["seeds"] == 2
    for algorithm, done in runs.items():
        rows = content["algorithms"][algorithm]
        assert rows["limit"] == limits(0.5)[algorithm]
        assert rows["mean_reward"] == [float(run.reward[-1]) for run in done]
        assert rows["p_right"] == [float(run.right[-1]) for run in done]
        curve = rows["curve"]
        np.testing.assert_allclose(curve["mean"], np.mean([run.reward for run in done], axis=0))
        assert all(
            low - 1e-12 <= mean <= high + 1e-12
            for low, mean, high in zip(curve["low"], curve["mean"], curve["high"], strict=True)
        )


@pytest.mark.parametrize(("seeds", "shown"), [(1, "-"), (2, "-"), (3, "0.5016 to 0.9984")])
def test_few_seeds_have_no_interval(seeds: int, shown: str) -> None:
    """Of one seed it would have no width. By hand: 0.75 +- 4.3027 * 0.1 / sqrt(3)."""
    ends = np.array([0.3, 0.7, 0.5])[:seeds]
    runs = [BanditRun(np.array([0.5, right]), 0.6, 1.0) for right in ends]
    (row,) = table(summary({"sft": runs}, 0.5)).rows
    assert row[4] == shown


def test_limits_follow_from_the_arms() -> None:
    # P(right | reward 1) under a uniform policy, and what that policy earns.
    right = ARMS[1] / sum(ARMS)
    assert limits(0.5)["sft"] == pytest.approx((1 - right) * ARMS[0] + right * ARMS[1])
    assert limits(0.5)["iw-sft"] == max(ARMS)


def test_command_line() -> None:
    parsed = tyro.cli(Options, args=["--seeds", "7", "--out", "elsewhere"])
    assert parsed == Options(seeds=7, out=Path("elsewhere"))
    for name in ("seeds", "pulls", "steps", "lr"):
        with pytest.raises(SystemExit, match=rf"error: --{name} 0(\.0)?: "):
            parse(Options, "bandit", None, [f"--{name}", "0"])
    for words, problem in (
        ("--algo sft sft", "asked for twice"),
        ("--algo eaft", "unknown algorithm 'eaft'"),
        ("--right 1", "--right 1.0: above 0 and below 1"),
    ):
        with pytest.raises(SystemExit, match=problem):
            parse(Options, "bandit", None, words.split())


def _pulls(right: float) -> TensorDictBase:
    """Sixteen pulls in the proportions of infinitely many."""
    wins, losses = 16 * right * ARMS[1], 16 * (1 - right) * ARMS[0]
    data = draw_pulls(200, seed=0, right=right)
    arm, reward = data["action"][:, 1], data[REWARD].squeeze(-1)
    kinds = ((1, 1.0, wins), (0, 1.0, losses), (0, 0.0, losses))
    rows = [((arm == a) & (reward == r)).nonzero()[: round(n), 0] for a, r, n in kinds]
    return select(data, torch.cat(rows).sort().values)


# Share of left and right among the draws, times their weights and signs, from P(left), P(right).
# The chances of pi_ref are 1/2, the mean reward is 3/4.
AT_HALF = {
    "iw-sft-step": lambda p: np.array([1, 2]) * np.clip(2 * p, 0.2, 1.8),
    "chord-phi": lambda p: np.array([1, 2]) * p * (1 - p),
    "psft": lambda p: np.array([1, 2]),
    "asft": lambda p: np.array([1, 2]) * (p + 0.1 * (0.5 / p - 1)),
    "minor-sft": lambda p: np.array([1, 2]) / (1 + (2 * p) ** 0.1),
    "topr": lambda p: np.array([1, 2]) - [min(2 * p[0], 1), 0],
    "nft": lambda p: np.array([1, 2]) - [1.5 * p[0] / max(1 - 1.5 * p[0], 0.25), 0],
}


@pytest.mark.parametrize("algorithm", AT_HALF)
def test_training_ends_where_the_gradient_vanishes(algorithm: str) -> None:
    def gradient(right: float) -> float:
        p = np.array([1 - right, right])
        left, on_right = AT_HALF[algorithm](p)
        return float(on_right * p[0] - left * p[1])

    expected = brentq(gradient, 0.01, 0.99)
    # Between syncs the loss of PSFT is flat at its end, and large steps swing around it.
    run = train(algorithm, _pulls(0.5), steps=150, lr=0.4 if algorithm == "psft" else 3.0)
    assert run.right[-1] == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("algorithm", ["iw-sft", "iw-sft-hard", "iw-sft-ema", "dft", "asymre"])
def test_which_methods_find_the_better_arm_that_pi_ref_neglects(algorithm: str) -> None:
    """P(right) = 1/4: the left arm has more successes, 3 to 2."""
    run = train(algorithm, _pulls(0.25), steps=100, lr=3.0, right=0.25)
    # DFT prefers what is likely, iw-SFT and AsymRE what succeeds.
    assert run.right[-1] < 0.01 if algorithm == "dft" else run.right[-1] > 0.9
