"""What ``--resume`` of a collection finds: a finished dataset, parts, and files of the user's."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from benchmarks.collect.__main__ import main
from benchmarks.collect.options import Options
from benchmarks.collect.output import Output

RANDOM: dict[str, Any] = {"policy": ("random",), "env": "InvertedPendulum-v4", "part_steps": 30}
SAC: dict[str, Any] = {"online": "sac", "env": "InvertedPendulum-v4", "random_steps": 20}


def collect(out: object, **settings: Any) -> None:
    main(Options(out=str(out), **settings))


@pytest.mark.parametrize(
    ("given", "other", "message"),
    [
        (RANDOM | {"episodes": (3,)}, {"seed": 7}, "seed=0 .now 7."),
        (RANDOM | {"episodes": (3,)}, {"episodes": (4,)}, "source 1.episodes=3 .now 4."),
        (RANDOM | {"episodes": (3,)}, {"env": "Hopper-v4"}, "env_id='InvertedPendulum-v4' .now"),
        (RANDOM | {"episodes": (3,)}, {"max_episode_steps": 2}, "env_kwargs.max_episode_steps="),
        (RANDOM | {"episodes": (3,)}, {"policy": ("random",) * 2}, "source 2.episodes=None .now 3"),
        (
            RANDOM | {"steps": (9,)},
            {"steps": (1100,)},
            "holds another collection: steps=.*now 1100",
        ),
        (SAC | {"steps": (40,)}, {"steps": (50,)}, "source 1.steps=40 .now 50."),
        (SAC | {"steps": (40,)}, {"random_steps": 30}, "source 1.random_steps=20 .now 30."),
    ],
)
def test_another_collection_is_not_taken_for_a_finished_one(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    given: dict[str, Any],
    other: dict[str, Any],
    message: str,
) -> None:
    out = tmp_path / "a.hdf5"
    collect(out, **given)
    before = out.read_bytes()
    with pytest.raises(SystemExit, match=message):
        collect(out, **given | other, resume=True)
    collect(out, **given, resume=True)
    assert "is finished; nothing to do" in capsys.readouterr().out
    assert out.read_bytes() == before


def test_another_collection_in_minari_s_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    out = "minari:made/set-v0"
    collect(out, **RANDOM, episodes=(3,))
    collect(out, **RANDOM, episodes=(3,), resume=True)
    with pytest.raises(SystemExit, match="seed=0 .now 7."):
        collect(out, **RANDOM, episodes=(3,), seed=7, resume=True)


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A collection that was cut off when all its parts were written."""

    def fail(*_: Any) -> None:
        raise OSError("the disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(Output, "rehearse", lambda *_: None)
        patch.setattr(Output, "write", fail)
        with pytest.raises(SystemExit, match="the disk is gone"):
            collect(tmp_path / "a.hdf5", **RANDOM, episodes=(100,))
    assert len([*(tmp_path / "a.hdf5.partial").glob("part-*.npz")]) > 3
    return tmp_path / "a.hdf5"


def test_a_file_in_its_place_does_not_delete_what_was_begun(begun: Path, tmp_path: Path) -> None:
    collect(tmp_path / "other.hdf5", **RANDOM, episodes=(3,))
    shutil.move(tmp_path / "other.hdf5", begun)
    with pytest.raises(SystemExit, match="a.hdf5 holds another collection: source 1.episodes=3"):
        collect(begun, **RANDOM, episodes=(100,), resume=True)
    begun.unlink()
    collect(begun, **RANDOM, episodes=(100,), resume=True)
    collect(tmp_path / "whole.hdf5", **RANDOM, episodes=(100,))
    assert begun.read_bytes() == (tmp_path / "whole.hdf5").read_bytes()


@pytest.mark.parametrize("lost", ["part-000000.npz", "part-000001.npz"])
def test_a_part_that_is_gone_is_named(begun: Path, tmp_path: Path, lost: str) -> None:
    parts = tmp_path / "a.hdf5.partial"
    (parts / lost).unlink()
    with pytest.raises(SystemExit, match=f"{lost} is missing; put it back, or delete the later"):
        collect(begun, **RANDOM, episodes=(100,), resume=True)
    for path in parts.glob("part-*.npz"):
        if path.name > lost:
            path.unlink()
    collect(begun, **RANDOM, episodes=(100,), resume=True)
    collect(tmp_path / "whole.hdf5", **RANDOM, episodes=(100,))
    assert begun.read_bytes() == (tmp_path / "whole.hdf5").read_bytes()


def test_copies_of_parts_are_not_read(begun: Path, tmp_path: Path) -> None:
    """As programs that keep folders in step leave them."""
    parts = tmp_path / "a.hdf5.partial"
    for copy in ("part-000001 (1).npz", "part-000001.sync-conflict-20260101.npz", ".DS_Store"):
        shutil.copy(parts / "part-000001.npz", parts / copy)
    collect(begun, **RANDOM, episodes=(100,), resume=True)
    collect(tmp_path / "whole.hdf5", **RANDOM, episodes=(100,))
    assert begun.read_bytes() == (tmp_path / "whole.hdf5").read_bytes()
