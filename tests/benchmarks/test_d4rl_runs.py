"""The job from the command line to the report, on data small enough to run it often."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.d4rl import settings
from benchmarks.d4rl.__main__ import main
from benchmarks.d4rl.options import ALGORITHMS, Options
from benchmarks.d4rl.run import Task
from benchmarks.d4rl.settings import FineTuning
from benchmarks.report import __main__ as report
from benchmarks.report.options import Options as ReportOptions
from benchmarks.report.scores import algorithm_label
from benchmarks.results import CONTROL, read_runs
from iwsft import GaussianPolicy, MixturePolicy, datasets, evaluate, load_policy, metrics
from iwsft.evaluation import normalized_score

Job = Callable[..., Path]
Read = Callable[[Path], dict[str, Any]]
WEIGHTED = [name for name, each in ALGORITHMS.items() if each.weighted]


def parameters(folder: Path) -> dict[str, Tensor]:
    """The policy of a run's last checkpoint."""
    state = torch.load(folder / "checkpoint" / "state.pt", weights_only=True)["state"]["loss"]
    policy = {
        name: value
        for name, value in state.items()
        if isinstance(value, Tensor) and name.startswith("actor_network_params")
    }
    assert len(policy) == 9  # four layers and the log-std
    return policy


def same(one: Path, other: Path) -> bool:
    ours, theirs = parameters(one), parameters(other)
    return all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def folder(job: Job, out: Path) -> Path:
    """All algorithms, one seed, with a learning curve."""
    return job(out, ALGORITHMS, curve_episodes=1)


@pytest.fixture(scope="module")
def variants(job: Job, out: Path) -> dict[str, Path]:
    """Other settings of weighted runs, by what is set."""
    return {
        "authors": job(out / "authors", ["iw-sft-q", "iw-sft-step"], preset="authors"),
        "trajectories": job(
            out / "trajectories",
            ["bc", "sft-q", "iw-sft-q", "iw-sft-step"],
            estimator="trajectories",
        ),
        "target-ess": job(out / "target-ess", ["iw-sft-q"], target_ess=0.6, ties="rank"),
    }


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_a_run_writes_what_the_report_reads(folder: Path, algo: str, read_json: Read) -> None:
    run = folder / algo / "seed-0"
    config, result = read_json(run / "config.json"), read_json(run / "result.json")
    for each in (config, result):
        about = [each[key] for key in ("benchmark", "dataset", "algo", "seed", "env_id")]
        assert about == ["d4rl", "mine", algo, 0, "Hopper-v4"]
        assert (each["preset"], each["estimator"]) == ("paper", "steps")
        assert {"gymnasium", "mujoco"} <= each["versions"].keys()
    assert {"python", "iwsft", "torch", "torchrl", "tensordict"} <= config["versions"].keys()
    assert config["command"].startswith("iwsft d4rl")
    assert config["hardware"]["device"] == "cpu"
    assert config["settings"]["data"] == datasets.load(config["source"]).fingerprint
    assert config["settings"]["seed"] == 0

    assert result["steps"] == 20 and result["episodes"] == 2
    assert len(result["episode_returns"]) == len(result["episode_lengths"]) == 2
    assert result["return_mean"] == pytest.approx(sum(result["episode_returns"]) / 2)
    references = datasets.reference_scores("hopper-medium-v2")
    assert references is not None
    wanted = normalized_score(result["episode_returns"], references).tolist()
    assert result["episode_scores"] == pytest.approx(wanted)
    assert result["normalized_score"] == pytest.approx(sum(wanted) / 2)
    assert result["wall_seconds"] > 0 and result["cpu_seconds"] > 0
    assert (result["reference_wall_seconds"] > 0) == ALGORITHMS[algo].from_reference


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_metrics_hold_every_name_and_a_learning_curve(folder: Path, algo: str) -> None:
    lines = (folder / algo / "seed-0" / metrics.FILE).read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["step"] for row in rows] == list(range(1, 21))
    always = {"step", "loss", "ESS", "weight_mean", "weight_max", "log_prob", "lr", "wall_seconds"}
    assert all(always <= row.keys() for row in rows)
    assert all(0 < row["ESS"] <= 1 for row in rows)
    curve = [row["step"] for row in rows if "normalized_score" in row]
    assert curve == list(range(2, 21, 2))
    diagnosed = [row for row in rows if "weight_q50" in row]
    assert bool(diagnosed) == ALGORITHMS[algo].weighted
    assert all("bound_gap" in row and "weight_q95" in row for row in diagnosed)
    if ALGORITHMS[algo].from_reference:
        assert [row["lr"] for row in rows][0] == 0  # warm-up


def first_row(run: Path) -> dict[str, float]:
    return metrics.read(run / metrics.FILE)[0]


def test_weights_start_at_exactly_1(folder: Path, variants: dict[str, Path]) -> None:
    runs = [folder / algo / "seed-0" for algo in WEIGHTED]
    runs += [each / "iw-sft-q" / "seed-0" for each in variants.values()]
    runs += [variants[name] / "iw-sft-step" / "seed-0" for name in ("authors", "trajectories")]
    for row in map(first_row, runs):
        assert row["weight_mean"] == 1.0 and row["weight_max"] == 1.0 and row["ESS"] == 1.0


def test_the_config_contains_all_settings(variants: dict[str, Path], read_json: Read) -> None:
    def config(variant: str, algo: str) -> dict[str, Any]:
        return read_json(variants[variant] / algo / "seed-0" / "config.json")

    assert config("authors", "iw-sft-q")["preset"] == "authors"
    assert config("trajectories", "iw-sft-q")["estimator"] == "trajectories"
    assert config("trajectories", "iw-sft-q")["settings"]["sync_every"] == 1
    assert config("target-ess", "iw-sft-q")["settings"]["target_ess"] == 0.6
    assert config("target-ess", "iw-sft-q")["settings"]["ties"] == "rank"


def test_the_table_names_all_algorithms(
    job: Job, folder: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With all runs finished, --resume trains nothing and prints the table."""
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.json*")}
    capsys.readouterr()
    job(out, ALGORITHMS, curve_episodes=1, resume=True)
    printed = capsys.readouterr()
    *unsynced, taken = printed.err.splitlines()
    assert [line.split()[1] for line in unsynced] == [f"{algo}:" for algo in WEIGHTED]
    assert taken.startswith("mine: settings of ")
    assert all(f"\n{algorithm_label(algo)} " in printed.out for algo in ALGORITHMS)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.json*")} == before


def test_the_report_reads_the_runs(
    folder: Path, out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report.main(ReportOptions(runs=out, out=tmp_path))
    page = (tmp_path / "report.md").read_text()
    assert all(f"| {algorithm_label(algo)} |" in page for algo in ALGORITHMS)
    printed = capsys.readouterr().out
    # The reference policy is not a run, finished or not.
    assert "unfinished" not in printed and "seed-0" not in page


def test_a_finished_run_is_one_line_with_its_score(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str], read_json: Read
) -> None:
    job(tmp_path, ["sft-q"], seeds=(3,))
    taken, *progress, line = capsys.readouterr().err.splitlines()
    # A slow run also tells how far it is.
    assert not [each for each in progress if "score " in each]
    # The file's name is not D4RL's, its environment is.
    settings = "settings of hopper: SFT(Q) of Appendix F"
    assert taken == f"mine: {settings} (--settings-of NAME takes those of a dataset)"
    result = read_json(tmp_path / "d4rl" / "mine" / "sft-q" / "seed-3" / "result.json")
    score, seconds = result["normalized_score"], result["wall_seconds"]
    assert line == f"mine sft-q seed 3: score {score:.1f}, {seconds:.0f} seconds"


def test_the_same_seed_gives_the_same_numbers_and_another_seed_others(
    job: Job, folder: Path, tmp_path: Path, read_json: Read
) -> None:
    again = job(tmp_path, ["bc", "iw-sft-q"], seeds=(0, 1), curve_episodes=1)
    for algo in ("bc", "iw-sft-q"):
        assert same(again / algo / "seed-0", folder / algo / "seed-0")
        assert not same(again / algo / "seed-1", folder / algo / "seed-0")
        ours = read_json(again / algo / "seed-0" / "result.json")
        theirs = read_json(folder / algo / "seed-0" / "result.json")
        assert ours["episode_returns"] == theirs["episode_returns"]


def test_runs_share_their_reference_and_bc_is_it(folder: Path) -> None:
    (reference,) = (path for path in (folder / "reference").iterdir() if path.is_dir())
    assert same(folder / "bc" / "seed-0", reference)
    bc = metrics.read(folder / "bc" / "seed-0" / metrics.FILE)
    assert bc == metrics.read(reference / metrics.FILE)


def test_a_variant_has_runs_of_its_own_and_the_reference_of_all(job: Job, tmp_path: Path) -> None:
    few = {"steps": 2, "reference_steps": 2, "eval_episodes": 1}
    folder = job(tmp_path, ["sft"], **few)
    job(tmp_path, ["sft"], variant="top50", top=50.0, **few)
    algos = {run.algo: run.folder for run in read_runs(tmp_path, CONTROL)}
    mine = tmp_path / "top50" / "d4rl" / "mine"
    assert algos == {"sft": folder / "sft" / "seed-0", "top50/sft": mine / "sft" / "seed-0"}
    assert len([path for path in (folder / "reference").iterdir() if path.is_dir()]) == 1
    assert [path.name for path in mine.iterdir()] == ["sft"]


@pytest.mark.parametrize("estimator", ["steps", "trajectories"])
def test_temperature_0_is_sft_bit_for_bit(
    job: Job,
    folder: Path,
    variants: dict[str, Path],
    tmp_path: Path,
    estimator: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A row with one learning rate for both, so that nothing but the weights differs."""
    monkeypatch.setitem(settings._TABLE_4, "hopper-medium-replay", FineTuning())
    flat = job(tmp_path, ["iw-sft-q"], temperature=0.0, estimator=estimator)
    beside = folder if estimator == "steps" else variants["trajectories"]
    assert same(flat / "iw-sft-q" / "seed-0", beside / "sft-q" / "seed-0")


def test_other_weights_end_in_another_policy(variants: dict[str, Path]) -> None:
    data = variants["trajectories"]
    assert not same(data / "iw-sft-q" / "seed-0", data / "sft-q" / "seed-0")


def test_a_run_that_ends_before_its_first_sync_says_so(
    job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # 9 updates between syncs: q is then 4 updates old on average, as a moving average of 0.8.
    for steps, told in ((9, True), (10, False)):
        folder = job(tmp_path / f"{steps}", ["sft-q", "iw-sft-q"], steps=steps, alpha=0.8)
        said = f"iw-sft-q: q is synced every 9 updates, so --steps {steps} leaves all weights at 1"
        assert (said in capsys.readouterr().err) == told
        rows = metrics.read(folder / "iw-sft-q" / "seed-0" / metrics.FILE)
        assert (rows[-1]["step"], rows[-1]["weight_max"] == 1) == (steps, told)


def test_a_mixture_is_trained_and_loaded(job: Job, tmp_path: Path, read_json: Read) -> None:
    run = job(tmp_path, ["iw-sft-q"], policy="mixture") / "iw-sft-q" / "seed-0"
    policy, result = load_policy(run), read_json(run / "result.json")
    assert isinstance(policy.module, MixturePolicy)
    assert policy.evaluate(episodes=2, seed=0).returns == result["episode_returns"]
    assert read_json(run / "config.json")["settings"]["policy"] == "mixture"


def test_bc_of_another_length_is_trained_by_itself(job: Job, tmp_path: Path) -> None:
    folder = job(tmp_path, ["bc"], steps=10, reference_steps=20)
    assert not (folder / "reference").exists()
    assert metrics.read(folder / "bc" / "seed-0" / metrics.FILE)[-1]["step"] == 10


def test_the_bundled_data_runs_by_default(tmp_path: Path, read_json: Read) -> None:
    few = {"steps": 2, "reference_steps": 2, "eval_episodes": 1, "curve_episodes": 0}
    main(Options(out=tmp_path, jobs=1, **few))
    run = tmp_path / "d4rl" / "hopper-replay-mini" / "iw-sft-q" / "seed-0"
    assert read_json(run / "result.json")["env_id"] == "Hopper-v4"
    assert read_json(run / "config.json")["settings"]["fine_tuning"]["lr"] == 1e-4
    row = first_row(run)
    assert row["weight_mean"] == 1.0 and row["weight_max"] == 1.0 and row["ESS"] == 1.0


def test_a_warning_about_a_dataset_is_given_once(tiny_dataset: Path, tmp_path: Path) -> None:
    """By the command, and not by each of its workers, which load the data again."""
    path = tmp_path / "bare.hdf5"
    with h5py.File(tiny_dataset) as whole, h5py.File(path, "w") as bare:
        for name in ("observations", "actions", "rewards", "next_observations"):
            bare[name] = whole[name][()]
        bare["terminals"] = np.zeros(len(whole["rewards"]), bool)
        bare.attrs["env_id"] = "Hopper-v4"
    few = {"steps": 2, "eval_episodes": 1, "curve_episodes": 0, "seeds": (0, 1)}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        main(Options(dataset=(str(path),), algo=("bc",), out=tmp_path / "runs", jobs=1, **few))
    assert sum("without a timeout" in str(each.message) for each in caught) == 1


def test_rewards_that_are_not_finite_fail_the_run(
    tiny_dataset: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = Task.load(str(tiny_dataset))
    score = evaluate(GaussianPolicy(11, 3), "Hopper-v4", episodes=1)
    for reward in (math.nan, math.inf):
        given = dataclasses.replace(score, returns=[reward])
        monkeypatch.setattr("benchmarks.d4rl.run.evaluate", lambda *_, given=given, **__: given)
        with pytest.raises(FloatingPointError, match="Hopper-v4 gave rewards that are not finite"):
            task.score(GaussianPolicy(11, 3), episodes=1)


def test_bugs_keep_their_traceback(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.d4rl import job as command

    def bug(*_: Any) -> None:
        raise AttributeError("nobody expects this")

    monkeypatch.setattr(command, "train_and_score", bug)
    with pytest.raises(AttributeError, match="nobody expects this"):
        job(tmp_path, ["bc"])
