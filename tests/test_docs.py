"""The Python of the pages for newcomers runs as it is."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from iwsft import GaussianPolicy
from iwsft.evaluation import Evaluation
from iwsft.trained_policy import TrainedPolicy, save_policy

DOCS = Path(__file__).parents[1] / "docs"


def blocks(page: str) -> list[str]:
    """The blocks of Python of a page."""
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.DOTALL)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_rows_of_tables_have_the_cells_of_their_headings() -> None:
    for path in (DOCS.parent / "README.md", *sorted(DOCS.rglob("*.md"))):
        text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
        for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
            cells = [len(re.split(r"(?<!\\)\|", line)) for line in table.splitlines()]
            assert len(set(cells)) == 1, f"{path.name}: {table.splitlines()[0]}"


def test_links_to_a_section_lead_to_its_heading() -> None:
    for path in (DOCS.parent / "README.md", *sorted(DOCS.glob("*.md"))):
        for name, anchor in re.findall(r"\]\((?!http)([^)#\s]*)#([^)\s]+)\)", path.read_text()):
            target = path.parent / name if name else path
            titles = re.findall(r"^#+ (.*)", target.read_text(), re.MULTILINE)
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert anchor in anchors, f"{path.name}: {name}#{anchor}"


def test_names_of_functions_in_the_guide_for_contributors_are_those_of_the_code() -> None:
    root = DOCS.parent
    packages = (root / name for name in ("iwsft", "baselines", "benchmarks"))
    code = "".join(path.read_text() for package in packages for path in package.rglob("*.py"))
    defined = set(re.findall(r"(?:def|class) (\w+)", code))
    text = (root / "CONTRIBUTING.md").read_text()
    ways = text.partition("## The way of a control run")[2].partition("## Each word")[0]
    named = set(re.findall(r"`(?:[\w.]+\.)?([A-Z]\w+|\w+_\w+)`", ways))
    assert len(named) > 10 and named <= defined, named - defined


def test_the_quickstart_finds_what_it_trained(folder: Path) -> None:
    (code,) = blocks("quickstart.md")
    names: dict[str, Any] = {}
    exec(code.replace("steps=300", "steps=30"), names)
    trained, loaded = names["policy"].state_dict(), names["again"].state_dict()
    assert all(torch.equal(trained[name], loaded[name]) for name in trained)
    assert (folder / "cloned" / "checkpoint" / "state.pt").exists()


def test_the_page_after_training_acts_scores_films_and_exports(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    run = folder / "runs" / "d4rl" / "hopper-replay-mini" / "iw-sft-q" / "seed-0"
    policy = TrainedPolicy(GaussianPolicy(11, 3), "Hopper-v4", {}, (-20.0, 3234.0), 11)
    save_policy(run, policy, algo="iw-sft-q", action_dim=3)
    scored: list[Evaluation] = []
    names: dict[str, Any] = {"print": scored.append}
    for code in blocks("after_training.md"):
        if "video=" in code and find_spec("imageio_ffmpeg") is None:
            continue
        exec(code, names)
    assert names["over"]
    assert len(scored[0].returns) == 20 and scored[0].score is not None
    assert names["actions"].shape == (1, 3)
    assert (folder / "hopper.mp4").exists() == (find_spec("imageio_ffmpeg") is not None)
