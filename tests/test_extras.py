"""Packages of extras: each is known, and the error of a missing one says what to install."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from functools import cache
from importlib import metadata
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest

from iwsft.extras import EXTRAS

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# Their errors name packages that no extra installs.
OWN_MESSAGE = {"d3rlpy", "gymnasium_robotics", "structlog", "vllm"}
packages_distributions = cache(metadata.packages_distributions)
# In a process of its own, HIDDEN packages cannot be found.
HIDE = """
import importlib.abc, importlib.util, sys

class Hidden(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in HIDDEN:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Hidden())
real = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name.split(".")[0] in HIDDEN else real(name, *a)
"""


def run(hidden: set[str], code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process where packages are hidden."""
    words = [sys.executable, "-c", f"HIDDEN = {hidden!r}\n{HIDE}\n{code}"]
    return subprocess.run(words, capture_output=True, text=True)


def needed(requirements: list[str], seen: set[str]) -> set[str]:
    """Names of distributions that requirements lead to; those that are not installed lead on."""
    for requirement in requirements:
        line, _, marker = requirement.partition(";")
        name = re.split(r"[\[<>=!~ ]", line, maxsplit=1)[0].lower().replace("_", "-")
        if name == "iwsft" and (own := re.search(r"\[(.*)\]", line)):
            for extra in own[1].split(","):
                needed(PROJECT["optional-dependencies"][extra], seen)
        elif name not in seen and "extra ==" not in marker:
            seen.add(name)
            try:
                needed(requires(name) or [], seen)
            except PackageNotFoundError:
                continue
    return seen


@pytest.mark.parametrize("package", EXTRAS)
def test_an_extra_installs_its_packages(package: str) -> None:
    requirements = PROJECT["optional-dependencies"][EXTRAS[package]]
    if package not in packages_distributions():
        pytest.skip(f"{package} is not installed here")
    names = {name.lower().replace("_", "-") for name in packages_distributions()[package]}
    assert names & needed([*requirements, *PROJECT["dependencies"]], set())


def test_every_package_that_is_imported_is_required_or_of_an_extra() -> None:
    distributions = packages_distributions()
    always = needed(PROJECT["dependencies"], set())
    for package in ("iwsft", "baselines", "benchmarks"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                if isinstance(node, ast.ImportFrom):
                    names = [str(node.module)]
                for root in {name.partition(".")[0] for name in names} - OWN_MESSAGE:
                    own = root in sys.stdlib_module_names or (ROOT / root).is_dir()
                    known = {name.lower() for name in distributions.get(root, [])} & always
                    assert own or known or root in EXTRAS, f"{path} imports {root}"


def test_without_extras_every_module_loads_or_says_what_to_install() -> None:
    code = """
import importlib, pkgutil
for root in ("iwsft", "baselines"):
    for module in pkgutil.walk_packages(importlib.import_module(root).__path__, root + "."):
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            print(module.name, error)
from iwsft import datasets
from iwsft.policies import CausalLMPolicy
print(len(datasets.load("hopper-replay-mini").trajectories))
"""
    done = run(set(EXTRAS), code)
    assert done.returncode == 0, done.stderr
    *missing, steps = done.stdout.splitlines()
    assert int(steps) > 0
    assert {line.split()[0] for line in missing} >= {"iwsft.evaluation", "iwsft.language.trainer"}
    for line in missing:
        extra = "language" if line.startswith("iwsft.language") else "control"
        assert line.endswith(f"not installed: pip install 'iwsft[{extra}]'"), line


def test_a_missing_package_of_an_environment_is_named() -> None:
    code = """
from iwsft import environments
for env_id in ("AdroitHandDoor-v1", "FrankaKitchen-v1", "Hopper-v4"):
    try:
        environments.make(env_id)
    except ImportError as error:
        print(error)
"""
    done = run({"gymnasium_robotics", "mujoco"}, code)
    assert done.returncode == 0, done.stderr
    door, kitchen, hopper = done.stdout.splitlines()
    for line in (door, kitchen):
        assert "gymnasium_robotics" in line and "pip install 'iwsft[robotics]'" in line
    assert "mujoco" in hopper and "pip install 'iwsft[control]'" in hopper


@pytest.mark.parametrize(
    ("command", "hidden", "extras"),
    [
        ("d4rl", {"gymnasium", "tyro"}, "cli,control"),
        ("llm", {"transformers"}, "language"),
        ("evaluate", {"accelerate"}, "language"),
        ("collect", {"mujoco"}, "control"),
        ("report", {"matplotlib"}, "cli"),
        ("bandit", {"scipy"}, "cli"),
        ("speed", {"tyro"}, "cli"),
    ],
)
def test_a_command_without_its_extra_ends_in_one_line(
    command: str, hidden: set[str], extras: str
) -> None:
    code = f"sys.argv = ['iwsft', {command!r}]\nfrom benchmarks.__main__ import main\nmain()"
    done = run(hidden, code)
    names = ", ".join(sorted(hidden, key=lambda name: EXTRAS[name]))
    verb = "is" if len(hidden) == 1 else "are"
    line = f"error: {names} {verb} not installed: pip install 'iwsft[{extras}]'\n"
    assert (done.returncode, done.stderr) == (1, line)
