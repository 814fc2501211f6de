"""How many ways to act the curated trajectories of a dataset hold, measured on the data alone.

python -m scripts.curated_modes NAME|FILE ... [--out FILE]

Policies are trained on the quality bins of SFT(Q), without a quarter of the trajectories, which
score them. Prints for each dataset:

- mixture_gain: what a mixture adds to the held-out log-likelihood of a step under one Gaussian,
  mean over splits, with its interval;
- disagreement, of the curated set and of all data: the squared distance of actions at near states
  of two trajectories, over twice the variance of the actions. 0 means that the state decides the
  action, 1 that it says nothing;
- spread: the deviation of the curated returns, over that of all returns.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.spatial import cKDTree
from tensordict import TensorDictBase
from torchrl.modules import ProbabilisticActor

from benchmarks.d4rl.options import QUALITY_BINS
from benchmarks.d4rl.run import sizes
from benchmarks.results import as_records
from benchmarks.statistics import t_interval
from iwsft import GaussianPolicy, ImportanceWeightedMLE, MixturePolicy, curate, datasets
from iwsft.diagnostics import weighted_mean
from iwsft.files import write
from iwsft.samplers import StepSampler
from iwsft.training import Probe, Row, Schedule, fit
from iwsft.trajectory import (
    ACTION,
    MULTIPLICITY,
    OBSERVATION,
    STANDARD_SCORE,
    lengths,
    select,
)

FORMS: dict[str, Callable[[int, int], ProbabilisticActor]] = {
    # With the std that the mixture starts at.
    "gaussian": lambda *sizes: GaussianPolicy(*sizes, log_std_init=-1.0),
    "mixture": MixturePolicy,
}
SPLITS, UPDATES, LOOKS = 3, 1_000, 10
STEPS, POOL, NEIGHBOURS = 2_000, 20_000, 5


def held_out(form: str, train: TensorDictBase, test: TensorDictBase, seed: int) -> float:
    """Mean log-likelihood of held-out trajectories, at the update where it is largest."""
    torch.manual_seed(seed)
    policy = FORMS[form](*sizes(train))
    loss = ImportanceWeightedMLE(policy, proposal="reference")
    scores: list[float] = []

    def look(_: TensorDictBase) -> Row:
        with torch.no_grad():
            terms = loss.terms(test)
        scores.append(float(weighted_mean(terms.log_prob, torch.ones(()), terms.share)))
        return {}

    schedule = Schedule(UPDATES, lr=3e-3)
    fit(loss, StepSampler(train, 256, seed=seed), schedule, probes=[Probe(UPDATES // LOOKS, look)])
    return max(scores)


def disagreement(data: TensorDictBase, seed: int) -> float:
    """Squared distance of actions at near states of other trajectories, over twice the variance."""
    rng = np.random.default_rng(seed)
    observation, action = (data.get(key).double().numpy() for key in (OBSERVATION, ACTION))
    count = lengths(data).numpy()
    trajectory = np.repeat(np.arange(len(count)), count)
    scaled = (observation - observation.mean(0)) / (observation.std(0) + 1e-8)
    half = rng.permutation(len(count)) % 2 == 0
    squares = []
    for side in (True, False):
        # Neighbours are of the other half of the trajectories.
        ours, theirs = (np.flatnonzero(half[trajectory] == each) for each in (side, not side))
        ours, theirs = rng.permutation(ours)[:STEPS], rng.permutation(theirs)[:POOL]
        _, near = cKDTree(scaled[theirs]).query(scaled[ours], k=NEIGHBOURS)
        squares.append(((action[ours][:, None] - action[theirs][near]) ** 2).mean(1))
    return float((np.concatenate(squares).mean(0) / (2 * action.var(0))).mean())


def measure(source: str) -> dict[str, object]:
    """The measures of a dataset."""
    data = datasets.load(source, scale_actions=True)
    best = curate(data.trajectories, cuts=QUALITY_BINS, ties="rank")
    count, gains = len(lengths(best)), []
    for seed in range(SPLITS):
        order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
        test, train = (part.sort()[0] for part in order.tensor_split([-(-count // 4)]))
        parts = select(best, train), select(best, test)
        log_prob = {form: held_out(form, *parts, seed) for form in FORMS}
        gains.append(log_prob["mixture"] - log_prob["gaussian"])
    return {
        "dataset": data.name,
        "fingerprint": data.fingerprint,
        "trajectories": count,
        "steps": int(lengths(best).sum()),
        "mixture_gain": [float(np.mean(gains)), *map(float, t_interval(gains))],
        "disagreement": float(np.mean([disagreement(best, seed) for seed in range(SPLITS)])),
        "disagreement_of_all": disagreement(data.trajectories, 0),
        "spread": spread(best),
    }


def spread(best: TensorDictBase) -> float:
    """Deviation of the standard scores of the trajectories, counted by multiplicity."""
    last = lengths(best).cumsum(0) - 1
    score, count = (
        best.get(key).flatten()[last].double() for key in (STANDARD_SCORE, MULTIPLICITY)
    )
    mean = (count * score).sum() / count.sum()
    return float(((count * (score - mean) ** 2).sum() / count.sum()).sqrt())


def main() -> None:
    """Measure each dataset, print a line for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    records = []
    for source in arguments.sources:
        records.append(measure(source))
        print(json.dumps(records[-1]), flush=True)
    if arguments.out:
        write(arguments.out, as_records(records))


if __name__ == "__main__":
    main()
