"""Compare the numbers of short runs of every algorithm between two commits.

    python -m scripts.compare_numbers --before COMMIT --out /tmp/numbers

The script checks out both commits below ``--out`` and runs the same commands in each. Then it
compares every number of ``result.json`` and ``metrics.jsonl``, the settings in ``config.json``, and
the parameters of every trained policy. Times, versions and paths are left out. A second call
continues what was cut off.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from safetensors.torch import load_file

CONTROL = ("bc", "sft-q", "iw-sft-q", "iw-sft-step", "iql", "td3-bc", "awac", "cql", "dt")
LANGUAGE = ("base", "sft", "iw-sft", "iw-sft-hard", "iw-sft-ema", "iw-sft-step")
STEPS = "20"
# What may differ between two runs of the same code.
VOLATILE = {"versions", "hardware", "command"}


@dataclass(frozen=True)
class Arguments:
    """Run both commits and compare their numbers."""

    before: str
    """Commit that gives the expected numbers."""
    after: str = "HEAD"
    """Commit whose numbers are checked."""
    out: Path = Path("runs/numbers")
    """Folder of the two checkouts and their runs."""


def main(arguments: Arguments) -> None:
    """Run both commits, print one line for each run, and exit with 1 where a number differs."""
    out = arguments.out.absolute()
    folders = []
    for commit in (arguments.before, arguments.after):
        full = subprocess.check_output(["git", "rev-parse", commit], text=True).strip()
        folder = out / full[:12]
        if not (folder / "code").exists():
            subprocess.run(["git", "worktree", "prune"], check=True)
            subprocess.run(
                ["git", "worktree", "add", "--detach", str(folder / "code"), full], check=True
            )
        run_all(folder)
        folders.append(folder / "runs")
    differing = compare(*folders)
    if differing:
        raise SystemExit(f"error: {len(differing)} runs differ: {', '.join(differing)}")
    print("all numbers are equal, bit for bit")


def run_all(folder: Path) -> None:
    """Run every algorithm for a few updates with the code of one commit."""
    shared = ("--seeds", "0", "1", "--out", str(folder / "runs"), "--resume")
    control = ("--steps", STEPS, "--reference-steps", STEPS, "--curve-episodes", "0")
    for command in (
        ("benchmarks.d4rl", "--algo", *CONTROL, *control, "--eval-episodes", "2", *shared),
        ("benchmarks.llm", "--algo", *LANGUAGE, "--max-steps", "6", "--batch-size", "8", *shared),
    ):
        # The checkout's own packages, also where another copy is installed.
        environment = {**os.environ, "PYTHONPATH": str(folder / "code"), "OMP_NUM_THREADS": "1"}
        subprocess.run(
            [sys.executable, "-m", *command], cwd=folder / "code", env=environment, check=True
        )


def compare(before: Path, after: Path) -> list[str]:
    """Compare two folders of runs; names of the runs that differ or exist on one side alone."""
    pattern = "seed-*/config.json"
    names = sorted(
        {path.parent.relative_to(root) for root in (before, after) for path in root.rglob(pattern)}
    )
    differing = []
    for name in names:
        expected, actual = _values(before / name), _values(after / name)
        keys = sorted(
            key for key in expected.keys() | actual.keys() if expected.get(key) != actual.get(key)
        )
        print(f"{name}: {len(expected)} values, {len(keys)} differ")
        for key in keys[:5]:
            print(f"  {key}: {_shown(expected.get(key))} before, {_shown(actual.get(key))} after")
        if keys or not expected:
            differing.append(str(name))
    return differing


def _values(folder: Path) -> dict[str, Any]:
    """Every value of a run that its code, settings and seed decide, by a path of names."""
    files = [folder / name for name in ("config.json", "result.json", "metrics.jsonl", "policy.pt")]
    values: dict[str, Any] = {}
    for path in (*files, *sorted(folder.glob("checkpoint/*.safetensors"))):
        if path.exists():
            values |= values_of(path)
    return values


def values_of(path: Path) -> dict[str, Any]:
    """Every value of a file by a path of names; arrays and files of other kinds as bytes."""
    content: Any
    if path.suffix == ".json":
        content = json.loads(path.read_text())
    elif path.suffix == ".jsonl":
        content = [json.loads(line) for line in path.read_text().splitlines()]
    elif path.suffix == ".pt":
        content = torch.load(path, map_location="cpu", weights_only=True)
    elif path.suffix == ".safetensors":
        content = load_file(path)
    else:
        content = path.read_bytes()
    return _flat(path.name, content)


def _flat(name: str, value: Any) -> dict[str, Any]:
    if isinstance(value, torch.Tensor):
        data = value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        return {name: (str(value.dtype), list(value.shape), data)}
    if isinstance(value, Mapping):
        parts = [
            (key, part)
            for key, part in value.items()
            if key not in VOLATILE and not str(key).endswith("seconds")
        ]
    elif isinstance(value, list | tuple):
        parts = list(enumerate(value))
    else:
        # NaN is equal to itself here, and 1 is not 1.0.
        return {name: value if isinstance(value, bytes) else repr(value)}
    return {
        path: leaf for key, part in parts for path, leaf in _flat(f"{name}/{key}", part).items()
    }


def _shown(value: Any) -> str:
    return f"{value[0]} {value[1]}" if isinstance(value, tuple) else str(value)[:80]


if __name__ == "__main__":
    main(tyro.cli(Arguments, description=__doc__))
