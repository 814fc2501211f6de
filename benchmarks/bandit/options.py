"""The options of ``python -m benchmarks.bandit``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from benchmarks.options import check_at_least


@dataclass(frozen=True)
class Options:
    """Train SFT and iw-SFT on the successes of a uniform policy; plot their mean rewards."""

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
        check_at_least(1, seeds=self.seeds, pulls=self.pulls, steps=self.steps)
        if not 0 < self.lr < math.inf:
            raise ValueError(f"--lr {self.lr}: a finite number above 0")
