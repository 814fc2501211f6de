"""The shares of the policies that made a dataset, on runs whose weights are known."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.d4rl.__main__ import main
from benchmarks.d4rl.options import Options
from iwsft import curate, datasets
from iwsft.datasets.write import Provenance, to_hdf5
from iwsft.trajectory import MULTIPLICITY, TRAJ_IDS, lengths
from scripts.weights_by_source import measure


def test_equal_weights_have_the_shares_of_the_draws(tmp_path: Path) -> None:
    data = datasets.load("hopper-replay-mini").trajectories
    curated = curate(data, cuts=(90, 95, 98), ties="rank")
    first = lengths(curated).cumsum(0) - lengths(curated)
    ids = curated[TRAJ_IDS][first].tolist()
    # As if policies had made the episodes, of which the third begins with a curated one, and the
    # fourth ends with one. The second made none.
    starts = [0, ids[3], ids[3], ids[7] - 1, ids[7] + 1, int(data[TRAJ_IDS].max()) + 1]
    parts = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    sources = [{"policy": f"p{i}.npz", "noise": i / 10, "episodes": n} for i, n in enumerate(parts)]
    file = tmp_path / "hopper.hdf5"
    to_hdf5(file, data, Provenance("Hopper-v4", 0, sources))
    options = Options(
        algo=("iw-sft-q",),
        dataset=(str(file),),
        seeds=(0, 1),
        temperature=0.0,
        steps=4,
        reference_steps=4,
        eval_episodes=1,
        curve_episodes=0,
        out=tmp_path,
        jobs=1,
    )
    main(options)
    runs = [tmp_path / f"d4rl/hopper/iw-sft-q/seed-{seed}" for seed in options.seeds]

    (record,) = measure(runs)
    assert record["seeds"] == [0, 1]
    counts: dict[str, int] = {}
    for identity, count in zip(ids, curated[MULTIPLICITY][first].tolist(), strict=True):
        (source,) = (i for i, start in enumerate(starts[:-1]) if start <= identity < starts[i + 1])
        counts[f"p{source}"] = counts.get(f"p{source}", 0) + count
    assert {row["policy"] for row in record["sources"]} == {*counts}
    for row in record["sources"]:
        assert row["draws"] == pytest.approx(counts[row["policy"]] / sum(counts.values()))
        assert row["weights"] == pytest.approx([row["draws"]] * 2)
