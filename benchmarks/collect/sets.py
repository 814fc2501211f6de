"""Build the datasets of the results, and compare them with their checksums.

Examples:
    iwsft collect sets
    iwsft collect sets hopper-medium-expert walker2d-medium-expert
    iwsft d4rl --dataset hopper-medium-expert

What was cut off continues, and what is finished is only compared. Another version of a package, or
another processor, may give other bytes: a warning tells. These are the sets:
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks.collect import options
from benchmarks.options import option

_FOLDER = Path(__file__).parent
_RECORD: dict[str, Any] = tomllib.loads((_FOLDER / "sets.toml").read_text())
SETS: dict[str, dict[str, Any]] = _RECORD["sets"]


@dataclass(frozen=True, kw_only=True)
class Options:
    """What to build."""

    names: Annotated[tyro.conf.Positional[tuple[str, ...]], option("NAME", "all")] = ()
    """Sets to build."""
    out: Annotated[Path | None, option("DIR", "~/.cache/iwsft/collected")] = None
    """Folder of the files. Of the default one, --dataset and datasets.load take the names."""
    resume: bool = True
    """Continue sets that were cut off, and keep finished ones."""


def recipe(name: str, out: Path | None, resume: bool = True) -> options.Options:
    """Return the command line that collects a set."""
    from iwsft.datasets import collected_file

    path = collected_file(name) if out is None else out.expanduser() / f"{name}.hdf5"
    given: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value
        for key, value in SETS[name]["options"].items()
    }
    given["policy"] = tuple(str(_FOLDER / "policies" / file) for file in given.get("policy", ()))
    return options.Options(out=str(path), resume=resume, **given)


def build(given: Options) -> None:
    """Build sets whose names are known, one after the other.

    Raises:
        ValueError: A set differs from the recorded one though all versions are the same; the others
            are built before.
    """
    from benchmarks.collect.job import run_job

    problems = []
    for name in given.names or SETS:
        options = recipe(name, given.out, given.resume)
        run_job(options)
        problems += compare(name, Path(options.out))
    if problems:
        raise ValueError("; ".join(problems))


def compare(name: str, path: Path) -> list[str]:
    """Print how a file compares with the recorded set; return what should not be."""
    import h5py

    from benchmarks.collect.job import summary
    from benchmarks.runs import hardware, tell, versions
    from iwsft.checkpoint import differences
    from iwsft.fingerprint import file_sha256

    sha256, recorded = file_sha256(path), SETS[name].get("sha256")
    if recorded == sha256:
        print(f"{name} has the recorded bytes")
        return []
    with h5py.File(path) as file:
        fields = {key: file[key][()] for key in ("rewards", "terminals", "timeouts")}
        sources, made = (json.loads(file.attrs[key]) for key in ("sources", "versions"))
    print(f"{name}: {summary(fields, sources)}")
    if recorded is None:
        tell(f"warning: no checksum of {name} is recorded yet; this one has SHA-256 {sha256}")
        return []
    machine = hardware("cpu")
    made |= versions(["h5py"])
    # Processors of one name may have other instructions, and then they round otherwise.
    made |= {"processor": machine["name"], "instructions": machine["instructions"]}
    differ = differences(_RECORD["made-with"], made)
    if not differ:
        return [f"{path} has SHA-256 {sha256}, not the recorded one, though versions are the same"]
    tell(f"warning: {name} differs from the recorded set; it was made with {differ}")
    return []
