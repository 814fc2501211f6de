"""Many runs by one command: what a suite asks for, and what it leaves out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from benchmarks.d4rl.__main__ import main
from benchmarks.d4rl.options import SUITES, Options, choose_suite
from iwsft import datasets
from iwsft.datasets import catalog

Job = Callable[..., Path]
FEW: dict[str, Any] = {
    "steps": 2,
    "reference_steps": 2,
    "eval_episodes": 1,
    "curve_episodes": 0,
    "jobs": 1,
}
PUBLISHED = Path(__file__).parents[2] / "benchmarks" / "published.json"


def published(*tables: str) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(PUBLISHED.read_text())["rows"]
    return [row for row in rows if row["table"] in tables]


def test_the_paper_suite_is_tables_2_and_5() -> None:
    suite, rows = SUITES["paper"], published("table_2", "table_5")
    assert set(suite.dataset) == {row["dataset"] for row in rows}
    assert {row["algo"] for row in rows} <= set(suite.algo)
    assert len(suite.algo) == 13 and suite.seeds == (0, 1, 2, 3, 4)


@pytest.mark.parametrize("name", SUITES)
def test_suites_name_known_datasets(name: str) -> None:
    suite = SUITES[name]
    names = "+".join((*suite.dataset, *suite.cloned, suite.pretrain_dataset or datasets.DEFAULT))
    assert set(names.split("+")) <= {*datasets.available()}


def test_the_kitchen_suite_is_table_3() -> None:
    suite = SUITES["kitchen"]
    rows = [(f"{suite.pretrain_dataset}--to--{suite.dataset[0]}", algo) for algo in suite.algo]
    rows += [(name, "bc") for name in suite.cloned]
    assert set(rows) == {(row["dataset"], row["algo"]) for row in published("table_3")}
    assert all(row["caveats"] for row in published("table_3"))


def test_options_override_the_suite() -> None:
    assert choose_suite(Options(suite="paper")) == SUITES["paper"]
    mine = choose_suite(
        Options(suite="kitchen", seeds=(0,), dataset=("kitchen-mixed-v0",), top=20.0)
    )
    assert (mine.seeds, mine.dataset, mine.top) == ((0,), ("kitchen-mixed-v0",), 20.0)
    assert mine.pretrain_dataset == "kitchen-partial-v0"
    assert mine.algo == SUITES["kitchen"].algo and mine.cloned == ()
    assert choose_suite(Options(suite="kitchen", seeds=(0,))).cloned == SUITES["kitchen"].cloned


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No network; the folder of D4RL's files in the cache."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setenv("IWSFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(catalog, "_BERKELEY", "http://127.0.0.1:9/d4rl")
    monkeypatch.setattr(catalog, "_HUGGING_FACE", "http://127.0.0.1:9/mirror")
    folder = tmp_path / "cache" / "d4rl"
    folder.mkdir(parents=True)
    return folder


def antmaze(path: Path) -> None:
    """20 short episodes of noise in AntMaze's layout, of which every fifth gets to the goal."""
    rng, episodes, length = np.random.default_rng(0), 20, 3
    rows = episodes * length
    reached = np.zeros((episodes, length), dtype=bool)
    reached[::5, -1] = True
    timeouts = np.zeros((episodes, length), dtype=bool)
    timeouts[:, -1] = ~reached[:, -1]
    with h5py.File(path, "w") as file:
        # No jump of the position, nor the joints of a reset: episodes end by their flags.
        file["observations"] = (1 + 0.1 * rng.normal(size=(rows, 29))).astype(np.float32)
        file["actions"] = rng.uniform(-1, 1, size=(rows, 8)).astype(np.float32)
        file["rewards"] = reached.ravel().astype(np.float32)
        file["terminals"] = reached.ravel()
        file["timeouts"] = timeouts.ravel()


def test_the_suite_runs_what_the_data_allow_and_ends_in_the_report(
    offline: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of seven datasets are in the cache. Then again: nothing is left to do."""
    out = tmp_path / "runs"
    shutil.copy(tiny_dataset, offline / "hopper_medium_replay-v2.hdf5")
    antmaze(offline / catalog.CATALOG["antmaze-umaze-v0"].filename)
    job = Options(suite="paper", algo=("bc", "sft-q"), seeds=(0,), out=out, **FEW)
    main(job)
    runs = {str(path.relative_to(out / "d4rl")) for path in (out / "d4rl").glob("*/*/seed-0")}
    assert runs == {
        f"{data}/{algo}/seed-0"
        for data in ("hopper-medium-replay-v2", "antmaze-umaze-v0")
        for algo in ("bc", "sft-q")
    }
    assert all((out / "d4rl" / run / "result.json").exists() for run in runs)
    # Returns of 0 and 1 tie: by the preset's ">" nothing would be above the 90 % cut.
    sparse = json.loads((out / "d4rl/antmaze-umaze-v0/sft-q/seed-0/config.json").read_text())
    dense = json.loads((out / "d4rl/hopper-medium-replay-v2/sft-q/seed-0/config.json").read_text())
    assert sparse["settings"]["ties"] == ">=" and "ties" not in dense["settings"]

    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert "4 done, 5 left out" in lines
    left = [line for line in lines if line.startswith("left out: ")]
    assert len(left) == 5 and left == [x for x in printed.err.splitlines() if x in left]
    assert left[0].startswith("left out: halfcheetah-medium-replay-v2: could not download")
    assert "http://127.0.0.1:9/mirror/halfcheetah_medium_replay-v2.hdf5" in left[0]
    (page,) = (line.removeprefix("Report: ") for line in lines if line.startswith("Report: "))
    assert Path(page).is_relative_to(out) and "antmaze-umaze-v0" in Path(page).read_text()

    before = {path: path.stat().st_mtime_ns for path in out.rglob("result.json")}
    with pytest.raises(SystemExit, match="a run is|runs are"):
        main(job)
    capsys.readouterr()
    main(Options(**vars(job) | {"resume": True}))
    assert "0 done, 4 finished before, 5 left out" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("result.json")} == before


def test_a_suite_of_which_nothing_is_left_fails(offline: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="^error: nothing to run is left: hopper-expert-v2: could"):
        main(Options(suite="locomotion", dataset=("hopper-expert-v2",), out=tmp_path / "runs"))
    assert not (tmp_path / "runs").exists()


@pytest.fixture
def flat(tiny_dataset: Path, tmp_path: Path) -> Path:
    """All returns are equal: no cut keeps anything."""
    path = Path(shutil.copy(tiny_dataset, tmp_path / "flat.hdf5"))
    with h5py.File(path, "a") as file:
        file["rewards"][...] = 0
    return path


def test_an_algorithm_that_the_data_do_not_allow_is_left_out(
    flat: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, algos = (str(flat), str(tiny_dataset)), ("bc", "sft", "sft-q")
    main(Options(suite="paper", dataset=data, algo=algos, seeds=(0,), out=tmp_path, **FEW))
    runs = {f"{path.parts[-4]} {path.parts[-3]}" for path in tmp_path.rglob("result.json")}
    assert runs == {"flat bc", "mine bc", "mine sft", "mine sft-q"}
    printed = capsys.readouterr()
    assert "4 done, 2 left out" in printed.out
    assert f"left out: {flat} sft-q: sft-q, --ties >: the curated set is empty" in printed.out
    scores = [line.split(":")[0] for line in printed.err.splitlines() if ": score" in line]
    assert sorted(scores) == [
        "flat bc seed 0",
        *(f"mine {algo} seed 0" for algo in ("bc", "sft", "sft-q")),
    ]


def test_a_dataset_that_allows_no_algorithm_is_left_out(
    flat: Path, tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = (str(flat), str(tiny_dataset))
    main(Options(suite="paper", dataset=data, algo=("sft",), seeds=(0,), out=tmp_path, **FEW))
    assert [path.parts[-4] for path in tmp_path.rglob("result.json")] == ["mine"]
    printed = capsys.readouterr()
    assert "1 done, 1 left out" in printed.out and "flat: settings of" not in printed.err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"suite": "papr"}, "unknown suite 'papr'; did you mean 'paper'?"),
        ({"suite": "paper", "algo": ("sft", "sftq")}, "unknown algorithm 'sftq'"),
        ({"suite": "paper", "dataset": ("hopper-medium-reply-v2",)}, "'hopper-medium-replay-v2'"),
        ({"dataset": ()}, "pass at least one value to --dataset"),
        ({"dataset": ("hopper-replay-mini",) * 2}, "--dataset hopper-replay-mini: asked for twice"),
        ({"dataset": ("DATA", "OTHER/mine.hdf5")}, "there is another dataset of the name mine"),
        ({"dataset": ("DATA", "nowhere/b.hdf5")}, "nowhere/b.hdf5"),
        ({"dataset": ("DATA", "FLAT")}, "sft-q, --ties >: the curated set is empty"),
        ({"algo": ("iql",), "baseline_steps": 0}, "--baseline-steps 0: at least 1"),
        ({"baseline_steps": 9}, "--baseline-steps 9 changes nothing"),
        ({"algo": ("iql",), "policy": "mixture"}, "--policy mixture changes nothing in iql"),
        ({"top": 0.0}, "--top 0.0: a share"),
    ],
)
def test_wrong_choices_stop_before_anything_runs(
    tiny_dataset: Path, flat: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    (tmp_path / "other").mkdir()
    other = shutil.copy(tiny_dataset, tmp_path / "other")
    words = {"DATA": str(tiny_dataset), "FLAT": str(flat), "OTHER/mine.hdf5": str(other)}
    if "dataset" in settings:
        named = tuple(words.get(name, name) for name in settings["dataset"])
        settings = {**settings, "dataset": named}
    with pytest.raises(SystemExit) as ended:
        main(Options(**{"algo": ("sft-q",), "out": tmp_path / "runs"} | settings))
    text = ended.value.code
    assert isinstance(text, str) and text.startswith("error: ") and "\n" not in text
    assert message in text
    assert not list((tmp_path / "runs").rglob("*.json"))


def test_a_later_dataset_that_holds_runs_frees_the_claims_on_the_others(
    job: Job, tiny_dataset: Path, tmp_path: Path
) -> None:
    second = shutil.copy(tiny_dataset, tmp_path / "second.hdf5")
    job(tmp_path, ["bc"], dataset=str(second), **FEW)
    both = (str(tiny_dataset), str(second))
    with pytest.raises(SystemExit, match="a run is there already"):
        main(Options(algo=("bc",), dataset=both, out=tmp_path, **FEW))
    assert [path.parts[-4] for path in tmp_path.rglob("config.json")] == ["second"]
    main(Options(algo=("bc",), dataset=both, out=tmp_path, resume=True, **FEW))
    assert {path.parts[-4] for path in tmp_path.rglob("result.json")} == {"mine", "second"}


def test_baselines_have_a_length_of_their_own(tiny_dataset: Path, tmp_path: Path) -> None:
    data, lengths = (str(tiny_dataset),), {**FEW, "baseline_steps": 3}
    main(Options(algo=("bc", "td3-bc"), dataset=data, out=tmp_path, **lengths))
    steps = {
        path.parts[-3]: json.loads(path.read_text())["steps"]
        for path in tmp_path.rglob("result.json")
    }
    assert steps == {"bc": 2, "td3-bc": 3}


def test_pre_training_on_other_data(flat: Path, tiny_dataset: Path, tmp_path: Path) -> None:
    flags = {"dataset": (str(tiny_dataset),), "pretrain_dataset": str(flat), "top": 50.0}
    main(Options(algo=("sft",), out=tmp_path, **flags, **FEW))
    (config,) = tmp_path.rglob("config.json")
    settings = json.loads(config.read_text())["settings"]
    assert settings["cuts"] == [50.0]
    assert settings["pretrain"] == datasets.load(flat).fingerprint
    assert settings["data"] == datasets.load(tiny_dataset).fingerprint


def test_references_come_first_and_are_shared(
    tiny_dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One run of each seed trains its reference; then what takes long, then the rest."""
    algos = ("sft", "bc-10", "td3-bc", "sft-q")
    data = (str(tiny_dataset),)
    main(Options(algo=algos, dataset=data, seeds=(0, 1), out=tmp_path, **FEW))
    ended = [line for line in capsys.readouterr().err.splitlines() if ": score" in line]
    lines = [line.split()[1:4] for line in ended]
    assert [(algo, int(seed.rstrip(":"))) for algo, _, seed in lines] == [
        ("sft", 0),
        ("sft", 1),
        *((algo, seed) for algo in ("td3-bc", "bc-10", "sft-q") for seed in (0, 1)),
    ]
