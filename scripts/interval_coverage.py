"""How often the reports' 95 % intervals hold the truth, for few seeds and scores of many shapes.

python scripts/interval_coverage.py

Prints the table of docs/results.md: the share of simulated sets of seeds whose interval holds the
true value. The first part is Student's interval of one dataset's mean, the second the intervals of
the aggregates over five datasets of different means and deviations. The probability of
improvement is that of runs which are better by half a deviation.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from benchmarks import statistics
from benchmarks.statistics import bootstrap_interval, shift_interval, t_interval

Array = NDArray[np.float64]
SEEDS = (3, 5, 10)
SETS, SETS_OVER_DATASETS = 20_000, 1_000
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
    "median": statistics.median,
    "optimality gap": statistics.optimality_gap,
}


def groups(share: float, size: tuple[int, ...]) -> Array:
    """A share of the scores near 70, the others near 30, each with a deviation of 5."""
    return np.where(generator.random(size) < share, 70.0, 30.0) + generator.normal(0, 5, size)


def holds(interval: tuple[Array, Array], truth: float) -> float:
    """The share of the intervals that hold the truth."""
    low, high = interval
    return float(((low <= truth) & (truth <= high)).mean())


def over_datasets(shape: str, seeds: int) -> dict[str, float]:
    """Coverage of the aggregates' intervals over five datasets."""
    draw, mean = SHAPES[shape]
    deviation = draw((200_000,)).std()

    def runs(sets: int, gain: float = 0.0) -> Array:
        standard = (draw((sets, seeds, len(MEANS))) - mean) / deviation
        return MEANS + DEVIATIONS * (standard + gain)

    better = statistics.probability_of_improvement
    truths = {name: float(metric(runs(20_000)).mean()) for name, metric in METRICS.items()}
    truth = float(better(runs(20_000, 0.5), runs(20_000)).mean())
    counts = dict.fromkeys([*METRICS, "improvement"], 0)
    for x, y in zip(runs(SETS_OVER_DATASETS, 0.5), runs(SETS_OVER_DATASETS), strict=True):
        for name, metric in METRICS.items():
            _, low, high = shift_interval(metric, y, generator=generator)
            counts[name] += low <= truths[name] <= high
        _, low, high = shift_interval(better, x, y, generator=generator)
        counts["improvement"] += low <= truth <= high
    return {name: count / SETS_OVER_DATASETS for name, count in counts.items()}


def main() -> None:
    """Print both parts."""
    print("One dataset: Student's t (percentile bootstrap), by the number of seeds")
    for shape, (draw, mean) in SHAPES.items():
        cells = []
        for seeds in SEEDS:
            ours = holds(t_interval(draw((seeds, SETS))), mean)
            cells.append(
                f"{ours:6.1%} ({holds(bootstrap_interval(draw((seeds, 200))), mean):4.0%})"
            )
        print(f"{shape:<42} {'  '.join(cells)}", flush=True)
    print("\nAggregates over five datasets, by the number of seeds")
    for shape in SHAPES:
        for seeds in SEEDS:
            parts = [f"{name} {share:.1%}" for name, share in over_datasets(shape, seeds).items()]
            print(f"{shape:<42} {seeds:>2}  {', '.join(parts)}", flush=True)


if __name__ == "__main__":
    main()
