"""Wrong settings, bad data and a full disk give one clear line and leave earlier results alone."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from filelock import FileLock

from benchmarks.d4rl.options import Options
from benchmarks.d4rl.run import Run, Task, config_of
from benchmarks.d4rl.settings import _TABLE_4, FineTuning
from iwsft import metrics
from iwsft.datasets import catalog

Job = Callable[..., Path]
Edit = Callable[..., Path]
FullDisk = Callable[[int], AbstractContextManager[None]]


@pytest.fixture
def fails(job: Job) -> Callable[..., str]:
    """``fails(out, algo, ...)``: run the job; the one line that it must end in."""

    def run(out: Path, algo: Sequence[str] = ("iw-sft-q",), **settings: Any) -> str:
        with pytest.raises(SystemExit) as ended:
            job(out, algo, **settings)
        # Python prints a text and exits with status 1.
        message = ended.value.code
        assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
        return message

    return run


@pytest.fixture
def edited(tiny_dataset: Path, tmp_path: Path) -> Edit:
    """``edited(name, rows, **fields)``: rows of the small dataset, some fields changed."""

    def edit(name: str = "bad", rows: int | None = None, **fields: Any) -> Path:
        path = tmp_path / f"{name}.hdf5"
        with h5py.File(tiny_dataset) as source, h5py.File(path, "w") as file:
            for key, values in source.items():
                file[key] = values[:rows]
            file.attrs["env_id"] = "Hopper-v4"
            for key, change in fields.items():
                if key == "env_id":
                    file.attrs["env_id"] = change
                else:
                    file[key][...] = change(file[key][...])
        return path

    return edit


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"algo": ["iw-sftq"]}, "unknown algorithm 'iw-sftq'; did you mean 'iw-sft-q'? it is one"),
        ({"algo": ["PPO"]}, "unknown algorithm 'PPO'; it is one of bc, bc-10, sft"),
        ({"algo": []}, "pass at least one value to --algo"),
        ({"algo": ["bc", "sft", "bc"]}, "--algo bc: asked for twice"),
        ({"seeds": (0, 1, 1)}, "--seeds 1: asked for twice"),
        ({"seeds": (-1,)}, "--seeds -1"),
        ({"seeds": (2**64,)}, "--seeds 18446744073709551616"),
        ({"steps": 0}, "--steps 0: at least 1"),
        ({"reference_steps": 0}, "--reference-steps 0: at least 1"),
        ({"eval_episodes": 0}, "--eval-episodes 0: at least 1"),
        ({"jobs": 0}, "--jobs 0: at least 1"),
        ({"graph": True}, "--graph needs a GPU, and --device is cpu"),
        ({"stack_seeds": True, "estimator": "trajectories"}, "--stack-seeds needs batches of one"),
        ({"stack_seeds": True, "algo": ["dt"]}, "--stack-seeds is not for dt"),
        ({"temperature": -1.0}, "--temperature -1.0: a finite number"),
        ({"temperature": float("inf")}, "--temperature inf"),
        ({"target_ess": 1.5}, "--target-ess 1.5: a share"),
        ({"algo": ["sft", "bc"], "temperature": 2.0}, "--temperature 2.0 changes nothing in sft"),
        ({"temperature": 2.0, "target_ess": 0.5}, "with --target-ess 0.5; leave it out"),
        ({"algo": ["iw-sft-step"], "target_ess": 0.5}, "--target-ess 0.5 changes nothing"),
        ({"algo": ["iw-sft-step"], "q": "auto"}, "--q auto changes nothing in iw-sft-step"),
        ({"temperature": 2.0, "q": "auto"}, "with --q auto; leave it out"),
        ({"algo": ["bc"], "ties": "rank"}, "--ties rank changes nothing in bc;"),
        ({"device": "kuda"}, "--device kuda can't be used here"),
        ({"device": "meta"}, "--device meta can't be used here"),
        # The hundredth GPU is nowhere.
        ({"device": "cuda:99"}, "--device cuda:99 can't be used here"),
        ({"dataset": "hopper-medium-reply-v2"}, "did you mean 'hopper-medium-replay-v2'"),
        ({"dataset": "nowhere/mine.hdf5"}, "nowhere/mine.hdf5"),
    ],
)
def test_wrong_settings_are_named_before_anything_is_written(
    fails: Callable[..., str], tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    assert message in fails(tmp_path / "runs", **settings)
    assert not (tmp_path / "runs").exists()


def spoil(row: int, value: float) -> Callable[[Any], Any]:
    def change(values: Any) -> Any:
        values[row] = value
        return values

    return change


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rewards": spoil(7, np.nan)}, "'rewards' is NaN at row 7"),
        ({"observations": spoil(11, np.inf)}, "'observations' is infinite or beyond float32"),
        ({"actions": spoil(3, 1.5)}, "'actions' is out of range at row 3"),
        ({"env_id": "Humanoid-v4"}, "actions of size 3, Humanoid-v4 takes size 17"),
        ({"env_id": "Hoper-v4"}, "unknown environment 'Hoper-v4'. Did you mean Hopper-v4"),
        ({"env_id": "CartPole-v1"}, "bad has observations of size 11, CartPole-v1 gives size 4"),
    ],
)
def test_bad_data_is_named_before_anything_is_written(
    fails: Callable[..., str], edited: Edit, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    assert message in fails(tmp_path / "runs", dataset=str(edited(**fields)))
    assert not (tmp_path / "runs").exists()


def test_a_module_that_a_file_names_is_imported_only_on_a_flag(
    fails: Callable[..., str],
    edited: Edit,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "planted.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    path = edited()
    with h5py.File(path, "a") as file:
        file.attrs["env_id"] = "planted:Hopper-v4"
    message = fails(tmp_path / "runs", dataset=str(path))
    assert "['planted']" in message and "--trust-env-module" in message
    assert "planted" not in sys.modules


def nameless(path: Path) -> None:
    with h5py.File(path, "a") as file:
        del file.attrs["env_id"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:4000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (nameless, "bad names no environment to score in; write its gymnasium id into .* env_id"),
        (truncate, r"bad\.hdf5: the HDF5 file is damaged"),
    ],
)
def test_damaged_files(
    fails: Callable[..., str],
    edited: Edit,
    tmp_path: Path,
    damage: Callable[[Path], None],
    message: str,
) -> None:
    path = edited()
    damage(path)
    assert re.search(message, fails(tmp_path / "runs", dataset=str(path)))
    assert not (tmp_path / "runs").exists()


def test_a_download_that_breaks(
    fails: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("IWSFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(catalog, "_BERKELEY", "http://127.0.0.1:9/d4rl")
    monkeypatch.setattr(catalog, "_HUGGING_FACE", "http://127.0.0.1:9/mirror")
    message = fails(tmp_path / "runs", dataset="hopper-medium-replay-v2")
    assert "http://127.0.0.1:9/mirror/hopper_medium_replay-v2.hdf5" in message
    assert not (tmp_path / "runs").exists()


def test_an_empty_curated_set_names_a_way_out_that_works(
    job: Job,
    fails: Callable[..., str],
    edited: Edit,
    tmp_path: Path,
    read_json: Any,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All returns equal, as with sparse rewards: > keeps none of them."""
    path = edited("sparse", rewards=lambda values: np.zeros_like(values))
    message = fails(tmp_path / "runs", ["bc", "sft-q"], dataset=str(path))
    assert "sft-q, --ties >: the curated set is empty" in message and "ties='rank'" in message
    assert not (tmp_path / "runs").exists()
    with pytest.warns(UserWarning, match="scores are 0"):
        settings = {"dataset": str(path), "ties": "rank", "q": "auto", "resume": True}
        job(tmp_path / "runs", ["sft-q", "iw-sft-q"], **settings)
    reason = "curated trajectories have the same return, so --q auto leaves all weights at 1"
    assert reason in capsys.readouterr().err
    folder = tmp_path / "runs" / "d4rl" / "sparse"
    q = read_json(folder / "iw-sft-q" / "seed-0" / "result.json")["q"]
    assert reason in q.pop("note") and q["rule"] == "auto" and q["exponent"] == 0


def test_one_trajectory_only(
    job: Job,
    fails: Callable[..., str],
    edited: Edit,
    tmp_path: Path,
    tiny_dataset: Path,
    read_json: Any,
) -> None:
    with h5py.File(tiny_dataset) as file:
        first = int(np.flatnonzero(file["terminals"][...])[0]) + 1
    path = edited("lone", first)
    assert "1 of 1 scores" in fails(tmp_path / "runs", dataset=str(path))
    settings = {"dataset": str(path), "preset": "authors", "q": "auto"}
    folder = job(tmp_path / "runs", ["iw-sft-q"], **settings) / "iw-sft-q" / "seed-0"
    assert [row["ESS"] for row in metrics.read(folder / metrics.FILE)] == [1.0] * 20
    assert "the curated set is one trajectory" in read_json(folder / "result.json")["q"]["note"]


@pytest.mark.parametrize("estimator", ["steps", "trajectories"])
def test_trajectories_of_length_1_are_trained_on(
    job: Job, edited: Edit, tmp_path: Path, estimator: str
) -> None:
    path = edited("short", terminals=lambda values: np.ones_like(values))
    folder = job(tmp_path / "runs", ["iw-sft-q"], dataset=str(path), estimator=estimator)
    rows = metrics.read(folder / "iw-sft-q" / "seed-0" / metrics.FILE)
    assert rows[0]["weight_max"] == 1.0 and rows[-1]["step"] == 20


def test_folders_that_hold_runs_are_named_and_nothing_is_claimed(
    job: Job, fails: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "runs"
    folder = job(out, ["bc", "bc-10"], steps=2, reference_steps=2)
    before = snapshot(out)
    message = fails(out, ["bc", "bc-10", "sft"], seeds=(0, 1), steps=2, reference_steps=2)
    assert str(folder / "bc" / "seed-0") in message and str(folder / "bc-10" / "seed-0") in message
    assert "seed-1" not in message and "sft" not in message and "--resume" in message
    assert snapshot(out) == before


def test_resume_with_other_settings(job: Job, fails: Callable[..., str], tmp_path: Path) -> None:
    out, same = tmp_path / "runs", {"steps": 2, "reference_steps": 2}
    run = job(out, ["iw-sft-q"], **same) / "iw-sft-q" / "seed-0"
    before = snapshot(out)
    others: list[tuple[dict[str, Any], str]] = [
        ({"steps": 3}, "settings.fine_tuning.steps=2 (now 3)"),
        ({"preset": "authors"}, "settings.preset='paper' (now 'authors')"),
        ({"eval_episodes": 3}, "eval_episodes=2 (now 3)"),
        ({"temperature": 3.0}, "settings.fine_tuning.k=1.0 (now 3.0)"),
    ]
    for settings, message in others:
        error = fails(out, ["iw-sft", "iw-sft-q"], **same | settings, resume=True)
        assert f"{run} holds a run with other settings: {message}" in error
        assert snapshot(out) == before


def test_other_data_under_the_same_name(
    job: Job, fails: Callable[..., str], edited: Edit, tmp_path: Path
) -> None:
    out, short = tmp_path / "runs", {"steps": 2, "reference_steps": 2}
    job(out, ["bc"], dataset=str(edited("data")), **short)
    again = edited("data", rewards=spoil(0, 9.0))
    assert "settings.data=" in fails(out, ["bc"], dataset=str(again), **short, resume=True)


def test_a_damaged_config(job: Job, fails: Callable[..., str], tmp_path: Path) -> None:
    folder = job(tmp_path, ["bc"], steps=2, reference_steps=2)
    config = folder / "bc" / "seed-0" / "config.json"
    config.write_text(config.read_text()[:40])
    message = fails(tmp_path, ["bc"], steps=2, reference_steps=2, resume=True)
    assert f"{config} is not what a run writes" in message


def test_out_that_is_a_file(fails: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("mine")
    assert f"{tmp_path / 'runs'}" in fails(tmp_path / "runs")
    assert (tmp_path / "runs").read_text() == "mine"


def run_fails(job: Job, capsys: pytest.CaptureFixture[str], *args: Any, **settings: Any) -> str:
    """Run the job; the line of the run that failed, which is the last one."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        job(*args, **settings)
    assert ended.value.code == 1
    err = capsys.readouterr().err
    assert "Traceback" not in err
    line = err.splitlines()[-1]
    assert line.startswith("error: ")
    return line


def test_a_folder_that_another_process_works_in(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = job(tmp_path, ["bc"]) / "bc" / "seed-0"
    (folder / "result.json").unlink()
    with FileLock(folder / ".lock"):
        line = run_fails(job, capsys, tmp_path, ["bc"], resume=True)
    assert f"error: mine bc seed 0: another process works in {folder}" in line


def test_weights_that_overflow(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a row that does not normalise them."""
    monkeypatch.setitem(_TABLE_4, "hopper-medium-replay", FineTuning())
    settings = {"estimator": "trajectories", "temperature": 1e9}
    line = run_fails(job, capsys, tmp_path, ["iw-sft-q"], **settings)
    assert "iw-sft-q seed 0: importance weights overflow" in line and "lower Temperature" in line


def test_one_run_that_fails_leaves_the_others(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The checkpoint of seed 1's reference is damaged; seed 2 still runs."""
    few = {"steps": 2, "reference_steps": 2, "eval_episodes": 1}
    data = job(tmp_path, ["bc"], seeds=(1,), **few)
    (reference,) = (path for path in (data / "reference").iterdir() if path.is_dir())
    state = reference / "checkpoint" / "state.pt"
    content = bytearray(state.read_bytes())
    content[len(content) // 2] ^= 1
    state.write_bytes(content)

    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        job(tmp_path, ["sft"], seeds=(1, 2), **few)
    assert ended.value.code == 1
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("error")]
    assert len(errors) == 1 and f"error: mine sft seed 1: {state} is corrupt" in errors[0]
    assert "\nSFT " in printed.out and "1 done, 1 failed" in printed.out
    finished = data / "sft" / "seed-2" / "result.json"
    before = finished.read_bytes()
    assert not (data / "sft" / "seed-1" / "result.json").exists()

    shutil.rmtree(state.parent)
    job(tmp_path, ["sft"], seeds=(1, 2), resume=True, **few)
    assert (data / "sft" / "seed-1" / "result.json").exists()
    assert finished.read_bytes() == before


def test_a_full_disk(
    job: Job, full_disk: FullDisk, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No room for a checkpoint; then there is room again."""
    out, few = tmp_path / "runs", {"steps": 2, "reference_steps": 2}
    job(out, ["bc-10"], **few)
    before = snapshot(out)
    with full_disk(500_000):
        line = run_fails(job, capsys, out, ["sft"], **few)
    assert f"error: mine sft seed 0: no space left to write {out}" in line and "--resume" in line
    after = snapshot(out)
    assert {path: after[path] for path in before} == before
    assert not [path for path in after if path.name == "result.json" and path not in before]

    results = [
        json.loads((folder / "sft" / "seed-0" / "result.json").read_text())["episode_returns"]
        for folder in (
            job(out, ["sft"], **few, resume=True),
            job(tmp_path / "whole", ["sft"], **few),
        )
    ]
    assert results[0] == results[1]


def test_a_disk_too_full_to_claim_a_folder_claims_none(
    fails: Callable[..., str], full_disk: FullDisk, tiny_dataset: Path, tmp_path: Path
) -> None:
    """The configuration of bc fits, that of iw-sft-q does not."""
    task, source = Task.load(str(tiny_dataset)), str(tiny_dataset)
    options = Options(steps=20, reference_steps=20, eval_episodes=2)
    runs = [Run(tiny_dataset.stem, algo, 0, options, source) for algo in ("bc", "iw-sft-q")]
    sizes = [len(json.dumps(config_of(run, task), indent=1)) for run in runs]
    with full_disk(sum(sizes) // 2):
        message = fails(tmp_path / "runs", ["bc", "iw-sft-q"])
    assert "no space left to write" in message and "iw-sft-q/seed-0/config.json" in message
    assert not [*tmp_path.rglob("*.json"), *tmp_path.rglob("*.partial")]


def test_another_environment_is_not_resumed(
    fails: Callable[..., str], edited: Edit, job: Job, tmp_path: Path
) -> None:
    path = edited("same")
    few = {"dataset": str(path), "steps": 2, "eval_episodes": 1}
    job(tmp_path / "runs", ["bc"], **few)
    with h5py.File(path, "a") as file:
        file.attrs["env_kwargs"] = json.dumps({"healthy_reward": 10.0})
    message = fails(tmp_path / "runs", ["bc"], **few, resume=True, seeds=(0, 1))
    assert "env_kwargs" in message and "healthy_reward" in message
