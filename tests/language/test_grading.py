"""Comparisons that hang, crash, raise or print count as one wrong answer and stop nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from iwsft.language import grading
from iwsft.language.grading import Grader, TimedFunction

COMPARE = """
import os, pathlib
print("loaded: what is printed must not be taken for a verdict")
HERE = pathlib.Path(__file__).parent

def compare(correct, answer):
    print("comparing", answer, flush=True)
    (HERE / f"{os.getpid()}.pid").touch()
    if answer == "spin":
        while True:
            pass
    if answer == "crash":
        os.abort()
    if answer == "exit":
        raise SystemExit
    if answer == "raise":
        raise RecursionError("too deep")
    if answer == "memory":
        bytearray(2 ** 40)
    return correct == answer.upper()
"""


@pytest.fixture
def compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison of a grader."""
    (tmp_path / "scripted_comparison.py").write_text(COMPARE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(grading, "_MATH_VERIFY", "scripted_comparison:compare")


@pytest.mark.usefixtures("compare")
def test_failures_count_as_wrong_and_grading_continues(tmp_path: Path) -> None:
    problems = {
        "exit": "SystemExit",
        "raise": "RecursionError: too deep",
        "memory": "MemoryError",
        # These end the process, and another one starts.
        "spin": "no verdict in 1 s",
        "crash": "the process crashed",
    }
    processes = (1, 1, 1, 2, 3)
    with Grader(seconds=1) as grader:
        for (answer, problem), started in zip(problems.items(), processes, strict=True):
            before, earlier = time.monotonic(), len(grader.problems)
            assert not grader.equal("math", "A", answer)
            # The limit holds, with room for a slow machine.
            assert time.monotonic() - before < 20
            *_, line = grader.problems.values()
            assert repr(answer) in line and problem in line
            right = answer[0]
            assert grader.equal("math", right.upper(), right) and not grader.equal(
                "math", "B", right
            )
            # Asked again it is known, and no second limit is waited for.
            assert not grader.equal("math", "A", answer)
            assert len(grader.problems) == earlier + 1
            assert len(list(tmp_path.glob("*.pid"))) == started
    for path in tmp_path.glob("*.pid"):
        assert not running(int(path.stem)), "the process outlives its grader"


@pytest.mark.usefixtures("compare")
def test_the_process_ends_with_its_parent(tmp_path: Path) -> None:
    """Killed by SIGKILL, a parent can't end it: it ends because its input does."""
    script = (
        "from iwsft.language.grading import TimedFunction\n"
        "compare = TimedFunction('scripted_comparison:compare')\n"
        "compare('A', 'a')\n"
        "print('ready', flush=True)\n"
        "import time; time.sleep(60)\n"
    )
    paths = os.pathsep.join(each or os.getcwd() for each in sys.path)
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": paths},
    )
    assert parent.stdout is not None and parent.stdout.readline() == b"ready\n"
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    (path,) = tmp_path.glob("*.pid")
    deadline = time.monotonic() + 20
    while running(int(path.stem)):
        assert time.monotonic() < deadline, "the process outlives its parent"
        time.sleep(0.05)


@pytest.mark.parametrize("place", ["no_such_module:compare", "broken_comparison:compare"])
def test_a_broken_import_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """Not a score of 0: a library that is missing would make every answer wrong."""
    (tmp_path / "broken_comparison.py").write_text(
        "def compare(correct, answer):\n    import no_such_library\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(grading, "_MATH_VERIFY", place)
    with Grader() as grader, pytest.raises(ImportError, match="pip install"):
        grader.start()


def test_the_process_loads_what_the_function_needs_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "looking.py").write_text(
        "import sys\n\ndef has(name):\n    return name in sys.modules\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    with TimedFunction("looking:has") as has:
        assert has("looking") == (1.0, None) and has("torch") == (0.0, None)


def running(pid: int) -> bool:
    """Whether a process is there; one that nobody has waited for counts as ended."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
