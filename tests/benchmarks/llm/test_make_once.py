"""Cached folders are made once and whole, and are checked when they are used again."""

from __future__ import annotations

import errno
import json
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from benchmarks.llm.models import make_once


def _make(folder: Path) -> Mapping[str, Any]:
    (folder / "a").write_bytes(b"abc")
    (folder / "inner").mkdir()
    (folder / "inner" / "b").write_bytes(b"")
    return {"note": 1}


def test_a_folder_is_made_once_and_recorded(tmp_path: Path):
    made = []

    def make(folder: Path) -> Mapping[str, Any]:
        made.append(folder)
        time.sleep(0.2)
        return _make(folder)

    home = tmp_path / "deep" / "home"
    found: list[Path] = []
    threads = [
        threading.Thread(target=lambda: found.append(make_once(home, make))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [home] * 3 and len(made) == 1
    # SHA-256 of "abc" and of nothing, as published with the standard (FIPS 180-2).
    assert json.loads((home / "record.json").read_text()) == {
        "note": 1,
        "sha256": {
            "a": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
            "inner/b": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
        },
    }


@pytest.mark.parametrize("change", ["other", "missing", "new", "record", "no record"])
def test_a_change_is_noticed_and_the_remedy_named(change: str, tmp_path: Path):
    home = make_once(tmp_path / "home", _make)
    if change == "other":
        (home / "inner" / "b").write_bytes(b"x")
    elif change == "missing":
        (home / "inner" / "b").unlink()
    elif change == "new":
        (home / "inner" / "c").touch()
    elif change == "record":
        (home / "record.json").write_text('{"sha256": 3}')
    else:
        (home / "record.json").unlink()
    named = "record.json" if "record" in change else "inner/c" if change == "new" else "inner/b"
    with pytest.raises(ValueError, match=rf"{named}.*delete the folder and run again"):
        make_once(home, _make)


def test_a_failed_or_killed_call_leaves_no_folder(tmp_path: Path):
    def fails(folder: Path) -> Mapping[str, Any]:
        _make(folder)
        raise OSError(errno.ENOSPC, "No space left on device")

    home = tmp_path / "home"
    with pytest.raises(OSError, match=r"no space left to write .*home"):
        make_once(home, fails)
    assert not home.exists()
    assert [path.name for path in tmp_path.iterdir()] == [".home.lock"]
    # A kill midway leaves such a folder.
    (tmp_path / ".home.partial").mkdir()
    (tmp_path / ".home.partial" / "stale").touch()
    make_once(home, _make)
    assert sorted(path.name for path in home.iterdir()) == ["a", "inner", "record.json"]
    assert not (tmp_path / ".home.partial").exists()
