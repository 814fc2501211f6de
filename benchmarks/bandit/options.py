"""The options of ``iwsft bandit``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from benchmarks.llm.options import ALGORITHMS
from benchmarks.options import check_at_least, check_known, check_once

# Rewards are 0 and 1, so successes have no quality; both arms have the same entropy.
METHODS = tuple(
    name
    for name, method in ALGORITHMS.items()
    if not (method.quality or method.by_score or method.related == "eaft")
)


@dataclass(frozen=True)
class Options:
    """Train methods on the pulls of a policy, most on its successes; plot their mean rewards."""

    algo: tuple[str, ...] = ("sft", "iw-sft")
    """Methods, by their names in the language job."""
    right: float = 0.5
    """P(right) of pi_ref, which pulls D, and which training starts at."""
    seeds: int = 5
    """Number of datasets D, each drawn by pi_ref with a seed of its own."""
    pulls: int = 1000
    """Pulls in D."""
    steps: int = 200
    """Updates, each on all of D+."""
    lr: float = 1.0
    """Step size of gradient descent."""
    out: Path = Path("runs/bandit")
    """Folder for bandit.png and bandit.json."""

    def __post_init__(self) -> None:
        for name in self.algo:
            check_known("algorithm", name, METHODS)
        check_once(algo=self.algo)
        if not 0 < self.right < 1:
            raise ValueError(f"--right {self.right}: above 0 and below 1")
        check_at_least(1, seeds=self.seeds, pulls=self.pulls, steps=self.steps)
        if not 0 < self.lr < math.inf:
            raise ValueError(f"--lr {self.lr}: a finite number above 0")
