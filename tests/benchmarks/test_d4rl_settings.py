"""The paper's settings as data, against the numbers of its Table 4 and Appendix F."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tensordict import TensorDict

from benchmarks.d4rl.options import ALGORITHMS, Options, check_options, choose_suite
from benchmarks.d4rl.run import Run, Task, reference_settings_of, settings_of
from benchmarks.d4rl.settings import (
    CLONING,
    CLONING_BATCH,
    FINE_TUNING_BATCH,
    TIES,
    FineTuning,
    choose_weights,
    find_fine_tuning,
    name_in_tables,
    weigh_returns,
)
from iwsft.datasets import OfflineDataset
from iwsft.datasets.catalog import CATALOG, Entry
from iwsft.trajectory import Segments

# task: lr, warm-up, steps, alpha of the moving average, k / length, normalised weights
TABLE_4 = {
    "halfcheetah-medium-replay-v2": (4e-5, 300, 4500, 0.995, 1.0, False),
    "hopper-medium-replay-v2": (1e-4, 300, 4500, 0.99, 1.0, True),
    "walker2d-medium-replay-v2": (4e-5, 300, 2000, 0.9, 10.0, True),
    "halfcheetah-medium-expert-v2": (4e-5, 300, 4500, 0.995, 0.8, False),
    "hopper-medium-expert-v2": (4e-4, 300, 4500, 0.995, 0.8, False),
    "walker2d-medium-expert-v2": (4e-5, 300, 4500, 0.995, 0.8, False),
}
# The authors' SFT(Q): one rate for all tasks but one.
SFT_RATES = dict.fromkeys(TABLE_4, 4e-05) | {"hopper-medium-expert-v2": 4e-4}


@pytest.mark.parametrize("dataset", TABLE_4)
@pytest.mark.parametrize("algo", [name for name, each in ALGORITHMS.items() if each.weighted])
def test_weighted_algorithms_take_their_row_of_table_4(dataset: str, algo: str) -> None:
    row, source = find_fine_tuning(dataset, ALGORITHMS[algo])
    assert (row.lr, row.warmup, row.steps, row.alpha, row.k, row.normalize) == TABLE_4[dataset]
    assert source.startswith("Table 4")


@pytest.mark.parametrize("dataset", TABLE_4)
@pytest.mark.parametrize("algo", ["sft", "sft-q"])
def test_unweighted_algorithms_take_the_settings_of_sft(dataset: str, algo: str) -> None:
    row, source = find_fine_tuning(dataset, ALGORITHMS[algo])
    assert (row.lr, row.warmup, row.steps) == (SFT_RATES[dataset], 300, 4500)
    assert "Table 4" not in source


@pytest.mark.parametrize(
    ("dataset", "like"),
    [
        ("hopper-replay-mini", "hopper-medium-replay-v2"),
        ("halfcheetah-mixed", "halfcheetah-medium-replay-v2"),
        ("halfcheetah-expert-v2", "halfcheetah-medium-expert-v2"),
        ("walker2d-full-replay-v2", "walker2d-medium-replay-v2"),
        ("antmaze-umaze-v2", "halfcheetah-medium-replay-v2"),
        ("mine", "halfcheetah-medium-replay-v2"),
    ],
)
def test_other_datasets_borrow_a_row_and_say_so(dataset: str, like: str) -> None:
    row, source = find_fine_tuning(dataset, ALGORITHMS["iw-sft-q"])
    assert (row.lr, row.warmup, row.steps, row.alpha, row.k, row.normalize) == TABLE_4[like]
    assert like.removesuffix("-v2").split("-")[0] in source


def test_behaviour_cloning_as_in_appendix_f() -> None:
    assert (CLONING.steps, CLONING.lr, CLONING.warmup) == (10_000, 1e-3, 0)
    assert {CLONING.factor(step) for step in range(0, 10_000, 500)} == {1.0}
    assert CLONING_BATCH["trajectories"]["paper"] == 32
    assert CLONING_BATCH["trajectories"]["authors"] == 128
    assert FINE_TUNING_BATCH["trajectories"] == 256
    assert TIES == {"paper": ">", "authors": ">="}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.9, 0.99, 0.995, 0.999])
def test_a_hard_synced_q_is_on_average_as_old_as_the_moving_average(alpha: float) -> None:
    """Age: how many updates ago the parameters in q were those of the policy."""
    moving = sum(age * (1 - alpha) * alpha**age for age in range(100_000))
    window = FineTuning(alpha=alpha).sync_every
    hard = sum(range(window)) / window
    assert hard == pytest.approx(moving, abs=1e-6)


LENGTHS = torch.tensor([3, 1, 40])
LOG_RATIO = torch.linspace(-0.9, 1.2, int(LENGTHS.sum()))
COUNT = (1 / LENGTHS).repeat_interleave(LENGTHS)


def weights(preset: Any, row: FineTuning, **settings: Any) -> list[float]:
    """One weight per trajectory, by the chain of a preset (per step with ``per_step``)."""
    ids = torch.arange(3).repeat_interleave(LENGTHS)
    segments = Segments(LOG_RATIO.shape, ids, None, 3)
    options = {"per_step": False, "target_ess": None} | settings
    log_weight = choose_weights(preset, row, **options)(LOG_RATIO, segments, COUNT).log_weight
    if options["per_step"]:
        return log_weight.exp().tolist()
    return [float(each[0].exp()) for each in log_weight.split(LENGTHS.tolist())]


def means() -> list[float]:
    return [float(each.mean()) for each in LOG_RATIO.split(LENGTHS.tolist())]


@pytest.mark.parametrize("k", [0.8, 10.0])
def test_the_papers_weights_are_exp_of_k_times_the_mean_log_ratio(k: float) -> None:
    wanted = [math.exp(k * mean) for mean in means()]
    assert weights("paper", FineTuning(k=k)) == pytest.approx(wanted, rel=1e-5)
    average = sum(wanted) / 3
    normal = weights("paper", FineTuning(k=k, normalize=True))
    assert normal == pytest.approx([weight / average for weight in wanted], rel=1e-5)


def test_the_authors_weights_are_clipped_at_1000_before_they_are_normalised() -> None:
    clipped = [min(1000.0, math.exp(60 * mean)) for mean in means()]
    assert max(clipped) == 1000 and min(clipped) < 1
    assert weights("authors", FineTuning(k=60)) == pytest.approx(clipped, rel=1e-4)
    average = sum(clipped) / 3
    normal = weights("authors", FineTuning(k=60, normalize=True))
    assert normal == pytest.approx([weight / average for weight in clipped], rel=1e-4)


@pytest.mark.parametrize(("preset", "low", "high"), [("paper", 0.2, 1.8), ("authors", 0.0, 2.0)])
def test_per_step_weights_are_clipped_ratios(preset: str, low: float, high: float) -> None:
    # 0.2 lies below the ratios of the others.
    wanted = [min(high, max(low, math.exp(x))) for x in LOG_RATIO.tolist()]
    assert weights(preset, FineTuning(), per_step=True) == pytest.approx(wanted, rel=1e-5)
    assert max(wanted) == high


@pytest.mark.parametrize("fraction", [0.5, 0.8])
def test_a_target_ess_is_reached_with_mean_weight_1(fraction: float) -> None:
    weighted = weights("paper", FineTuning(k=1e-3), target_ess=fraction)
    assert sum(weighted) / 3 == pytest.approx(1, rel=1e-5)
    assert sum(weighted) ** 2 / sum(w * w for w in weighted) / 3 == pytest.approx(
        fraction, rel=1e-4
    )


def run(algo: str = "iw-sft-q", seed: int = 0, **options: Any) -> Run:
    name = "hopper-medium-replay-v2"
    return Run(name, algo, seed, Options(**options), name)


def dataset(name: str = "hopper-medium-replay-v2", fingerprint: str = "f00") -> OfflineDataset:
    """Data of which a run's settings need the name and the fingerprint only."""
    return OfflineDataset(TensorDict({}, [0]), name, None, None, "file", fingerprint)


@pytest.fixture
def replay() -> Task:
    data = dataset()
    return Task(data, data)


def test_a_shortened_run_warms_up_for_the_same_share() -> None:
    schedule = run(steps=450).schedule
    assert (schedule.steps, schedule.warmup, schedule.lr) == (450, 30, 1e-4)
    assert run().schedule.warmup == 300


def updates(algo: str, **options: Any) -> tuple[int, int]:
    short = run(algo, **options)
    return short.updates, short.published_updates


def test_a_run_knows_its_updates_and_the_published_number() -> None:
    assert updates(algo="bc", steps=450) == (450, 10_000)
    assert updates(algo="bc") == (10_000, 10_000)
    assert updates(algo="sft-q") == (4500, 4500)
    assert updates(algo="iql", steps=7) == (7, 1_000_000)


def test_the_folder_says_what_the_run_is() -> None:
    wanted = Path("runs/d4rl/hopper-medium-replay-v2/iw-sft-q/seed-3")
    assert run(seed=3).folder == wanted


@pytest.mark.parametrize(
    "other",
    [
        {"seed": 1},
        {"preset": "authors"},
        {"estimator": "trajectories"},
        {"algo": "sft-q"},
        {"algo": "iql"},
        {"steps": 4501},
        {"reference_steps": 9_999},
        {"temperature": 2.0},
        {"target_ess": 0.5},
        {"q": "auto"},
        {"ties": "rank"},
        {"top": 5.0},
        {"policy": "mixture"},
    ],
)
def test_whatever_changes_the_numbers_is_in_the_settings(
    replay: Task, other: dict[str, Any]
) -> None:
    assert settings_of(run(**other), replay) != settings_of(run(), replay)


def test_data_that_come_before_are_in_the_settings(replay: Task) -> None:
    after = Task(replay.dataset, dataset("a", "f01"))
    assert settings_of(run(), after) != settings_of(run(), replay)
    assert reference_settings_of(run(), after)["data"] == "f01"
    assert settings_of(run(), after)["data"] == "f00"


@pytest.mark.parametrize(
    "other", [{"device": "cuda"}, {"out": Path("elsewhere")}, {"resume": True}]
)
def test_whatever_does_not_is_not(replay: Task, other: dict[str, Any]) -> None:
    assert settings_of(run(**other), replay) == settings_of(run(), replay)


@pytest.mark.parametrize("algo", ["sft-q", "iw-sft-step", "bc-10", "iql"])
@pytest.mark.parametrize("other", [{"temperature": 2.0}, {"target_ess": 0.5}, {"q": "auto"}])
def test_the_weights_settings_are_not_in_those_of_runs_without_them(
    replay: Task, algo: str, other: dict[str, Any]
) -> None:
    assert settings_of(run(algo=algo, **other), replay) == settings_of(run(algo=algo), replay)


def test_returns_as_weights_are_standard_deviations_above_their_mean() -> None:
    returns = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    # Mean 3, variance 14 / 3.
    expected = torch.tensor([-2.0, -1.0, 3.0], dtype=torch.float64) / math.sqrt(14 / 3)
    torch.testing.assert_close(weigh_returns(returns), expected)


@pytest.mark.parametrize(("value", "count"), [(0.0, 4), (0.1, 3), (1000.7, 187), (0.1, 1)])
def test_equal_returns_tell_nothing(value: float, count: int) -> None:
    """Also where the mean of equal numbers is not that number, by rounding."""
    with pytest.raises(ValueError, match=f"all {count} returns are equal"):
        weigh_returns(torch.full((count,), value, dtype=torch.float64))


def test_a_share_of_the_data_and_its_bins() -> None:
    assert run(algo="bc-5").algorithm.cuts == (95.0,)
    assert run(algo="bc-2.5").algorithm.cuts == (97.5,)
    assert run(algo="sft", top=5.0).algorithm.cuts == (95.0,)
    # The finer bins keep their share of the coarsest: half of it, and a fifth.
    assert run(algo="iw-sft-q", top=5.0).algorithm.cuts == (95.0, 97.5, 99.0)
    assert run(algo="iw-sft-q", top=10.0).algorithm.cuts == run(algo="iw-sft-q").algorithm.cuts
    assert run(algo="bc", top=5.0).algorithm.cuts == ()
    with pytest.raises(ValueError, match="bc-100"):
        _ = run(algo="bc-100").algorithm.cuts


def data_of(name: str, source: str, env_id: str | None) -> OfflineDataset:
    return OfflineDataset(TensorDict({}, []), name, env_id, None, source, "")


@pytest.mark.parametrize("entry", CATALOG.values(), ids=lambda entry: entry.name)
def test_a_file_of_d4rl_has_d4rls_settings(entry: Entry) -> None:
    path = f"/somewhere/{entry.filename}"
    assert name_in_tables(data_of(Path(path).stem, path, entry.env_id)) == entry.name


@pytest.mark.parametrize(
    ("name", "env_id", "expected"),
    [
        ("mine", "Hopper-v4", "hopper"),
        # The name of a file decides nothing: neither the kind of its data nor the environment.
        ("expert notes", "Hopper-v5", "hopper"),
        ("hopper-expert", "Hopper-v4", "hopper"),
        ("hopper-medium-replay-v2", "Walker2d-v4", "walker2d"),
        ("hopper-like", "module:Level-v0", "level"),
        ("big", "AntMaze_Large-v4", "antmaze"),
        ("hopper-medium-v2+hopper-expert-v2", "Hopper-v4", "hopper-medium-v2+hopper-expert-v2"),
        ("hopper-medium-v2+expert", "Hopper-v4", "hopper"),
    ],
)
def test_other_data_have_the_settings_of_their_environment(
    name: str, env_id: str, expected: str
) -> None:
    assert name_in_tables(data_of(name, f"{name}.hdf5", env_id)) == expected


@pytest.mark.parametrize("algo", ["sft", "iw-sft-q", "td3-bc", "cql"])
def test_a_file_can_have_the_settings_of_a_dataset(algo: str) -> None:
    chosen = Options(settings_of="hopper-medium-expert-v2")
    mine = Run("mine", algo, 0, chosen, "mine.hdf5", "hopper")
    theirs = Run("hopper-medium-expert-v2", algo, 0, Options(), "hopper-medium-expert-v2")
    family = replace(mine, options=Options())
    if mine.baseline is None:
        assert mine.fine_tuning == theirs.fine_tuning != family.fine_tuning
    else:
        assert mine.baseline_settings == theirs.baseline_settings


def test_settings_of_an_unknown_dataset_are_refused() -> None:
    for algo, name, problem in (
        ("sft", "hopper-medium-expert", r"expert-v2'\? iwsft.datasets.available\(\) lists"),
        ("bc", "hopper-medium-expert-v2", "--settings-of .*bc"),
    ):
        options = Options(algo=(algo,), settings_of=name)
        with pytest.raises(ValueError, match=problem):
            check_options(options, choose_suite(options))


@pytest.mark.parametrize(
    ("name", "env_id"),
    [("hopper-replay", "Hopper-v4"), ("walker2d-medium-expert", "Walker2d-v4")],
)
def test_a_set_of_the_results_has_the_settings_of_the_one_it_resembles(
    name: str, env_id: str
) -> None:
    """A file of a user that has its name does not."""
    expected = f"{name.replace('-replay', '-medium-replay')}-v2"
    assert expected in CATALOG
    assert (
        name_in_tables(data_of(name, f"the set {name} of benchmarks.collect", env_id)) == expected
    )
    assert (
        name_in_tables(data_of(name, f"collected/{name}.hdf5", env_id))
        == env_id.split("-")[0].lower()
    )


def test_defaults_are_those_of_the_docs() -> None:
    standard = Options()
    suite = choose_suite(standard)
    assert (suite.algo, suite.dataset, suite.seeds) == (
        ("iw-sft-q",),
        ("hopper-replay-mini",),
        (0,),
    )
    assert (standard.preset, standard.estimator, standard.ties) == ("paper", "steps", None)
    assert (standard.reference_steps, standard.eval_episodes) == (10_000, 100)
