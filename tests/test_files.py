"""Files are written whole or not at all."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path

import pytest

from iwsft.files import alone_in, full_disk_named, new_partial, written_whole


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


def write(path: Path, content: bytes, times: int = 30) -> None:
    for _ in range(times):
        with written_whole(path) as part:
            part.write_bytes(content)
            assert part.read_bytes() == content


@pytest.mark.parametrize("pid", [None, 1, 2**22 + 1])
def test_writers_do_not_share_a_partial_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pid: int | None
) -> None:
    """Threads, and processes of one id in their containers, that of a living or a dead one here."""
    path, contents = tmp_path / "state", [bytes([i]) * 100_000 for i in range(4)]
    if pid is None:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(partial(write, path), contents))
    else:
        monkeypatch.setattr(os, "getpid", lambda: pid)
        children = []
        for content in contents:
            child = os.fork()
            if child == 0:
                try:
                    write(path, content)
                    os._exit(0)
                finally:
                    os._exit(1)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 4
    assert path.read_bytes() in contents
    assert os.listdir(tmp_path) == ["state"]


def test_partial_files_of_killed_writers_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "[state].pt"
    for _ in range(2):
        child = os.fork()
        if child == 0:
            with written_whole(path) as partial_file:
                partial_file.write_text("half")
                os.kill(os.getpid(), signal.SIGKILL)
        os.waitpid(child, 0)
    other = tmp_path / ".other.pt.1.partial"
    elsewhere = [tmp_path / f".[state].pt.{name}.partial" for name in ("0badc0de-7-aa", "77")]
    for file in (other, *elsewhere):
        file.write_text("half")
    assert len(os.listdir(tmp_path)) == 4
    with written_whole(path) as partial_file:
        partial_file.write_text("whole")
        # One that is being written stays.
        with written_whole(path) as inner:
            inner.write_text("inner")
            assert partial_file.exists()
    # Those of other machines stay for a day.
    assert {*tmp_path.iterdir()} == {path, other, *elsewhere}
    for file in (other, *elsewhere):
        os.utime(file, (0, 0))
    write(path, b"again", 1)
    assert {*tmp_path.iterdir()} == {path, other}


def test_partial_folders_of_killed_writers_are_removed(tmp_path: Path) -> None:
    path = tmp_path / "store"
    child = os.fork()
    if child == 0:
        new_partial(path).mkdir()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    assert len(os.listdir(tmp_path)) == 1
    new_partial(path).mkdir()
    # That of this process stays.
    assert new_partial(path).name != os.listdir(tmp_path)[0] and len(os.listdir(tmp_path)) == 1


def test_a_folder_that_can_not_be_written_is_read_without_a_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with alone_in(tmp_path, wait=False):
        assert not list(tmp_path.iterdir())
    with alone_in(tmp_path / "writable", wait=False):
        assert (tmp_path / "writable" / ".lock").exists()
