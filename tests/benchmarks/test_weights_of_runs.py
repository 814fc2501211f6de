"""`iwsft weights` on runs of control, against policies that are loaded and run one by one."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from scipy import stats

from benchmarks.weights.source import Source
from iwsft import (
    GaussianPolicy,
    ImportanceWeightedMLE,
    ImportanceWeights,
    curate,
    datasets,
    load_policy,
)
from iwsft.curation import trajectory_returns
from iwsft.trajectory import from_steps, lengths

DOCS = Path(__file__).parents[2] / "docs"
DATASET = "hopper-replay-mini"
FOLDER = Path("runs/d4rl", DATASET, "iw-sft-q/seed-0")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, job: Callable[..., Path]) -> Path:
    """A folder with finished runs."""
    folder = tmp_path_factory.mktemp("weights")
    algos = ["iw-sft-q", "sft", "bc"]
    job(folder / "runs", algos, dataset=DATASET, steps=20, curve_episodes=0)
    return folder


def truth(source: str, folder: Path) -> dict[str, Any]:
    """Mean log-ratio, multiplicity, length and return of each curated trajectory, by a loop."""
    whole = datasets.load(source, scale_actions=True).trajectories
    data = curate(whole, cuts=(90, 95, 98), ties=">")
    (home,) = (folder.parents[1] / "reference").iterdir()
    reference = load_policy(home, GaussianPolicy(11, 3)).module
    policy = load_policy(folder).module
    with torch.no_grad():
        log_ratio = policy.log_prob(data.copy()) - reference.log_prob(data.copy())
    parts = log_ratio.double().split(lengths(data).tolist())
    first = lengths(data).cumsum(0) - lengths(data)
    return {
        "log_ratio": np.array([float(part.mean()) for part in parts]),
        "m": data["multiplicity"][first].numpy(),
        "length": lengths(data).numpy(),
        "score": trajectory_returns(data).numpy(),
    }


def ess(weight: Any) -> float:
    return float(weight.sum() ** 2 / (weight**2).sum() / len(weight))


def read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "weights" / "weights.json").read_text())
    return content


def test_the_command_of_the_docs_weighs_a_run(
    root: Path, call: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(root)
    page = (DOCS / "after_training.md").read_text()
    (words,) = re.findall(r"^    iwsft (weights runs/d4rl.*)$", page, re.MULTILINE)
    assert words.split()[1] == str(FOLDER)
    call(*words.split())
    out = capsys.readouterr().out
    assert out.endswith(f"Page: {FOLDER}/weights/index.html\n")
    known, found = truth(DATASET, root / FOLDER), read(root / FOLDER)
    repeated = {name: np.repeat(x, known["m"]) for name, x in known.items()}
    log_ratio = repeated["log_ratio"]
    weight = np.exp(log_ratio)
    numbers = found["weights"]
    assert numbers["ESS"] == pytest.approx(ess(weight), rel=1e-5)
    heaviest = np.sort(weight)[::-1][: -(-len(weight) // 100)].sum() / weight.sum()
    assert numbers["weight_top1"] == pytest.approx(heaviest, rel=1e-5)
    for name in ("length", "score"):
        rho = stats.spearmanr(weight, repeated[name]).statistic
        assert numbers[f"weight_{name}_corr"] == pytest.approx(rho, abs=1e-9)
    for row in found["temperatures"]:
        assert row["ESS"] == pytest.approx(ess(np.exp(row["k"] * log_ratio)), rel=1e-4)
    for row in found["targets"]:
        assert ess(np.exp(row["k"] * log_ratio)) == pytest.approx(row["target"], rel=1e-3)
        assert f"{row['k']:.4g}" in out
    html = (root / FOLDER / "weights" / "index.html").read_text()
    assert html.count("data:image/svg+xml") == 2


def test_q_of_whole_trajectories_is_the_moving_average(
    tiny_dataset: Path, tmp_path: Path, job: Callable[..., Path], call: Callable[..., None]
) -> None:
    """Without memory it is the policy, and with a long one still the reference."""
    for alpha in (0.0, 0.999999):
        options = {"estimator": "trajectories", "alpha": alpha, "curve_episodes": 0}
        home = job(tmp_path / str(alpha), ["iw-sft-q"], **options) / "iw-sft-q/seed-0"
        call("weights", str(home), "--temperatures", "100", "--out", str(tmp_path / "weights"))
        found = read(tmp_path)
        if alpha == 0:
            known = truth(str(tiny_dataset), home)
            weight = np.exp(100 * np.repeat(known["log_ratio"], known["m"]))
            assert found["temperatures"][0]["ESS"] == pytest.approx(ess(weight), rel=1e-3)
            assert ess(weight) < 0.95
        else:
            assert found["weights"]["weight_max"] == pytest.approx(1.0, abs=1e-4)


WRONG = {
    "": "pass the folder of a run, or --model, --base, --data too",
    "nowhere": "there is no nowhere/config.json; a run is OUT/d4rl/DATASET/ALGO/seed-K or",
    f"{FOLDER} --model m": "--model m changes nothing with a run, which has its own; leave it out",
    f"{FOLDER} --target-ess 0": "--target-ess 0.0: a share of the draws, above 0, at most 1",
    f"{FOLDER} --temperatures nan": "--temperatures nan: finite numbers that are not negative",
    f"{FOLDER} --data door-human": "--data door-human has observations and actions of sizes (39, ",
    f"runs/d4rl/{DATASET}/bc/seed-0": "bc starts from no reference policy, so it has no ",
    "moved": "moved was moved: its config.json is of OUT/d4rl/",
    "runs/unfinished": "runs/unfinished/config.json is not what a run writes",
    "runs/loop": "runs/loop is a run of loop; a run is OUT/d4rl/DATASET/ALGO/seed-K or",
    f"cut/d4rl/{DATASET}/iw-sft-q/seed-0": "has no checkpoint yet",
    f"lost/d4rl/{DATASET}/iw-sft-q/seed-0": "has no reference policy any more",
}


def test_what_can_not_be_weighed_is_told_in_a_line(
    root: Path, call: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    shutil.copytree(FOLDER, "moved")
    for name, config in (("unfinished", {}), ("loop", {"benchmark": "loop"})):
        Path("runs", name).mkdir()
        Path("runs", name, "config.json").write_text(json.dumps(config))
    for name, lost in (("cut", FOLDER.relative_to("runs")), ("lost", f"d4rl/{DATASET}/reference")):
        shutil.copytree("runs", name)
        shutil.rmtree(Path(name, lost, *(["checkpoint"] if name == "cut" else [])))
    for words, message in WRONG.items():
        with pytest.raises(SystemExit) as end:
            call("weights", *words.split())
        assert message in str(end.value) and "\n" not in str(end.value), words


def test_data_that_have_changed_are_named(
    job: Callable[..., Path], tiny_dataset: Path, tmp_path: Path, call: Callable[..., None]
) -> None:
    """The reference of other data is there still, and does not know of them."""
    data = tmp_path / "mine.hdf5"
    shutil.copy(tiny_dataset, data)
    given = {"dataset": str(data), "pretrain_dataset": DATASET, "steps": 4, "reference_steps": 2}
    job(tmp_path / "runs", ["iw-sft-q"], **given, curve_episodes=0)
    (run,) = (tmp_path / "runs").glob("d4rl/*/iw-sft-q/seed-0")
    call("weights", str(run))
    call("weights", str(run))
    # A page of the user's own stays.
    (run / "weights" / "index.html").write_text("mine")
    with pytest.raises(SystemExit, match=r"index.html is not a file of iwsft; choose another"):
        call("weights", str(run))
    assert (run / "weights" / "index.html").read_text() == "mine"
    with h5py.File(data, "a") as file:
        file["rewards"][0] = 9.0
    with pytest.raises(SystemExit, match=r"mine.hdf5 has changed since .*seed-0 was trained"):
        call("weights", str(run))


def test_a_run_without_weights_shows_those_that_it_would_have(
    root: Path, call: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(root)
    folder = Path("runs/d4rl", DATASET, "sft/seed-0")
    call("weights", str(folder))
    html = (folder / "weights/index.html").read_text()
    assert "sft has no weights; these are those of k = 1." in html
    assert read(folder)["weights"]["ESS"] < 1


@pytest.mark.parametrize("preset", ["topr", "nft"])
def test_a_chain_for_wrong_answers_does_not_enter_the_temperatures(preset: str) -> None:
    """The tables over k are of one log-ratio, the mean over the steps of each trajectory."""
    sizes, draw = torch.arange(1, 9), torch.Generator().manual_seed(0)
    ids = torch.arange(len(sizes)).repeat_interleave(sizes)
    log_q, log_ref = torch.randn(2, len(ids), generator=draw) / 2
    steps = {
        "observation": torch.zeros(len(ids), 3),
        "action": torch.zeros(len(ids), 2),
        "data_weight": 1.0 - 2 * (ids % 2),
        "success_rate": torch.full([len(ids)], 0.5),
        "ref_log_prob": log_ref,
    }
    source = Source(
        name="",
        notes=(),
        chain=getattr(ImportanceWeights, preset)(),
        make_loss=lambda chain: ImportanceWeightedMLE(
            GaussianPolicy(3, 2), importance_weights=chain, proposal="current"
        ),
        trajectories=from_steps(steps, ids),
        log_q=log_q,
    )
    log_ratio = np.array(
        [float(part.mean()) for part in (log_q - log_ref).double().split(sizes.tolist())]
    )
    for k in (0.1, 1.0, 3.0):
        assert source.ess(k) == pytest.approx(ess(np.exp(k * log_ratio)), rel=1e-5)
