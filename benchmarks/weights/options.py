"""The options of ``iwsft weights``."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.options import check_file, check_folder, check_used, option

RUN = "OUT/d4rl/DATASET/ALGO/seed-K or OUT/llm/RECIPE/ALGO/seed-K"


@dataclass(frozen=True)
class Options:
    """What the importance weights of a policy do: of a run, or of a model and its base."""

    run: Annotated[tyro.conf.Positional[Path | None], option("RUN", "--model and --base")] = None
    """Folder of a run: OUT/d4rl/DATASET/ALGO/seed-K or OUT/llm/RECIPE/ALGO/seed-K."""
    model: Annotated[str | None, option("ID|DIR", "that of the run")] = None
    """Language model that is q."""
    base: Annotated[str | None, option("ID|DIR", "that of the run")] = None
    """Language model that is the reference."""
    data: Annotated[str | None, option("NAME|FILE", "that of the run")] = None
    """Data to weigh: rows of text as for llm, or a dataset as for d4rl."""
    temperatures: Annotated[tuple[float, ...], option("FLOAT [...]")] = (
        *(0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0),
    )
    """Factors k of the log-ratio whose effective sample size is shown."""
    target_ess: Annotated[tuple[float, ...], option("FLOAT [...]")] = (0.7, 0.4, 0.2)
    """Effective sample sizes, as shares of the draws, whose temperature is sought."""
    trust_remote_code: bool = False
    """Run code that comes with --model or --base."""
    out: Annotated[Path | None, option("PATH", "RUN/weights, or runs/weights")] = None
    """Folder of index.html and weights.json."""

    def check(self) -> None:
        """Check what takes no data."""
        models = {"model": self.model, "base": self.base}
        for name, value in models.items():
            check_used(name, value, self.run is None, "with a run, which has its own")
        for model in filter(None, models.values()):
            check_folder(model)
        check_file(self.data or "")
        if self.run is not None and not (self.run / "config.json").is_file():
            raise FileNotFoundError(f"there is no {self.run / 'config.json'}; a run is {RUN}")
        if self.run is None:
            missing = [f"--{name}" for name, value in models.items() if value is None]
            missing += ["--data"] * (self.data is None)
            if missing:
                raise ValueError(f"pass the folder of a run, or {', '.join(missing)} too")
        for k in self.temperatures:
            if not 0 <= k < math.inf:
                raise ValueError(f"--temperatures {k}: finite numbers that are not negative")
        for ess in self.target_ess:
            if not 0 < ess <= 1:
                raise ValueError(f"--target-ess {ess}: a share of the draws, above 0, at most 1")

    @property
    def folder(self) -> Path:
        """Folder of the page."""
        return self.out or (self.run or Path("runs")) / "weights"
