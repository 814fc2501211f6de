"""What a run records of the code that it runs on."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from iwsft import __version__

ROOT = Path(__file__).parents[2]
PACKAGES = ("iwsft", "benchmarks")


def told(folder: Path, **environment: str) -> str:
    """The version of iwsft that the packages in a folder record."""
    code = "from benchmarks.runs import versions; print(versions()['iwsft'])"
    return subprocess.check_output(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": str(folder), **environment},
        text=True,
    ).strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_of_a_checkout_is_recorded(tmp_path: Path) -> None:
    """With a mark where files differ from it; packages in a folder of a repository have none."""
    checkout, installed = tmp_path / "checkout", tmp_path / "checkout" / "venv"
    installed.mkdir(parents=True)
    for folder, name in ((each, name) for each in (checkout, installed) for name in PACKAGES):
        (folder / name).symlink_to(ROOT / name)

    def git(*words: str) -> str:
        who = ("-c", "user.name=me", "-c", "user.email=me@here")
        asked = ["git", *who, "-C", str(checkout), *words]
        return subprocess.check_output(asked, text=True).strip()

    git("init", "--quiet")
    (checkout / "file").write_text("a")
    git("add", "file")
    git("commit", "--quiet", "--message", "First")
    git("tag", "--annotate", "v9", "--message", "Ninth")
    commit = git("rev-parse", "--short", "HEAD")
    assert told(checkout) == f"{__version__}+{commit}"
    (checkout / "file").write_text("b")
    assert told(checkout) == f"{__version__}+{commit}-dirty"
    assert told(checkout, PATH="") == told(installed) == __version__
