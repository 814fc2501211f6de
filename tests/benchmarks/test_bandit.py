"""The bandit benchmark against the closed forms of the paper's Section 3.5."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import tyro

from benchmarks.bandit.experiment import (
    ARMS,
    LIMITS,
    BanditRun,
    main,
    successes,
    train,
    uniform_policy,
)
from benchmarks.bandit.options import Options
from benchmarks.options import parse
from iwsft import annotate_reference
from iwsft.trajectory import REWARD, lengths


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[Any, list[BanditRun]]]:
    out = tmp_path_factory.mktemp("bandit") / "deep" / "folder"
    return out, main(Options(seeds=2, pulls=600, out=out))


def test_data_are_the_successes_of_a_uniform_policy() -> None:
    data = successes(20_000, seed=3)
    assert lengths(data).tolist() == [1] * len(data)
    assert bool((data[REWARD] == 1).all())
    # 3/4 of the pulls are rewarded, 2/3 of those are right; within 4 standard errors.
    assert len(data) / 20_000 == pytest.approx(3 / 4, abs=4 * math.sqrt(3 / 16 / 20_000))
    right = float(data["action"][:, 1].double().mean())
    assert right == pytest.approx(2 / 3, abs=4 * math.sqrt(2 / 9 / len(data)))
    assert torch.equal(data["action"].sum(-1), torch.ones(len(data), dtype=torch.int64))
    again = successes(20_000, seed=3)
    assert torch.equal(data["action"], again["action"])


def test_data_without_a_success_are_refused() -> None:
    with pytest.raises(ValueError, match="none of the 1 pulls .*--pulls"):
        for seed in range(50):
            successes(1, seed)


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
    data = annotate_reference(uniform_policy(), successes(300, seed=1))
    run = train(algorithm, data, steps=30, lr=0.7)
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
        assert rows["limit"] == LIMITS[algorithm]
        assert rows["mean_reward"] == [float(run.reward[-1]) for run in done]
        assert rows["p_right"] == [float(run.right[-1]) for run in done]
        curve = rows["curve"]
        np.testing.assert_allclose(curve["mean"], np.mean([run.reward for run in done], axis=0))
        assert all(
            low - 1e-12 <= mean <= high + 1e-12
            for low, mean, high in zip(curve["low"], curve["mean"], curve["high"], strict=True)
        )


def test_limits_follow_from_the_arms() -> None:
    # P(right | reward 1) under a uniform policy, and what that policy earns.
    right = ARMS[1] / sum(ARMS)
    assert LIMITS["sft"] == pytest.approx((1 - right) * ARMS[0] + right * ARMS[1])
    assert LIMITS["iw-sft"] == max(ARMS)


def test_command_line() -> None:
    parsed = tyro.cli(Options, args=["--seeds", "7", "--out", "elsewhere"])
    assert parsed == Options(seeds=7, out=Path("elsewhere"))
    for name in ("seeds", "pulls", "steps", "lr"):
        with pytest.raises(SystemExit, match=rf"error: --{name} 0(\.0)?: "):
            parse(Options, "bandit", None, [f"--{name}", "0"])
