"""``--stack-seeds``: runs of several seeds at once, against the same runs one after another."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from iwsft import load_policy, metrics

Job = Callable[..., Path]
Read = Callable[[Path], dict[str, Any]]
SEEDS = (0, 3)
SHORT: dict[str, Any] = {"steps": 6, "reference_steps": 6, "curve_episodes": 0}
# A copy of the reference, the paper's with weights, and a baseline that draws noise.
ALGORITHMS = ("bc", "iw-sft-q", "td3-bc")


@pytest.fixture(scope="module")
def folders(job: Job, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """All runs stacked, and one after another."""
    out = tmp_path_factory.mktemp("runs")
    stacked = job(out / "stacked", ALGORITHMS, seeds=SEEDS, stack_seeds=True, **SHORT)
    return stacked, job(out / "alone", ALGORITHMS, seeds=SEEDS, **SHORT)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_run_of_a_stack_leaves_what_a_run_alone_leaves(
    folders: tuple[Path, Path], algo: str, seed: int, read_json: Read
) -> None:
    stacked, alone = (folder / algo / f"seed-{seed}" for folder in folders)
    assert {path.name for path in stacked.iterdir()} == {path.name for path in alone.iterdir()}
    configs = [read_json(folder / "config.json") for folder in (stacked, alone)]
    assert configs[0]["settings"] == configs[1]["settings"]
    assert configs[0]["options"] == configs[1]["options"]
    results = [read_json(folder / "result.json") for folder in (stacked, alone)]
    assert results[0].keys() == results[1].keys()
    assert results[0]["seed"] == seed and results[0]["cpu_seconds"] > 0
    # Adam makes a whole step of a gradient that is rounding, so parameters are not compared here.
    rows = [metrics.read(folder / metrics.FILE) for folder in (stacked, alone)]
    assert [row.keys() for row in rows[0]] == [row.keys() for row in rows[1]]
    losses = [[row["loss"] for row in each] for each in rows]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3, abs=1e-4)
    assert load_policy(stacked).env_id == "Hopper-v4"


def test_seeds_that_are_missing_are_stacked_on_resume(
    job: Job, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    job(out, ["iw-sft-q"], seeds=(0,), **SHORT)
    finished = out / "d4rl" / "mine" / "iw-sft-q" / "seed-0" / "result.json"
    before = finished.read_bytes()
    folder = job(out, ["iw-sft-q"], seeds=(0, 3, 4), stack_seeds=True, resume=True, **SHORT)
    assert finished.read_bytes() == before
    ours, alone = (
        json.loads((each / "iw-sft-q" / "seed-3" / "result.json").read_text())
        for each in (folder, folders[1])
    )
    assert ours["episode_lengths"] == alone["episode_lengths"]
