"""The options of ``iwsft report``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from benchmarks.options import option


@dataclass(frozen=True)
class Options:
    """Tables and figures of the runs below a folder, as one HTML page and as markdown."""

    runs: tyro.conf.Positional[Path]
    """Folder that --out of the runs named."""
    out: Annotated[Path | None, option("PATH", "RUNS/report")] = None
    """Folder of index.html, report.md and its figures."""
