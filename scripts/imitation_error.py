"""How far trained policies act from the noise-free actions of the policies that made their data.

    python -m scripts.imitation_error RUN ... [--factors FLOAT ...] [--out FILE]

Each RUN is the folder of a finished run of control, on a file of ``iwsft collect`` that policies of
``benchmarks/collect/policies`` made. At a state of the curated set, let f be the action of the
trained policy, and g the mean action of the policy that made the trajectory, without noise. Prints
for each dataset and algorithm, by seed:

- error: |f - g|^2, mean over the states;
- slope: least-squares slope, without a constant, of f on g. Below 1 the policy acts more weakly;
- noise, noise_slope: the same two of the data's own actions in place of f;
- score: that of the run, and of its policy with all actions multiplied by each factor.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from numpy.typing import NDArray
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor

from benchmarks.collect import policy_file
from benchmarks.d4rl.options import TOP_10
from benchmarks.d4rl.settings import TIES
from benchmarks.results import as_records
from benchmarks.runs import RESULT
from benchmarks.weights.source import read_run
from iwsft import curate, datasets, load_policy
from iwsft.files import write
from iwsft.trained_policy import TrainedPolicy
from iwsft.trajectory import ACTION, OBSERVATION, TRAJ_IDS

POLICIES = Path(policy_file.__file__).parent / "policies"
STATES, EPISODES = 20_000, 100
Numbers = NDArray[np.float32]


def of_actions(actions: Numbers, noise_free: Numbers) -> tuple[float, float]:
    """Error and slope of actions ``[n, act]``, see the module."""
    own, wanted = actions.astype(np.float64), noise_free.astype(np.float64)
    error = np.square(own - wanted).sum(1).mean()
    return float(error), float((own * wanted).sum() / np.square(wanted).sum())


def scaled_score(policy: TrainedPolicy, factor: float, seed: int) -> float:
    """Score of a policy with all actions multiplied by a factor, on the episodes of its run."""

    def act(observation: Tensor) -> Tensor:
        rows = TensorDict({OBSERVATION: observation}, observation.shape[:-1])
        return factor * policy.module(rows)[ACTION]

    module = TensorDictModule(act, [OBSERVATION], [ACTION])
    result = replace(policy, module=module).evaluate(episodes=EPISODES, seed=seed, device="cpu")
    if result.score is None:
        raise ValueError(f"{policy.env_id} has no normalised score")
    return result.score


def noise_free_actions(path: Path) -> tuple[Numbers, Numbers, Numbers]:
    """States, actions, and noise-free actions of a sample of the curated steps ``[n, ...]``."""
    data = curate(datasets.load(str(path)).trajectories, cuts=TOP_10, ties=TIES["paper"])
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    steps = data[order[:STATES]]
    with h5py.File(path) as file:
        policies = json.loads(file.attrs["sources"])
    # Ids count the episodes of the file, which has those of one policy after the other.
    last = np.cumsum([policy["episodes"] for policy in policies])
    source = np.searchsorted(last, steps[TRAJ_IDS].numpy(), side="right")
    states, actions = steps[OBSERVATION], steps[ACTION].numpy()
    wanted = np.empty_like(actions)
    for at in np.unique(source):
        policy = policy_file.ArrayPolicy(dict(np.load(POLICIES / policies[at]["policy"])))
        acted = source == at
        with torch.no_grad():
            means = policy(states[torch.from_numpy(acted)])
        # As an environment cuts them.
        wanted[acted] = means.clamp(-1.0, 1.0).numpy()
    return states.numpy(), actions, wanted


def measure(runs: list[Path], factors: list[float]) -> list[dict[str, Any]]:
    """The record of each dataset and algorithm of the runs."""
    records: dict[tuple[str, str], dict[str, Any]] = {}
    known: dict[str, tuple[Numbers, Numbers, Numbers]] = {}
    for run in runs:
        config, _ = read_run(run)
        (path,) = config["options"]["dataset"]
        if path not in known:
            known[path] = noise_free_actions(Path(path))
        states, actions, wanted = known[path]
        algo = "/".join(filter(None, (config["options"].get("variant"), config["algo"])))
        record = records.setdefault(
            (config["dataset"], algo),
            {
                "dataset": config["dataset"],
                "fingerprint": config["settings"]["data"],
                "algo": algo,
                **dict(zip(("noise", "noise_slope"), of_actions(actions, wanted), strict=True)),
                **{name: [] for name in ("seeds", "error", "slope", "score")},
                "scaled": {f"{factor:g}": [] for factor in factors},
            },
        )
        if config["seed"] in record["seeds"]:
            raise ValueError(f"{run}: there are two runs of this seed")
        policy = load_policy(run)
        error, slope = of_actions(policy.act(states), wanted)
        score = json.loads((run / RESULT).read_text())["normalized_score"]
        for name, value in zip(
            ("seeds", "error", "slope", "score"), (config["seed"], error, slope, score), strict=True
        ):
            record[name].append(value)
        for factor in factors:
            scaled = scaled_score(policy, factor, config["seed"])
            record["scaled"][f"{factor:g}"].append(scaled)
            print(f"{run} times {factor:g}: score {scaled:.1f}", file=sys.stderr, flush=True)
    return list(records.values())


def main() -> None:
    """Measure the runs, and print a line for each dataset and algorithm."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--factors", type=float, nargs="+", default=[])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    records = measure(arguments.runs, arguments.factors)
    for record in records:
        print(json.dumps(record))
    if arguments.out:
        write(arguments.out, as_records(records))


if __name__ == "__main__":
    main()
