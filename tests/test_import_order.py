"""Imports of the whole tree point one way, and no two modules import each other in a circle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("iwsft", "baselines", "benchmarks", "scripts", "examples")
# From the lowest floor to the highest. A module belongs to the longest name that it begins with,
# and imports from its own floor or from those below.
FLOORS = (
    (
        "iwsft",
        "iwsft.trajectory",
        "iwsft.weights",
        "iwsft.files",
        "iwsft.fingerprint",
        "iwsft.progress",
        "iwsft.schedule",
    ),
    (
        "iwsft.validation",
        "iwsft.checkpoint",
        "iwsft.metrics",
        "iwsft.policies",
        "iwsft.distributed",
    ),
    ("iwsft.policy_loss", "iwsft.objective", "iwsft.forward_pass"),
    ("iwsft.proposals", "iwsft.reference", "iwsft.diagnostics"),
    ("iwsft.curation", "iwsft.samplers"),
    (
        "iwsft.training",
        "iwsft.update",
        "iwsft.environments",
        "iwsft.acting",
        "iwsft.d4rl_conventions",
        "iwsft.loop",
    ),
    ("iwsft.datasets", "iwsft.evaluation", "iwsft.video"),
    ("iwsft.trained_policy",),
    ("iwsft.language",),
    ("baselines",),
    ("benchmarks", "benchmarks.runs", "benchmarks.options", "benchmarks.statistics"),
    ("benchmarks.places", "benchmarks.results", "benchmarks.monitor", "benchmarks.trackers"),
    ("benchmarks.sweep", "benchmarks.report"),
    ("benchmarks.d4rl", "benchmarks.llm", "benchmarks.bandit", "benchmarks.collect"),
    (
        "benchmarks.demo",
        "benchmarks.peer",
        "benchmarks.speed",
        "benchmarks.weights",
    ),
    ("benchmarks.__main__",),
    ("scripts",),
    ("examples",),
)
FLOOR = {name: number for number, names in enumerate(FLOORS) for name in names}


def modules() -> dict[str, Path]:
    """Dotted names of the tree's modules and their files."""
    names = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            names[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return names


MODULES = modules()


def imports(path: Path) -> Iterator[str]:
    """Modules of the tree that a file imports anywhere, also within functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            # ``from package import name`` imports a module where the name is one.
            inner = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in MODULES else node.module for name in inner]
        else:
            continue
        yield from (name for name in names if name in MODULES)


def floor(module: str) -> int:
    """Number of the floor that a module belongs to."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next(FLOOR[name] for name in names if name in FLOOR)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"iwsft"}))
def test_a_module_imports_from_its_floor_or_below(module: str) -> None:
    upwards = {name for name in imports(MODULES[module]) if floor(name) > floor(module)}
    assert not upwards, f"{module} imports {', '.join(sorted(upwards))} from a floor above"


def test_control_and_language_do_not_import_each_other() -> None:
    for module, path in MODULES.items():
        for one, other in (
            ("benchmarks.d4rl", "benchmarks.llm"),
            ("benchmarks.llm", "benchmarks.d4rl"),
        ):
            if module.startswith(one):
                assert not [name for name in imports(path) if name.startswith(other)], module


def test_no_circle() -> None:
    # A package's __init__ names its public parts for type checkers, and loads them later.
    graph = {name: set(imports(path)) - {name} for name, path in MODULES.items() if "." in name}
    try:
        tuple(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(f"modules import each other in a circle: {' -> '.join(error.args[1])}")


def test_every_floor_exists() -> None:
    packages = {name.rpartition(".")[0] for name in MODULES}
    assert FLOOR.keys() <= MODULES.keys() | packages
