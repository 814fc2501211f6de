"""Peak memory of a job, in a process of its own."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

MB = 1e6


def peak_bytes() -> int:
    """Most memory this process has held resident."""
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss of a child starts at its parent's peak on Linux; this does not.
        lines = status.read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def growth_mb(job: Callable[[], object]) -> float:
    """MB by which ``job`` raises the peak of this process."""
    before = peak_bytes()
    job()
    return (peak_bytes() - before) / MB


def in_child(module: str, arguments: dict[str, object]) -> float:
    """Run ``python -m module ARGUMENTS`` (as JSON) and read the number it prints last.

    Raises:
        OSError: the process failed (out of memory, mostly), with its last words.
    """
    command = [sys.executable, "-m", module, json.dumps(arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        words = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise OSError(f"{module} ended with code {done.returncode}: {words[0]}")
    return float(done.stdout.split()[-1])
