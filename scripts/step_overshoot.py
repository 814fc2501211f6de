"""What weights of single steps do to a policy: they mirror the errors of the reference, and more.

    python -m scripts.step_overshoot RUNS NAME|FILE ... --seeds INT ... [--out FILE]

RUNS holds finished runs of bc (the reference), sft, iw-sft and iw-sft-step. Let b, f and w be the
mean actions of bc, sft and a weighted policy on the curated states, in standard deviations of SFT's
policy. Prints for each dataset:

- spread, by algorithm: variance of its mean actions over the seeds, mean over states and actions;
- inherited, by algorithm and seed: slope of its deviation from its mean over the seeds on that of
  b. It is the share of the reference's own errors that the policy has;
- slope, by weighted algorithm and seed: c of the least squares fit w - f = c (f - b);
- farther, by seed: share of the states where w of iw-sft-step is farther from b than f is;
- scores, by algorithm and seed. "added" is the policy f + c (f - b), and "removed" the policy
  w - c (f - b), with the seed's own c of iw-sft-step.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor

from benchmarks.d4rl.options import TOP_10
from benchmarks.d4rl.settings import TIES
from benchmarks.results import as_records
from benchmarks.runs import RESULT
from iwsft import curate, datasets, load_policy
from iwsft.files import write
from iwsft.trained_policy import TrainedPolicy
from iwsft.trajectory import ACTION, OBSERVATION

STATES, EPISODES = 20_000, 100
BEFORE, FITTED, WEIGHTED, PER_STEP = "bc", "sft", "iw-sft", "iw-sft-step"
ALGORITHMS = (BEFORE, FITTED, WEIGHTED, PER_STEP)


def overshoot(before: Tensor, fitted: Tensor, weighted: Tensor) -> float:
    """Slope, without a constant, of weighted - fitted on fitted - before."""
    way = fitted - before
    return float((way * (weighted - fitted)).sum() / way.square().sum())


def spread(means: Tensor) -> float:
    """Variance over the first axis ``[seeds, ...]``, mean over all others."""
    return float(means.var(0).mean())


def inherited(before: Tensor, after: Tensor) -> list[float]:
    """Slope of each seed's deviation of ``after`` from its mean over seeds on that of ``before``.

    Both are ``[seeds, ...]``.
    """
    error, left = ((means - means.mean(0)).flatten(1) for means in (before, after))
    return ((error * left).sum(1) / error.square().sum(1)).tolist()


def mean_action(policy: TrainedPolicy, states: Tensor) -> Tensor:
    """Means of a Gaussian policy ``[n, act]``."""
    return _distribution(policy, states).mean.detach()


def _distribution(policy: TrainedPolicy, states: Tensor) -> Any:
    return policy.module.get_dist(TensorDict({OBSERVATION: states}, len(states)))


def score(policies: dict[str, TrainedPolicy], start: str, factor: float, seed: int) -> float:
    """Score of the means of a policy, moved by a factor of f - b."""

    def act(observation: Tensor) -> Tensor:
        b, f, own = (mean_action(policies[algo], observation) for algo in (BEFORE, FITTED, start))
        return own + factor * (f - b)

    moved, known = TensorDictModule(act, [OBSERVATION], [ACTION]), policies[start]
    policy = TrainedPolicy(moved, known.env_id, known.env_kwargs, known.reference_scores)
    result = policy.evaluate(episodes=EPISODES, seed=seed, device="cpu").score
    if result is None:
        raise ValueError(f"{known.env_id} has no normalised score")
    return result


def measure(runs: Path, source: str, seeds: list[int]) -> dict[str, Any]:
    """The measures of a dataset, from the runs of these seeds."""
    data = datasets.load(source, scale_actions=True)
    states = curate(data.trajectories, cuts=TOP_10, ties=TIES["paper"]).get(OBSERVATION)
    order = torch.randperm(len(states), generator=torch.Generator().manual_seed(0))
    states, root = states[order[:STATES]], runs / "d4rl" / data.name
    means: dict[str, list[Tensor]] = {algo: [] for algo in ALGORITHMS}
    scores: dict[str, list[float]] = {algo: [] for algo in (*ALGORITHMS, "added", "removed")}
    slopes: dict[str, list[float]] = {algo: [] for algo in (WEIGHTED, PER_STEP)}
    for seed in seeds:
        folders = {algo: root / algo / f"seed-{seed}" for algo in ALGORITHMS}
        policies = {algo: load_policy(folder) for algo, folder in folders.items()}
        deviation = _distribution(policies[FITTED], states[:1]).stddev.detach()
        for algo, folder in folders.items():
            means[algo].append(mean_action(policies[algo], states) / deviation)
            scores[algo].append(json.loads((folder / RESULT).read_text())["normalized_score"])
        for algo, slope in slopes.items():
            slope.append(overshoot(*(means[each][-1] for each in (BEFORE, FITTED, algo))))
        factor = slopes[PER_STEP][-1]
        scores["added"].append(score(policies, FITTED, factor, seed))
        scores["removed"].append(score(policies, PER_STEP, -factor, seed))
        last = {name: round(values[-1], 1) for name, values in scores.items()}
        print(
            f"{data.name}, seed {seed}: c {factor:.3f}, scores {last}", file=sys.stderr, flush=True
        )
    of_seeds = {algo: torch.stack(values) for algo, values in means.items()}
    b, f, w = (of_seeds[algo] for algo in (BEFORE, FITTED, PER_STEP))
    farther = (w - b).norm(dim=-1) > (f - b).norm(dim=-1)
    return {
        "dataset": data.name,
        "fingerprint": data.fingerprint,
        "seeds": seeds,
        "spread": {algo: spread(each) for algo, each in of_seeds.items()},
        "inherited": {algo: inherited(b, of_seeds[algo]) for algo in ALGORITHMS[1:]},
        "slope": slopes,
        "farther": farther.double().mean(1).tolist(),
        "scores": scores,
    }


def main() -> None:
    """Measure each dataset, print a line for it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path)
    parser.add_argument("sources", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    records = []
    for source in arguments.sources:
        records.append(measure(arguments.runs, source, arguments.seeds))
        print(json.dumps(records[-1]), flush=True)
    if arguments.out:
        write(arguments.out, as_records(records))


if __name__ == "__main__":
    main()
