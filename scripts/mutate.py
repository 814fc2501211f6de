"""Mutation testing: change one thing in the source, and see whether a test fails.

``make mutants`` runs all mutants of :data:`TESTS`, each in a copy of the tracked files, against
those tests of its module that run the changed lines, the fastest first. Results go to a file as
they come; a second call continues, and runs survivors again once their tests have changed. Mutants
that no test can tell from the source are named in ``scripts/equivalent_mutants.toml``, with a
reason.
"""

from __future__ import annotations

import argparse
import gc
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
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from scripts.mutants import ROOT, Mutant, mutants_of, source_of

EQUIVALENT = ROOT / "scripts" / "equivalent_mutants.toml"
# Loaded once, before the processes of the mutants are forked.
PRELOADED = (
    "torchrl.objectives",
    "torchrl.envs",
    "transformers.trainer",
    "transformers.models.qwen2.modeling_qwen2",
    "transformers.models.llama.modeling_llama",
    "accelerate",
    "datasets",
    "hypothesis",
    "peft",
)
_OBJECTIVE = "tests/objective"
_POLICIES = "tests/policies"
_REFERENCE = ("tests/test_reference.py", "tests/language/test_reference_tokens.py")
# Modules and the tests that run against their mutants.
TESTS: dict[str, tuple[str, ...]] = {
    "iwsft/objective.py": (
        f"{_OBJECTIVE}/test_loss_inputs.py",
        f"{_OBJECTIVE}/test_objective_truth.py",
        f"{_OBJECTIVE}/test_objective_start.py",
        f"{_OBJECTIVE}/test_data_weights.py",
        f"{_OBJECTIVE}/test_family.py",
        f"{_OBJECTIVE}/test_loss_module_contract.py",
        f"{_POLICIES}/test_causal_lm_objective.py",
    ),
    "iwsft/weights.py": (
        "tests/test_weights.py",
        f"{_OBJECTIVE}/test_family.py",
        f"{_OBJECTIVE}/test_objective_truth.py",
    ),
    "iwsft/lower_bound.py": ("tests/test_lower_bound.py",),
    "iwsft/chain.py": (
        "tests/test_weights.py",
        "tests/test_lower_bound.py",
        f"{_OBJECTIVE}/test_family.py",
        f"{_OBJECTIVE}/test_data_weights.py",
    ),
    "iwsft/presets.py": ("tests/test_weights.py", f"{_OBJECTIVE}/test_family.py"),
    "iwsft/trajectory.py": (
        "tests/test_trajectory.py",
        f"{_OBJECTIVE}/test_loss_inputs.py",
        f"{_OBJECTIVE}/test_objective_truth.py",
        "tests/test_curation_weights.py",
    ),
    "iwsft/proposals.py": (
        f"{_OBJECTIVE}/test_proposals.py",
        f"{_OBJECTIVE}/test_objective_start.py",
        f"{_OBJECTIVE}/test_family.py",
    ),
    "iwsft/curation.py": (
        "tests/test_curation.py",
        "tests/test_curation_weights.py",
        "tests/test_join.py",
    ),
    "iwsft/samplers.py": ("tests/test_samplers.py", "tests/test_transition_sampler.py"),
    "iwsft/reference.py": (
        *_REFERENCE,
        "tests/language/test_reference_cache.py",
        "tests/language/test_reference_sharded.py",
        "tests/test_trajectory.py",
    ),
    "iwsft/forward_pass.py": ("tests/test_forward_pass.py", *_REFERENCE),
    "iwsft/diagnostics.py": ("tests/test_diagnostics.py",),
    "iwsft/loop.py": ("tests/test_loop.py",),
    "iwsft/schedule.py": ("tests/test_schedule.py", "tests/test_training_networks.py"),
    "iwsft/update.py": ("tests/baselines/test_stack.py", "tests/test_training_networks.py"),
    "iwsft/language/plan.py": ("tests/language/test_plan.py",),
    "iwsft/language/batches.py": ("tests/language/test_batches.py",),
    "iwsft/language/loss.py": ("tests/language/test_loss.py",),
    "iwsft/language/weighted.py": (
        "tests/language/test_trainer.py",
        "tests/language/test_trl.py",
    ),
    "iwsft/language/trl.py": ("tests/language/test_trl.py",),
    "iwsft/language/trainer.py": (
        "tests/language/test_trainer.py",
        "tests/language/test_trainer_family.py",
        "tests/language/test_trainer_errors.py",
        "tests/language/test_trainer_saving.py",
        "tests/language/test_trl.py",
    ),
    "iwsft/policies/log_prob.py": (
        f"{_POLICIES}/test_log_prob.py",
        "tests/test_forward_pass.py",
        f"{_OBJECTIVE}/test_loss_inputs.py",
        f"{_OBJECTIVE}/test_objective_start.py",
        f"{_POLICIES}/test_causal_lm_objective.py",
    ),
    "iwsft/policies/token_log_prob.py": (f"{_POLICIES}/test_token_log_prob.py",),
    "iwsft/policies/causal_lm.py": (
        f"{_POLICIES}/test_causal_lm.py",
        f"{_POLICIES}/test_causal_lm_objective.py",
        f"{_POLICIES}/test_adapters.py",
        f"{_POLICIES}/test_causal_lm_families.py",
        f"{_POLICIES}/test_causal_lm_sharded.py",
    ),
}


# ---- one run ----


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


class _Recorder:
    """A plugin of pytest: records the seconds of each test and the lines of a module it runs."""

    def __init__(self, path: Path) -> None:
        self._path = str(path)
        self._lines: set[int] = set()
        self.tests: dict[str, tuple[float, list[int]]] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._lines.clear()
        began = time.monotonic()
        sys.settrace(self._trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            self.tests[item.nodeid] = time.monotonic() - began, sorted(self._lines)

    def _trace(self, frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename != self._path:
            return None
        self._lines.add(frame.f_lineno)
        return self._trace


class _Order:
    """A plugin of pytest: runs the tests that run a mutant's lines, the fastest first.

    All tests run if none does.

    Args:
        tests: What :class:`_Recorder` recorded on the source.
        mutant: The mutant that runs.
    """

    def __init__(self, tests: dict[str, tuple[float, list[int]]], mutant: Mutant) -> None:
        self._tests = tests
        self._lines = frozenset(range(mutant.line, mutant.last + 1))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        def is_apart(item: pytest.Item) -> bool:
            return self._lines.isdisjoint(self._tests[item.nodeid][1])

        items.sort(key=lambda item: (is_apart(item), self._tests[item.nodeid][0]))
        if not is_apart(items[0]):
            # What the processes of a test run is not recorded.
            items[:] = [x for x in items if not is_apart(x) or _is_distributed(x)]
        for item in items:
            seconds = self._tests[item.nodeid][0] + 30 * _is_distributed(item)
            item.add_marker(pytest.mark.timeout(_limit(seconds)))


def _limit(seconds: float) -> float:
    """Seconds after which a test counts as one that does not end.

    The first test that needs a package or a server of processes waits for it.
    """
    return 30 + 4 * seconds


def _is_distributed(item: pytest.Item) -> bool:
    return "forkserver" in getattr(item, "fixturenames", ())


def _start(home: Path, tests: Sequence[str], plugin: object) -> int:
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

    hypothesis.settings.register_profile("mutants", database=None, derandomize=True)
    hypothesis.settings.load_profile("mutants")
    options = ["-x", "-q", "--no-header", "--tb=line", "-p", "no:cacheprovider", "-p", "no:xdist"]
    status = pytest.main([*options, f"--basetemp={home}/tmp", *tests], plugins=[plugin])
    if isinstance(plugin, _Recorder):
        (home / "tests.json").write_text(json.dumps(plugin.tests))
    os._exit(int(status))


# ---- all runs ----


@cache
def digests_of(file: str) -> list[str]:
    """Digests of a module and of its tests."""
    return [
        hashlib.sha256(b"".join((ROOT / name).read_bytes() for name in names)).hexdigest()[:16]
        for names in ((file,), TESTS[file])
    ]


def record(file: str, home: Path, folder: Path) -> dict[str, tuple[float, list[int]]]:
    """Run the tests of a module on its source, unless this has been done."""
    recorded = folder / f"mutants-{'-'.join(digests_of(file))}.json"
    if not recorded.exists():
        child = _start(home, TESTS[file], _Recorder(home / file))
        if os.waitpid(child, 0)[1] != 0:
            log = (home / "pytest.log").read_text()
            raise SystemExit(f"the tests of {file} fail without a mutant:\n{log[-2000:]}")
        shutil.copy(home / "tests.json", recorded)
    return json.loads(recorded.read_text())


def run(queue: list[Mutant], options: argparse.Namespace, folder: Path) -> Iterator[dict[str, Any]]:
    """Run mutants, as many at a time as there are processes; their results as they come."""
    homes = [folder / str(number) for number in range(options.processes)]
    for home in homes:
        _copy(home)
    sources = {mutant.file: (ROOT / mutant.file).read_text() for mutant in queue}
    end = time.monotonic() + options.seconds
    tests = {file: record(file, homes[0], options.out.parent) for file in sources}
    limits = {file: _limit(sum(s for s, _ in tests[file].values())) for file in sources}
    queue = queue[::-1]
    running: dict[int, tuple[Mutant, Path, float]] = {}
    while running or (queue and time.monotonic() < end):
        while homes and queue and time.monotonic() < end:
            mutant, home = queue.pop(), homes.pop()
            _write(home, mutant.file, source_of(mutant, sources[mutant.file]))
            plugin = _Order(tests[mutant.file], mutant)
            running[_start(home, TESTS[mutant.file], plugin)] = mutant, home, time.monotonic()
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
    """Print the survivors, and a table of the modules with Wilson's 95 % intervals."""
    # Not earlier: the processes of the mutants must load iwsft themselves.
    from benchmarks.statistics import wilson_interval

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
        low, high = wilson_interval(share, max(1, len(mine) - equal))
        interval = f"{share:8.1%} [{low:.1%}, {high:.1%}]"
        print(f"{file:34}{len(mine):8}{killed:8}{equal:12}{left:10}{interval}")


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

    # In the order of a draw, so that a part of the sample is a sample.
    queue = [mutant for mutant in chosen if not is_known(mutant)]
    for module in PRELOADED:
        __import__(module)
    # Garbage collections of the processes leave out what is loaded.
    gc.freeze()
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
