"""The options of ``iwsft speed``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from benchmarks.device import check_device
from benchmarks.options import check_at_least, option


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to measure, and how thoroughly."""

    repeats: int = 3
    """Repeats of each way, in turn; the median counts."""
    scale: Literal["paper", "small", "large"] = "paper"
    """Sizes of the paper, small ones that only show that everything runs, or large ones (scaling
    only)."""
    device: str = "cuda"
    """Device of the subject gpu; cpu only shows that everything runs. The others take the cpu."""
    seed: int = 0
    """Seed of data, parameters and samplers."""
    subject: tyro.conf.Positional[Literal["control", "baselines", "language", "scaling", "gpu"]]
    """Part of the library whose speed is measured."""
    json: Annotated[Path | None, option("FILE", "no file")] = None
    """File for the rows, versions, hardware and settings."""

    def __post_init__(self) -> None:
        check_at_least(1, repeats=self.repeats)
        if self.subject == "gpu":
            check_device(self.device)
        if self.scale == "large" and self.subject != "scaling":
            raise ValueError(f"--scale large is for scaling; {self.subject} has paper and small")
