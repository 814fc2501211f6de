"""Sets by name: recipes, checksums, and the policies from files of arrays."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from torchrl.envs.utils import ExplorationType

from benchmarks.collect import policy_file, sets
from benchmarks.collect.__main__ import build_sets, main
from benchmarks.collect.options import Options, check_options
from benchmarks.collect.output import Parts
from benchmarks.collect.rollout import Behaviour, Simulator
from benchmarks.runs import PACKAGES, hardware, versions
from iwsft import datasets
from iwsft.acting import acting

pytestmark = pytest.mark.filterwarnings("ignore:.*out of date")
DOCS = Path(__file__).parents[2] / "docs"
POLICIES = sorted((Path(sets.__file__).parent / "policies").glob("*.npz"))
Arrays = dict[str, np.ndarray]


def distribution_by_hand(arrays: Arrays, observation: np.ndarray) -> tuple[np.ndarray, Any]:
    """Mean and standard deviation of one observation before the squashing, in float64."""
    x = observation.astype(np.float64)
    if "obs_mean" in arrays:
        x = (x - arrays["obs_mean"]) / np.sqrt(arrays["obs_var"] + arrays["obs_eps"])
        x = np.clip(x, -arrays["obs_clip"], arrays["obs_clip"])
    for i in range(int(arrays["n_hidden"])):
        x = arrays[f"W{i}"] @ x + arrays[f"b{i}"]
        x = np.tanh(x) if arrays["activation"] == "tanh" else np.maximum(x, 0)
    log_std = arrays.get("log_std", -np.inf)
    if "W_logstd" in arrays:
        log_std = np.clip(arrays["W_logstd"] @ x + arrays["b_logstd"], -20, 2)
    return arrays["W_out"] @ x + arrays["b_out"], np.exp(log_std)


def write_linear(path: Path, **more: Any) -> Path:
    """A deterministic policy without hidden layers, as augmented random search trains."""
    rng = np.random.default_rng(0)
    layer = {"W_out": rng.normal(size=(3, 11)), "b_out": np.zeros(3)} | more
    np.savez(path, **layer, n_hidden=0, activation="tanh", squash=False)
    return path


@pytest.mark.parametrize(
    "path", [*POLICIES, None], ids=lambda path: path.stem if path else "linear"
)
def test_a_file_acts_as_by_hand(path: Path | None, tmp_path: Path) -> None:
    path = path or write_linear(tmp_path / "linear.npz")
    with np.load(path) as file:
        arrays = dict(file)
    first = arrays.get("W0", arrays["W_out"])
    rows = np.random.default_rng(1).normal(size=(16, first.shape[1])).astype(np.float32)
    rows[0] *= 100
    policy = policy_file.load(path, stochastic=False).module
    squash = np.tanh if arrays["squash"] else np.asarray
    with acting(policy):
        actions = policy(torch.from_numpy(rows)).numpy()
    for row, action in zip(rows, actions, strict=True):
        mean, std = distribution_by_hand(arrays, row)
        np.testing.assert_allclose(action, squash(mean), rtol=2e-4, atol=2e-4)
    if policy.has_std:
        torch.manual_seed(0)
        with acting(policy, ExplorationType.RANDOM):
            draws = policy(torch.from_numpy(row).expand(4000, -1)).double().numpy()
        if arrays["squash"]:
            draws = np.arctanh(np.clip(draws, -1 + 1e-7, 1 - 1e-7))
        # The median and the central 68 % do not notice where float32 rounds tanh to 1.
        low, middle, high = np.quantile(draws, [0.15866, 0.5, 0.84134], axis=0)
        near = np.abs(mean) + std < 6
        assert (np.abs(middle - mean) < 5 * 1.2533 * std / 4000**0.5)[near].all()
        assert (np.abs((high - low) / (2 * std) - 1) < 0.1)[near].all()


@pytest.mark.parametrize(
    ("content", "stochastic", "message"),
    [
        (None, True, "linear.npz has no standard deviation; use --noise, not --stochastic"),
        (
            {"W_out": np.zeros((3, 11))},
            False,
            "not a policy's file of arrays .KeyError: 'n_hidden'",
        ),
        ("text", False, "not a policy's file of arrays"),
        ("missing", False, "there is no file .*linear.npz"),
    ],
)
def test_files_that_do_not_do(tmp_path: Path, content: Any, stochastic: bool, message: str) -> None:
    path = tmp_path / "linear.npz"
    if content is None:
        write_linear(path)
    elif content == "text":
        path.write_text("text")
    elif "b_out" in content:
        write_linear(path, **content)
    elif content != "missing":
        np.savez(path, **content)
    with pytest.raises(SystemExit, match=f"^error: .*{message}"):
        main(
            Options(
                out=str(tmp_path / "a.hdf5"),
                policy=(str(path),),
                stochastic=stochastic,
                env="Hopper-v4",
                episodes=(1,),
            )
        )


def test_every_recipe_can_be_followed(tmp_path: Path) -> None:
    assert tuple(sets.SETS) == datasets.COLLECTED
    for name in sets.SETS:
        options = sets.recipe(name, tmp_path)
        check_options(options)
        for policy in options.policy:
            # All have a density, and are small enough to be shipped.
            module = policy_file.load(Path(policy), stochastic=True)
            assert options.env is not None
            Behaviour(policy, module).check_sizes(Simulator.of(options.env, {}))
            assert Path(policy).stat().st_size < 300_000


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A set of this name; the folder in which the command builds it."""
    given = {
        "policy": ["hopper-sac.npz", "hopper-tqc.npz"],
        "stochastic": True,
        "noise": [0.1, 0.0],
    }
    given |= {"env": "Hopper-v4", "episodes": [33, 1], "part_steps": 100, "max_episode_steps": 25}
    monkeypatch.setitem(sets.SETS, "hopper-replay", {"options": given})
    monkeypatch.setenv("IWSFT_CACHE", str(tmp_path))
    return tmp_path / "collected"


def build(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr("sys.argv", ["python -m benchmarks.collect", "sets", *words])
    build_sets()


def test_a_set_is_built_checked_and_found(
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(FileNotFoundError, match="collect sets hopper-replay. builds it"):
        datasets.load("hopper-replay")
    build(monkeypatch, "hopper-replay")
    whole = (tiny / "hopper-replay.hdf5").read_bytes()
    sha256 = hashlib.sha256(whole).hexdigest()
    out, err = capsys.readouterr()
    assert f"no checksum of hopper-replay is recorded yet; this one has SHA-256 {sha256}" in err
    # Once where it is collected, and once where it is compared.
    (profile,) = {line for line in out.splitlines() if line.startswith("34 episodes, 850 steps")}
    with h5py.File(tiny / "hopper-replay.hdf5") as file:
        returns = file["rewards"][()].reshape(34, 25).sum(axis=1, dtype=np.float64)
    assert profile.split(": ")[2].startswith(f"{returns.min():.1f}, ")
    assert f"mean {returns.mean():.1f}, deviation {returns.std():.1f}, " in profile
    monkeypatch.setitem(sets.SETS["hopper-replay"], "sha256", "0" * 64)
    # Other bytes than recorded are an error only if nothing explains them.
    machine = hardware("cpu")
    made = versions(PACKAGES) | versions(["h5py"])
    made |= {"processor": machine["name"], "instructions": machine["instructions"]}
    monkeypatch.setitem(sets._RECORD, "made-with", made)
    with pytest.raises(SystemExit, match="error: .*not the recorded one, though versions are the"):
        build(monkeypatch, "hopper-replay")
    for name, other in ("torch", "1.0"), ("instructions", "MMX"):
        monkeypatch.setitem(sets._RECORD, "made-with", made | {name: other})
        build(monkeypatch, "hopper-replay")
        warning = f"differs from the recorded set; it was made with {name}={other!r} (now "
        assert f"{warning}{made[name]!r}" in capsys.readouterr().err
    monkeypatch.setitem(sets.SETS["hopper-replay"], "sha256", sha256)

    # Cut off after the first part, and continued elsewhere than the first: the same bytes.
    append = Parts.append

    def stopped(parts: Parts, *given: Any) -> None:
        if len(parts) == 1:
            raise OSError("the disk is gone")
        append(parts, *given)

    elsewhere = tmp_path / "elsewhere"
    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="is gone"):
        patch.setattr(Parts, "append", stopped)
        build(patch, "hopper-replay", "--out", str(elsewhere))
    assert not (elsewhere / "hopper-replay.hdf5").exists()
    build(monkeypatch, "hopper-replay", "--out", str(elsewhere))
    assert (elsewhere / "hopper-replay.hdf5").read_bytes() == whole
    out, err = capsys.readouterr()
    assert "hopper-replay has the recorded bytes" in out and "warning" not in err

    loaded = datasets.load("hopper-replay")
    assert (loaded.name, loaded.source) == (
        "hopper-replay",
        "the set hopper-replay of benchmarks.collect",
    )
    with h5py.File(tiny / "hopper-replay.hdf5") as file:
        parts = json.loads(file.attrs["sources"])
    assert [part["policy"] for part in parts] == ["hopper-sac.npz", "hopper-tqc.npz"]
    assert [part["noise"] for part in parts] == [0.1, 0.0]


def test_an_unknown_set(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        SystemExit, match="unknown set 'hoper-replay'; did you mean 'hopper-replay'"
    ):
        build(monkeypatch, "hoper-replay")


def row(name: str, recorded: dict[str, Any]) -> str:
    """The row of the documentation's table."""
    profile = recorded["profile"]
    parts, others = (
        "; ".join(
            f"{mean:.0f} +- {std:.0f} ({low:.0f} to {high:.0f})" for mean, std, low, high in of
        )
        for of in (profile["parts"], recorded["d4rl"]["parts"])
    )
    quantiles = " / ".join(f"{value:.0f}" for value in profile["returns"])
    sizes = f"{profile['steps']:,} | {profile['episodes']:,}"
    return f"| `{name}` | {sizes} | {quantiles} | {parts} | {others} |"


def test_the_documentation_has_the_recorded_profiles() -> None:
    page = (DOCS / "data.md").read_text()
    for name, recorded in sets.SETS.items():
        if "profile" in recorded:
            assert row(name, recorded) in page
