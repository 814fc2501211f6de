"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from iwsft.files import full_disk_named, written_whole


def test_new_content_appears_at_the_end_and_nothing_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "state"
    with written_whole(path) as partial:
        partial.write_text("first")
        assert not path.exists()
    with written_whole(path) as partial:
        partial.write_text("second")
        assert path.read_text() == "first"
    assert path.read_text() == "second"
    assert os.listdir(path.parent) == ["state"]


@pytest.mark.parametrize("error", [ValueError("a bug"), KeyboardInterrupt(), OSError(5, "broken")])
def test_an_error_on_the_way_leaves_the_old_content(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "state"
    path.write_text("old")
    with pytest.raises(type(error)) as raised, written_whole(path) as partial:
        partial.write_text("half")
        raise error
    assert raised.value is error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state"]


def test_a_full_disk_names_the_file_and_leaves_the_old_content(
    tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    path = tmp_path / "state"
    path.write_text("old")
    with (
        full_disk(1000),
        pytest.raises(OSError, match=f"no space left.*{path}.*--resume") as error,
        written_whole(path) as partial,
    ):
        partial.write_bytes(b"x" * 5000)
    assert error.value.errno == errno.EFBIG
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_every_kind_of_full_is_named(number: int) -> None:
    with (
        pytest.raises(OSError, match="no space left to write here") as error,
        full_disk_named(Path("here")),
    ):
        raise OSError(number, "as the system says it")
    assert error.value.errno == number


def test_other_errors_of_the_system_pass_as_they_are() -> None:
    with pytest.raises(PermissionError, match="^.Errno 13. no$"), full_disk_named(Path("here")):
        raise PermissionError(errno.EACCES, "no")
