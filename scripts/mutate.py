"""Mutation testing: change one thing in the source, and see whether a test fails.

``make mutants`` runs all mutants of :data:`TESTS`, each against the test files of its module, in a
copy of the tracked files. Results go to a file as they come; a second call continues, and runs
survivors again once their tests have changed. Mutants that no test can tell from the source are
named in ``scripts/equivalent_mutants.toml``, with a reason.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
EQUIVALENT = ROOT / "scripts" / "equivalent_mutants.toml"
# Loaded once, before the processes of the mutants are forked.
PRELOADED = ("torch", "torchrl.objectives", "transformers", "accelerate", "hypothesis", "pytest")
_OBJECTIVE = "tests/objective"
_REFERENCE = ("tests/test_reference.py", "tests/language/test_reference_tokens.py")
_LANGUAGE = ("tests/language/test_batches.py", "tests/language/test_plan.py")
_TRAINER = ("tests/language/test_trainer.py", "tests/language/test_trainer_errors.py")
# Modules and the tests that run against their mutants, the fastest first.
TESTS: dict[str, tuple[str, ...]] = {
    "iwsft/objective.py": (
        f"{_OBJECTIVE}/test_loss_inputs.py",
        f"{_OBJECTIVE}/test_objective_truth.py",
        f"{_OBJECTIVE}/test_objective_start.py",
        f"{_OBJECTIVE}/test_loss_module_contract.py",
    ),
    "iwsft/weights.py": ("tests/test_weights.py", f"{_OBJECTIVE}/test_objective_truth.py"),
    "iwsft/trajectory.py": (
        "tests/test_trajectory.py",
        f"{_OBJECTIVE}/test_loss_inputs.py",
        f"{_OBJECTIVE}/test_objective_truth.py",
    ),
    "iwsft/proposals.py": (
        f"{_OBJECTIVE}/test_proposals.py",
        f"{_OBJECTIVE}/test_objective_start.py",
    ),
    "iwsft/curation.py": ("tests/test_curation.py",),
    "iwsft/samplers.py": ("tests/test_samplers.py", "tests/test_transition_sampler.py"),
    "iwsft/reference.py": (
        *_REFERENCE,
        "tests/language/test_reference_cache.py",
        "tests/language/test_reference_sharded.py",
    ),
    "iwsft/forward_pass.py": (
        "tests/test_forward_pass.py",
        *_REFERENCE,
        "tests/language/test_reference_sharded.py",
    ),
    "iwsft/diagnostics.py": ("tests/test_diagnostics.py",),
    "iwsft/language/plan.py": (*_LANGUAGE[::-1], *_TRAINER),
    "iwsft/language/batches.py": (*_LANGUAGE, *_TRAINER),
    "iwsft/language/loss.py": _TRAINER,
    "iwsft/language/trainer.py": _TRAINER,
}
_COMPARISONS = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
_ARITHMETIC = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
# Methods whose call is left out.
_LEFT_OUT = {"abs", "clamp", "clone", "copy", "detach", "double"}
# Functions that fail at once, or give the same, if their arguments change places.
_UNSWAPPED = {
    "equal",
    "promote_types",
    "exclude",
    "getattr",
    "hasattr",
    "isinstance",
    "max",
    "min",
    "select",
    "setattr",
}


@dataclass(frozen=True)
class Mutant:
    """A change of one node.

    Attributes:
        file: The module's path.
        line: Where the change is.
        where: Names of the classes and functions around it.
        before: Source of the changed node.
        after: Its source after the change.
        number: Counts equal changes in the same function.
        place: Which changeable node of the module it is, and which of its changes.
    """

    file: str
    line: int
    where: str
    before: str
    after: str
    number: int
    place: tuple[int, int]

    @property
    def name(self) -> str:
        """What identifies the mutant, also when lines above it change."""
        return f"{self.file} {self.where}: {self.before} -> {self.after} #{self.number}"


# ---- mutants ----


def mutants_of(file: str) -> list[Mutant]:
    """All mutants of a module, in the order of its lines."""
    tree = ast.parse((ROOT / file).read_text())
    mutants: list[Mutant] = []
    seen: Counter[tuple[str, str, str]] = Counter()
    for place, (node, where) in enumerate(_changeable(tree, "")):
        for change, after in enumerate(_changes(node)):
            other = after[0] if isinstance(after, list) else after
            before, now = (ast.unparse(part).split("\n")[0] for part in (node, other))
            key = where, before, now
            seen[key] += 1
            mutants.append(Mutant(file, node.lineno, *key, seen[key], (place, change)))
    return mutants


def source_of(mutant: Mutant, source: str) -> str:
    """The source of the module after the change."""
    tree = ast.parse(source)
    place, change = mutant.place
    target = next(islice(_changeable(tree, ""), place, None))[0]
    after = _changes(target)[change]
    for parent in ast.walk(tree):
        for field, value in ast.iter_fields(parent):
            if value is target:
                setattr(parent, field, after)
            elif isinstance(value, list):
                for at, item in enumerate(value):
                    if item is target:
                        value[at : at + 1] = after if isinstance(after, list) else [after]
    return ast.unparse(ast.fix_missing_locations(tree))


def _changeable(node: ast.AST, where: str) -> Iterator[tuple[Any, str]]:
    """Nodes that run, with the names around them: no annotations, messages or docstrings."""
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "exc", "type_params"):
            continue
        # Assertions that the source never breaks.
        if isinstance(node, ast.keyword) and node.arg in ("strict", "frozen"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST):
                continue
            if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
                continue
            inside = where
            if isinstance(child, ast.ClassDef | ast.FunctionDef):
                inside = f"{where}.{child.name}".strip(".")
            if hasattr(child, "lineno"):
                yield child, inside
            yield from _changeable(child, inside)


def _changes(node: Any) -> list[Any]:
    """Nodes (or lists of statements) to replace a node by."""
    match node:
        case ast.Compare(ops=[op]) if type(op) in _COMPARISONS:
            return [_with(node, ops=[_COMPARISONS[type(op)]()])]
        case ast.BinOp(op=op) if type(op) in _ARITHMETIC and not isinstance(
            node.left, ast.JoinedStr
        ):
            return [_with(node, op=_ARITHMETIC[type(op)]())]
        case ast.BoolOp(op=op):
            return [_with(node, op=ast.Or() if isinstance(op, ast.And) else ast.And())]
        case ast.Constant(value=bool() as value):
            return [_with(node, value=not value)]
        case ast.Constant(value=int() | float() as value):
            return [_with(node, value=value + 1)]
        case ast.UnaryOp(op=ast.Not() | ast.USub() | ast.Invert(), operand=operand):
            return [operand]
        case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test) if not isinstance(
            test, ast.Compare | ast.UnaryOp
        ):
            return [_with(node, test=ast.UnaryOp(ast.Not(), test))]
        case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Raise():
            return [ast.Pass()]
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            return [ast.Pass()]
        case ast.Call(func=ast.Attribute(attr=name, value=value)) if name in _LEFT_OUT:
            return [value]
        case ast.Call(args=[first, second, *rest]) if _order_matters(node):
            return [_with(node, args=[second, first, *rest])]
        case ast.With(items=items):
            fewer = [[*items[:i], *items[i + 1 :]] for i in range(len(items))]
            return [
                _with(node, items=left) if left else node.body
                for left, item in zip(fewer, items, strict=True)
                if item.optional_vars is None
            ]
        case ast.FunctionDef(decorator_list=[*decorators]):
            left = [d for d in decorators if "no_grad" not in ast.unparse(d)]
            return [_with(node, decorator_list=left)] if left != decorators else []
    return []


def _order_matters(call: ast.Call) -> bool:
    name = ast.unparse(call.func).split(".")[-1]
    return name not in _UNSWAPPED and ast.dump(call.args[0]) != ast.dump(call.args[1])


def _with(node: Any, **fields: Any) -> Any:
    other = type(node)(**{**dict(ast.iter_fields(node)), **fields})
    return ast.copy_location(other, node)


# ---- runs ----


def _copy(home: Path) -> None:
    """Copy the tracked files as they are now."""
    tracked = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\0")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (home / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, home / name)


def _write(home: Path, file: str, source: str) -> None:
    path = home / file
    path.write_text(source)
    # A compiled file counts as new if its second and size are those of the source.
    for compiled in (path.parent / "__pycache__").glob(f"{path.stem}.*.pyc"):
        compiled.unlink()


def _start(home: Path, tests: tuple[str, ...]) -> int:
    """Fork a process that runs the tests in a copy; 0 is its exit status if they pass."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    resource.setrlimit(resource.RLIMIT_DATA, (16 * 2**30, 16 * 2**30))
    os.chdir(home)
    os.environ["PYTHONPATH"] = str(home)
    sys.path[:0] = [str(home)]
    log = os.open(home / "pytest.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import hypothesis
    import pytest

    hypothesis.settings.register_profile("mutants", database=None, derandomize=True)
    hypothesis.settings.load_profile("mutants")
    options = ["-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist"]
    os._exit(int(pytest.main([*options, f"--basetemp={home}/tmp", *tests])))


@cache
def digests_of(file: str) -> list[str]:
    """Digests of a module and of its tests."""
    return [
        hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in names)).hexdigest()[:16]
        for names in ((file,), TESTS[file])
    ]


def run(queue: list[Mutant], options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Run mutants, as many at a time as there are processes; their results as they come."""
    homes = [folder / str(number) for number in range(options.processes)]
    for home in homes:
        _copy(home)
    sources = {mutant.file: (ROOT / mutant.file).read_text() for mutant in queue}
    for file in sources:
        digests_of(file)
    end = time.monotonic() + options.seconds
    limits: dict[str, float] = {}
    for file in sources:
        began = time.monotonic()
        child = _start(homes[0], TESTS[file])
        if os.waitpid(child, 0)[1] != 0:
            log = (homes[0] / "pytest.log").read_text()
            raise SystemExit(f"the tests of {file} fail without a mutant:\n{log[-2000:]}")
        limits[file] = 10 + 4 * (time.monotonic() - began)
    queue = queue[::-1]
    running: dict[int, tuple[Mutant, Path, float]] = {}
    while running or (queue and time.monotonic() < end):
        while homes and queue and time.monotonic() < end:
            mutant, home = queue.pop(), homes.pop()
            _write(home, mutant.file, source_of(mutant, sources[mutant.file]))
            running[_start(home, TESTS[mutant.file])] = mutant, home, time.monotonic()
        time.sleep(0.02)
        for child, (mutant, home, began) in list(running.items()):
            seconds = time.monotonic() - began
            late = seconds > limits[mutant.file]
            if late:
                os.killpg(child, signal.SIGKILL)
            done, status = os.waitpid(child, 0 if late else os.WNOHANG)
            if not done:
                continue
            del running[child]
            _write(home, mutant.file, sources[mutant.file])
            homes.append(home)
            yield {
                **{key: value for key, value in asdict(mutant).items() if key != "place"},
                "result": "time" if late else "survived" if status == 0 else "killed",
                "seconds": round(seconds, 1),
                "digests": digests_of(mutant.file),
            }


# ---- report ----


def name_of(row: dict[str, Any]) -> str:
    """:attr:`Mutant.name` of a result."""
    return "{file} {where}: {before} -> {after} #{number}".format(**row)


def report(rows: list[dict[str, Any]], equivalent: dict[str, str]) -> None:
    """Print the survivors, and a table of the modules."""
    survivors = [row for row in rows if row["result"] == "survived"]
    for row in survivors:
        if name_of(row) not in equivalent:
            print(f"{row['file']}:{row['line']} {row['where']}\n    - {row['before']}")
            print(f"    + {row['after']}")
    print(f"{'module':34}{'mutants':>8}{'killed':>8}{'equivalent':>12}{'survived':>10}{'share':>8}")
    for file in [*TESTS, "all"]:
        mine = [row for row in rows if file in (row["file"], "all")]
        if not mine:
            continue
        killed = sum(row["result"] != "survived" for row in mine)
        equal = sum(row["result"] == "survived" and name_of(row) in equivalent for row in mine)
        share = killed / max(1, len(mine) - equal)
        left = len(mine) - killed - equal
        print(f"{file:34}{len(mine):8}{killed:8}{equal:12}{left:10}{share:8.1%}")


def main() -> None:
    """Run what is left of the chosen mutants, and report on all of them."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    names = "parts of the mutants' names"
    parser.add_argument("--only", nargs="+", default=[""], help=names)
    parser.add_argument("--sample", type=int, help="number of mutants drawn; all by default")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="mutants at a time")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="time for new mutants")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "mutants.jsonl")
    options = parser.parse_args()
    everything = (mutant for file in TESTS for mutant in mutants_of(file))
    chosen = [mutant for mutant in everything if any(part in mutant.name for part in options.only)]
    if options.sample is not None and options.sample < len(chosen):
        chosen = random.Random(options.seed).sample(chosen, options.sample)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    known = {name_of(row): row for row in map(json.loads, lines)}

    def is_known(mutant: Mutant) -> bool:
        if mutant.name not in known:
            return False
        row = known[mutant.name]
        same_code, same_tests = (
            one == other for one, other in zip(row["digests"], digests_of(mutant.file), strict=True)
        )
        return same_code and (same_tests or row["result"] != "survived")

    queue = sorted((m for m in chosen if not is_known(m)), key=lambda mutant: mutant.file)
    for module in PRELOADED:
        __import__(module)
    with options.out.open("a") as out, tempfile.TemporaryDirectory() as folder:
        for number, row in enumerate(run(queue, options, Path(folder)), 1):
            known[name_of(row)] = row
            print(json.dumps(row), file=out, flush=True)
            print(f"\r{number} of {len(queue)}", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    done = [known[mutant.name] for mutant in chosen if is_known(mutant)]
    listed = tomllib.loads(EQUIVALENT.read_text())["equivalent"]
    report(done, listed)


if __name__ == "__main__":
    main()
