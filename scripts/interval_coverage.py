"""How often the reports' 95 % intervals hold the truth, for few seeds and scores of many shapes.

python scripts/interval_coverage.py

Prints the tables of docs/results.md: the share of simulated sets of seeds, or of questions, whose
interval holds the true value. The aggregates are over five datasets of different means and
deviations. The differences are those of two algorithms on one dataset, of the same deviation or of
deviations 1 : 3, whose scores of a seed are correlated. Last, how often --q auto takes weights
where returns are noise (docs/algorithm.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks import statistics
from benchmarks.statistics import Estimate, interval_over_questions, t_interval
from iwsft.lower_bound import LowerBound

Array = NDArray[np.float64]
SEEDS = (3, 5, 10)
SETS, SETS_OVER_DATASETS = 20_000, 4_000
# Means and deviations of the five datasets, as shares of D4RL's expert.
MEANS, DEVIATIONS = np.array([0.3, 0.5, 0.6, 0.9, 0.05]), np.array([0.1, 0.2, 0.05, 0.1, 0.02])
generator = np.random.default_rng(0)
# Scores of a shape, and their mean.
SHAPES: dict[str, tuple[Callable[[tuple[int, ...]], Array], float]] = {
    "normal (50, deviation 10)": (lambda size: generator.normal(50, 10, size), 50.0),
    "uniform in 0 ... 100": (lambda size: generator.uniform(0, 100, size), 50.0),
    "bounded, most near 100: 100 Beta(2, 0.5)": (
        lambda size: 100 * generator.beta(2, 0.5, size),
        80,
    ),
    "skewed: 20 + exponential of mean 10": (
        lambda size: 20 + generator.exponential(10, size),
        30.0,
    ),
    "very skewed: log-normal": (lambda size: generator.lognormal(0, 1, size), np.exp(0.5)),
    "two groups, 1 : 1, at 30 and 70": (lambda size: groups(0.5, size), 50.0),
    "two groups, 1 : 4, at 70 and 30": (lambda size: groups(0.2, size), 38.0),
}
METRICS = {
    "IQM": statistics.interquartile_mean,
    "mean": statistics.mean,
    "optimality gap": statistics.optimality_gap,
}
CORRELATIONS = (0.0, 0.3, 0.6, 0.9, -0.3)
# Beta distributions of the share of a question's answers that are right.
QUESTIONS = {"any share": (1, 1), "0 or 1": (0.3, 0.3), "all half": (20, 20), "hard": (0.2, 2)}


def groups(share: float, size: tuple[int, ...]) -> Array:
    """A share of the scores near 70, the others near 30, each with a deviation of 5."""
    return np.where(generator.random(size) < share, 70.0, 30.0) + generator.normal(0, 5, size)


def coverage(intervals: Iterable[Any], truth: float) -> float:
    """The share of the intervals that hold the truth; without an interval it is not held."""
    held = [
        low is not None and high is not None and low <= truth <= high for low, high in intervals
    ]
    return float(np.mean(held))


def over_datasets(shape: str, seeds: int) -> dict[str, float]:
    """Coverage of the aggregates' intervals over five datasets."""
    draw, mean = SHAPES[shape]
    deviation = draw((200_000,)).std()

    def share(metric: Callable[[Array], Estimate]) -> float:
        """Coverage in the first sets, of the mean of all as the truth."""
        standard = (draw((3 * SETS_OVER_DATASETS, seeds, len(MEANS))) - mean) / deviation
        estimates = [metric(scores) for scores in MEANS + DEVIATIONS * standard]
        truth = float(np.mean([estimate.point for estimate in estimates]))
        return coverage((each[1:] for each in estimates[:SETS_OVER_DATASETS]), truth)

    return {name: share(metric) for name, metric in METRICS.items()}


def of_differences(correlation: float, ratio: float, seeds: int) -> str:
    """Coverage and mean width of the paired and of Welch's interval, in deviations."""
    x, noise = generator.normal(size=(2, SETS_OVER_DATASETS, seeds, 1))
    y = ratio * (correlation * x + np.sqrt(1 - correlation**2) * noise)
    parts = []
    for paired in (True, False):
        pairs = zip(x, y, strict=True)
        ends = [statistics.difference(a, b, paired=paired).estimate[1:] for a, b in pairs]
        width = np.mean(np.diff(np.array(ends, np.float64)))
        parts.append(f"{'paired' if paired else 'Welch'} {coverage(ends, 0.0):.1%} ({width:.2f})")
    return ", ".join(parts)


def over_questions(name: str, questions: int, answers: int) -> float:
    """Coverage of the interval of the mean share of right answers."""
    a, b = QUESTIONS[name]
    chances = generator.beta(a, b, (SETS_OVER_DATASETS, questions))
    shares = generator.binomial(answers, chances) / answers
    return coverage((interval_over_questions(each, answers) for each in shares), a / (a + b))


def false_choices(trajectories: int) -> float:
    """How often LowerBound chooses weights where returns tell nothing."""
    choose, share = LowerBound(), torch.ones(trajectories, dtype=torch.float64)
    log_weight, score = torch.from_numpy(generator.normal(size=(2, 2_000, trajectories)))
    choices = [choose(0.02 * x, share, z)[1] for x, z in zip(log_weight, score, strict=True)]
    return float(np.mean([float(choice.exponent) > 0 for choice in choices]))


def main() -> None:
    """Print the five parts."""
    print("One dataset: Student's t, by the number of seeds")
    for shape, (draw, mean) in SHAPES.items():
        sets = [np.transpose(t_interval(draw((seeds, SETS)))) for seeds in SEEDS]
        print(f"{shape:<42} {'  '.join(f'{coverage(ends, mean):6.1%}' for ends in sets)}")
    print("\nAggregates over five datasets, by the number of seeds")
    for shape in SHAPES:
        for seeds in SEEDS:
            parts = [f"{name} {share:.1%}" for name, share in over_datasets(shape, seeds).items()]
            print(f"{shape:<42} {seeds:>2}  {', '.join(parts)}", flush=True)
    print("\nDifferences on one dataset (mean width), by correlation, deviations, seeds")
    for correlation in CORRELATIONS:
        for ratio in (1, 3):
            for seeds in SEEDS:
                name = f"{correlation:>4} 1:{ratio} {seeds:>2}"
                print(f"{name}  {of_differences(correlation, ratio, seeds)}", flush=True)
    print("\nShare of right answers, by the number of questions and of answers to each")
    for name in QUESTIONS:
        for questions in (10, 30, 200):
            shares = [over_questions(name, questions, answers) for answers in (1, 4, 64)]
            print(f"{name:<42} {questions:>3}  {'  '.join(f'{share:.1%}' for share in shares)}")
    print("\nSets on which --q auto takes weights although returns are noise, by trajectories")
    for trajectories in (10, 20, 50, 150):
        print(f"{trajectories:>4}  {false_choices(trajectories):.1%}")


if __name__ == "__main__":
    main()
