"""Program that test_job_processes starts in several processes: the command, with a small recipe."""

from __future__ import annotations

import sys

from benchmarks.llm.__main__ import main
from benchmarks.llm.recipes import RECIPES

if __name__ == "__main__":
    RECIPES["small"] = "small_job"
    main(sys.argv[1:])
