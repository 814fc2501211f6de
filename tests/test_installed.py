"""The package as pip installs it: its files, its commands from an empty folder, its types."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from tests import tiny_qwen2

ROOT = Path(__file__).parents[1]
PACKAGES = ("iwsft", "baselines", "benchmarks")
# Of the shell, without what would lead to the checkout.
CLEAN = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}


def run(*words: object, cwd: Path) -> str:
    """Run a command; what it wrote to the terminal."""
    done = subprocess.run(list(map(str, words)), cwd=cwd, env=CLEAN, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, out: Path) -> Path:
    """Build a distribution of a source tree, as pip does, and return its file."""
    out.mkdir()
    call = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    run(sys.executable, "-c", call, cwd=source)
    (file,) = out.iterdir()
    return file


def install(wheel: Path, home: Path) -> Path:
    """Install into a fresh environment that has the packages of this one; its programs' folder."""
    run(sys.executable, "-m", "venv", "--without-pip", home, cwd=home.parent)
    here, there = (
        Path(sysconfig.get_path("purelib", vars={"base": base})) for base in (sys.prefix, home)
    )
    # Python does not read the .pth files of a folder that is named in one.
    (there / "installed.pth").write_text(f"{here}\n")
    pip = [sys.executable, "-m", "pip", "--python", home / "bin/python", "install", "--quiet"]
    run(*pip, "--no-deps", "--no-index", "--ignore-installed", wheel, cwd=home.parent)
    return home / "bin"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what distributions are made of; a build writes into it."""
    folder = tmp_path_factory.mktemp("source")
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for file in (file for file in ROOT.iterdir() if file.is_file()):
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the source distribution."""
    folder = tmp_path_factory.mktemp("built")
    sdist = build("sdist", source, folder / "sdist")
    # The module's own command: its filters of files are new in Python 3.11.4.
    unpack = [sys.executable, "-m", "tarfile", "-e", str(sdist), str(folder / "unpacked")]
    subprocess.run(unpack, check=True)
    (unpacked,) = (folder / "unpacked").iterdir()
    return build("wheel", unpacked, folder / "wheel")


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the programs of an environment with the wheel."""
    return install(wheel, tmp_path_factory.mktemp("installed") / "venv")


def test_the_wheel_has_every_file_of_the_packages(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    files = (path for name in PACKAGES for path in (ROOT / name).rglob("*") if path.is_file())
    expected = {str(path.relative_to(ROOT)) for path in files if "__pycache__" not in path.parts}
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_metadata(programs: Path, tmp_path: Path) -> None:
    code = "import iwsft; from importlib.metadata import metadata; print(iwsft.__file__)\n"
    code += "print(iwsft.__version__, metadata('iwsft')['Version'])"
    file, versions = run(programs / "python", "-c", code, cwd=tmp_path).splitlines()
    assert Path(file).is_relative_to(programs.parent)
    one, other = versions.split()
    assert one == other == run(programs / "iwsft", "--version", cwd=tmp_path).split()[1]
    assert f"torch {metadata.version('torch')}" in run(programs / "iwsft", "env", cwd=tmp_path)


def test_jobs_of_control_and_language_in_one_process(programs: Path, tmp_path: Path) -> None:
    tiny_qwen2.write(tmp_path / "model")
    with (tmp_path / "rows.jsonl").open("w") as file:
        for number in range(40):
            for answer in (2 * number, number + 1):
                row = {"prompt": f"{number} + {number} =", "completion": f" {answer}"}
                file.write(json.dumps({**row, "correct": answer == 2 * number}) + "\n")
    few = "--reference-steps 2 --steps 2 --eval-episodes 1 --curve-episodes 0"
    commands = (
        f"d4rl --algo iw-sft-q {few}",
        "report runs",
        "finetune --model model --data rows.jsonl --max-steps 2 --jobs 1",
    )
    call = "import sys; from benchmarks.__main__ import main\n"
    for command in commands:
        call += f"sys.argv = ['iwsft', *{command.split()}]; main()\n"
    run(programs / "python", "-c", call, cwd=tmp_path)
    control, language = (
        json.loads((tmp_path / "runs" / folder / "seed-0/result.json").read_text())
        for folder in ("d4rl/hopper-replay-mini/iw-sft-q", "llm/chat/iw-sft")
    )
    assert control["episodes"] == 1 and language["steps"] == 2
    assert "iw-SFT(Q)" in (tmp_path / "runs/report/index.html").read_text()


def test_mypy_finds_an_editable_install(
    source: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("editable")
    programs = install(build("editable", source, folder / "wheel"), folder / "venv")
    (folder / "own.py").write_text("from iwsft import weights\n\nweights.Temperature(1.0)\n")
    options = ("--follow-imports=skip", f"--python-executable={programs / 'python'}")
    run(sys.executable, "-m", "mypy", *options, "own.py", cwd=folder)
