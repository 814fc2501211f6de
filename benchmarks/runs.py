"""A run on disk: its folder, the claim on it, and its files.

Nothing heavy is imported, so that a command tells of a folder that is taken at once.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from filelock import FileLock

from iwsft import __version__
from iwsft.checkpoint import CheckpointError, differences
from iwsft.files import full_disk_named, write_json

CONFIG, RESULT, VIDEO = "config.json", "result.json", "video.mp4"
# Packages that decide the numbers of control.
PACKAGES = ("torch", "tensordict", "torchrl", "gymnasium", "mujoco", "numpy")


# A command line with the folder ``out``; something with a ``folder`` of its own.
Options = TypeVar("Options", bound=Any)
Claimed = TypeVar("Claimed", bound=Any)


@dataclass(frozen=True)
class Run(Generic[Options]):
    """One algorithm on one dataset with one seed."""

    benchmark: ClassVar[str]  # folder of a command's runs; each command's own class sets it
    dataset: str  # its name in folders and results; of language, the recipe
    algo: str
    seed: int  # of everything that the run draws
    options: Options  # the command line; its settings are those of the run

    def __str__(self) -> str:
        return f"{self.dataset} {self.algo} seed {self.seed}"

    @property
    def runs(self) -> tuple[Run[Options]]:
        """The run itself, as a stack of one; see :class:`benchmarks.sweep.Stack`."""
        return (self,)

    @property
    def identity(self) -> dict[str, Any]:
        """What names the run in its files."""
        names = ("benchmark", "dataset", "algo", "seed")
        return {name: getattr(self, name) for name in names}

    @property
    def root(self) -> Path:
        """Folder of all runs of all benchmarks."""
        return self.options.out

    @property
    def dataset_folder(self) -> Path:
        """Folder of all runs on the dataset, and of what they share."""
        return self.root / self.benchmark / self.dataset

    @property
    def folder(self) -> Path:
        """Folder that the run writes to."""
        return folder_of(self.root, **self.identity)


def folder_of(out: Path, benchmark: str, dataset: str, algo: str, seed: int) -> Path:
    """Folder of a run, where ``out`` is that of all runs."""
    return out / benchmark / dataset / algo / f"seed-{seed}"


def check_free(folders: Iterable[Path]) -> None:
    """Check that no run is in these folders."""
    taken = [str(each) for each in folders if (each / CONFIG).exists() or (each / RESULT).exists()]
    if taken:
        there = "a run is there" if len(taken) == 1 else "runs are there"
        way_out = "pass --resume to continue and to keep what is finished, or another --out"
        raise FileExistsError(f"{', '.join(taken)}: {there} already; {way_out}")


def claim(
    root: Path,
    configs: Mapping[Claimed, dict[str, Any]],
    *,
    same: Sequence[str],
    resume: Collection[Claimed],
) -> list[Claimed]:
    """Claim the folders of all runs below ``root``, or none, by writing ``config.json``.

    ``configs`` has the content of each run's file. Runs of ``resume`` that are there already are
    accepted where they agree in the entries ``same``. Returns the unfinished runs.

    Raises:
        FileExistsError: Folders contain a run that is not one of ``resume``.
        CheckpointError: Folders contain a run of ``resume`` with other settings.
        OSError: ``root`` can't be written.
    """
    with full_disk_named(root):
        root.mkdir(parents=True, exist_ok=True)
    # Two commands at once don't both find a folder free.
    with FileLock(root / ".claim.lock"):
        earlier = {run: _earlier_config(run.folder, same) for run in configs}
        free = [run for run in configs if earlier[run] is None]
        check_free(run.folder for run in configs if run not in resume)
        for run, before in earlier.items():
            if before is None:
                continue
            differ = differences(before, {name: configs[run][name] for name in same})
            if differ:
                problem = f"{run.folder} holds a run with other settings: {differ}"
                raise CheckpointError(f"{problem}; run with those, or choose another --out")
        try:
            for run in free:
                write_json(run.folder / CONFIG, configs[run])
        except OSError:
            for run in free:
                (run.folder / CONFIG).unlink(missing_ok=True)
            raise
    return [run for run in configs if not (run.folder / RESULT).exists()]


def _earlier_config(folder: Path, same: Sequence[str]) -> dict[str, Any] | None:
    """The entries of a folder's ``config.json``; empty with a mere result, None without a run."""
    path = folder / CONFIG
    if not path.exists():
        return {} if (folder / RESULT).exists() else None
    try:
        # Runs of earlier releases did not record the environment's arguments.
        config = {"env_kwargs": {}} | json.loads(path.read_text())
        return {name: config[name] for name in same}
    except (ValueError, KeyError, TypeError) as error:
        problem = f"{path} is not what a run writes ({type(error).__name__}: {error})"
        raise CheckpointError(f"{problem}; move {folder} away, or choose another --out") from error


def versions(packages: Sequence[str] = ("iwsft", *PACKAGES)) -> dict[str, str]:
    """Versions of Python and of packages, where they are installed."""
    numbers = {"python": platform.python_version()}
    for name in packages:
        with suppress(PackageNotFoundError):
            numbers[name] = own_version() if name == "iwsft" else version(name)
    return numbers


@cache
def own_version() -> str:
    """The version of iwsft; in a checkout with the commit, and ``dirty`` where files differ."""
    root, commit = Path(__file__).parents[1], ""
    ask = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--exclude=*"]
    # Without git, or where it refuses the folder, the commit is not known.
    with suppress(OSError, subprocess.CalledProcessError):
        if (root / ".git").exists():
            done = subprocess.run(ask, cwd=root, capture_output=True, text=True, check=True)
            commit = f"+{done.stdout.strip()}"
    return f"{__version__}{commit}"


def hardware(device: str) -> dict[str, str | int | None]:
    """The machine of a run; on a CPU with the instructions that torch uses, such as AVX2."""
    import torch

    listed = Path("/proc/cpuinfo")
    instructions = {"instructions": torch.backends.cpu.get_cpu_capability()}
    if device.startswith("cuda"):
        name, instructions = torch.cuda.get_device_name(device), {}
    elif listed.exists() and (names := re.findall(r"model name.*?:(.*)", listed.read_text())):
        name = names[0].strip()
    else:
        name = platform.processor() or platform.machine()
    system = {"cpus": os.cpu_count(), "system": platform.system()}
    return {"device": device, "name": name, **instructions, **system}


def tell(line: str) -> None:
    """Write a line to stderr in one go, so that those of several processes do not mix."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
