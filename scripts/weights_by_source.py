"""Which of the policies that made a dataset the weights of runs favour.

    python -m scripts.weights_by_source RUN ... [--out FILE]

Each RUN is the folder of a finished run of control with weights, on a file of ``iwsft collect``
that several policies made. Prints for each dataset and algorithm, and for each policy that the
curated set holds trajectories of:

- trajectories: how many of them there are, and noise: the standard deviation of its actions' noise;
- return: the mean return of its trajectories, over the draws;
- draws: the share of the draws of the curated set that are its trajectories;
- weights, by seed: the share of the total weight that they have, with q at the end of the run.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from benchmarks.results import as_records
from benchmarks.weights.control import of_run
from benchmarks.weights.options import Options
from benchmarks.weights.source import Source, read_run
from iwsft.files import write
from iwsft.samplers import multiplicities
from iwsft.trajectory import REWARD, TRAJ_IDS, Segments, lengths

Numbers = NDArray[np.float64]


def share(amounts: Numbers, source: NDArray[np.int64], number: int) -> Numbers:
    """The share of non-negative amounts ``[n]`` that each of ``number`` sources has ``[number]``.

    ``source`` has the source of each amount.
    """
    return np.bincount(source, amounts, minlength=number) / amounts.sum()


def _of_trajectories(source: Source) -> tuple[NDArray[np.int64], Numbers, Numbers, Numbers]:
    """Id, multiplicity, weight and return of each curated trajectory."""
    data, loss = source.trajectories, source.make_loss(source.chain)
    sizes = lengths(data)
    first = sizes.cumsum(0) - sizes
    weight = loss.weigh(data, source.log_q).log_weight[first].double().exp()
    returns = Segments.of(data).sum(data.get(REWARD).squeeze(-1))[: len(sizes)].double()
    counts = multiplicities(data, sizes).double()
    ids = data.get(TRAJ_IDS)[first]
    return ids.numpy(), counts.numpy(), weight.detach().numpy(), returns.numpy()


def measure(runs: list[Path]) -> list[dict[str, Any]]:
    """The record of each dataset and algorithm of the runs."""
    records: dict[tuple[str, str], dict[str, Any]] = {}
    for run in runs:
        config, out = read_run(run)
        (path,) = config["options"]["dataset"]
        with h5py.File(path) as file:
            policies = json.loads(file.attrs["sources"])
        # Ids count the episodes of the file, which has those of one policy after the other.
        last = np.cumsum([policy["episodes"] for policy in policies])
        ids, counts, weight, returns = _of_trajectories(of_run(Options(), run, config, out))
        source, number = np.searchsorted(last, ids, side="right"), len(policies)
        draws, shares = share(counts, source, number), share(counts * weight, source, number)
        algo = "/".join(filter(None, (config["options"].get("variant"), config["algo"])))
        record = records.setdefault(
            (config["dataset"], algo),
            {
                "dataset": config["dataset"],
                "algo": algo,
                "fingerprint": config["settings"]["data"],
                "seeds": [],
                "sources": [
                    {
                        "policy": Path(policy["policy"]).stem,
                        "noise": policy["noise"],
                        "trajectories": int((source == at).sum()),
                        "return": float(
                            np.average(returns[source == at], weights=counts[source == at])
                        ),
                        "draws": float(draws[at]),
                        "weights": [],
                    }
                    for at, policy in enumerate(policies)
                    if draws[at] > 0
                ],
            },
        )
        if config["seed"] in record["seeds"]:
            raise ValueError(f"{run}: there are two runs of this seed")
        record["seeds"].append(config["seed"])
        for row, each in zip(record["sources"], shares[draws > 0], strict=True):
            row["weights"].append(float(each))
    return list(records.values())


def main() -> None:
    """Measure the runs, and print a line for each dataset and algorithm."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    records = measure(arguments.runs)
    for record in records:
        print(json.dumps(record))
    if arguments.out:
        write(arguments.out, as_records(records))


if __name__ == "__main__":
    main()
