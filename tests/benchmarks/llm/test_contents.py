"""Model and rows of a run that have moved or changed under their names."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.llm.contents import changed_source, contents_of, moved_sources
from benchmarks.llm.launch import Launch
from benchmarks.llm.options import Options
from benchmarks.llm.recipes.chat import RECIPE
from benchmarks.llm.run import Run


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """A run on the rows of a folder, which are two splits, with its ``config.json``."""
    monkeypatch.chdir(tmp_path)
    Path("rows").mkdir()
    for split in ("train", "test"):
        Path("rows", f"{split}.jsonl").write_text(json.dumps({"prompt": split, "completion": "1"}))
    options = Options(data="rows:train", out=tmp_path / "runs", settings=RECIPE.defaults)
    run = Run("chat", "sft", 0, options, Launch("single"))
    settings = {"data": "rows:train", **contents_of(run)}
    run.folder.mkdir(parents=True)
    (run.folder / "config.json").write_text(json.dumps({"settings": settings}))
    return run


def given(run: Run, data: str) -> Run:
    return replace(run, options=replace(run.options, data=data))


def test_the_same_rows_elsewhere_keep_their_name(begun: Run, tmp_path: Path) -> None:
    Path("rows").rename("moved")
    for data, known in (
        ("moved:train", {"data": "rows:train"}),
        (f"{tmp_path}/moved:train", {"data": "rows:train"}),
        # Other rows of the same folder.
        ("moved:test", {}),
    ):
        run = given(begun, data)
        assert moved_sources(run, contents_of(run)) == known
    Path("moved/test.jsonl").write_text("other")
    run = given(begun, "moved:train")
    assert moved_sources(run, contents_of(run)) == {}


def test_rows_that_change_are_named(begun: Run) -> None:
    assert changed_source(begun) is None
    Path("rows/train.jsonl").write_text("other")
    assert changed_source(begun) == Path("rows")
