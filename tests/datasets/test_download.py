"""Downloads over real HTTP resume, are checked, try the next mirror, and leave only whole files."""

from __future__ import annotations

import errno
import hashlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from iwsft import datasets
from iwsft.datasets.download import ATTEMPTS, fetch

if TYPE_CHECKING:
    from tests.datasets.conftest import Served

Make = Callable[..., dict[str, Any]]

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def served(server: Served) -> Served:
    server.content = CONTENT
    return server


@pytest.fixture
def dead_url() -> str:
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}/a.bin"


def parts(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.part"))


def test_a_whole_file(served: Served, tmp_path: Path) -> None:
    target = tmp_path / "new" / "folder" / "a.bin"
    url = f"{served.base}/a.bin"
    fetch([url], target, sha256=SHA256, signature=b"\0\1")
    assert target.read_bytes() == CONTENT
    assert not parts(target.parent)
    fetch([url], target)
    assert served.requests == [("/a.bin", None)]  # the second call needs no network


def test_a_break_is_resumed_within_a_call(served: Served, tmp_path: Path) -> None:
    served.breaks = [300_000, 200_000]
    target = tmp_path / "a.bin"
    fetch([f"{served.base}/a.bin"], target, sha256=SHA256)
    assert target.read_bytes() == CONTENT
    assert [asked for _, asked in served.requests] == [None, "bytes=300000-", "bytes=500000-"]


def test_a_broken_download_is_kept_and_resumed_by_the_next_call(
    served: Served, tmp_path: Path
) -> None:
    served.breaks = [100_000] * ATTEMPTS
    target, url = tmp_path / "a.bin", f"{served.base}/a.bin"
    with pytest.raises(ConnectionError) as caught:
        fetch([url], target, sha256=SHA256)
    (part,) = parts(tmp_path)
    message = str(caught.value)
    for words in (url, f"{100_000 * ATTEMPTS:,} of {len(CONTENT):,} bytes", str(part), "again"):
        assert words in message
    assert not target.exists()
    assert part.read_bytes() == CONTENT[: 100_000 * ATTEMPTS]

    served.requests.clear()
    fetch([url], target, sha256=SHA256)
    assert target.read_bytes() == CONTENT
    assert served.requests == [("/a.bin", f"bytes={100_000 * ATTEMPTS}-")]
    assert not parts(tmp_path)


def test_a_part_that_is_complete_needs_no_more_bytes(served: Served, tmp_path: Path) -> None:
    target, url = tmp_path / "a.bin", f"{served.base}/a.bin"
    served.breaks = [len(CONTENT) - 1, 0]
    with pytest.raises(ConnectionError):
        fetch([url], target)
    (part,) = parts(tmp_path)
    part.write_bytes(CONTENT)
    fetch([url], target, sha256=SHA256)
    assert target.read_bytes() == CONTENT


def test_a_part_longer_than_the_file_is_thrown_away(served: Served, tmp_path: Path) -> None:
    target, url = tmp_path / "a.bin", f"{served.base}/a.bin"
    served.breaks = [10, 0]
    with pytest.raises(ConnectionError):
        fetch([url], target)
    parts(tmp_path)[0].write_bytes(CONTENT + b"more")
    fetch([url], target, sha256=SHA256)
    assert target.read_bytes() == CONTENT


def test_a_server_without_ranges_starts_anew(served: Served, tmp_path: Path) -> None:
    served.ranges = False
    served.breaks = [300_000]
    target = tmp_path / "a.bin"
    fetch([f"{served.base}/a.bin"], target, sha256=SHA256)
    assert target.read_bytes() == CONTENT


def test_the_next_mirror_takes_over(served: Served, dead_url: str, tmp_path: Path) -> None:
    target = tmp_path / "a.bin"
    fetch([dead_url, f"{served.base}/b.bin"], target, sha256=SHA256)
    assert target.read_bytes() == CONTENT


def test_all_mirrors_down(served: Served, dead_url: str, tmp_path: Path) -> None:
    served.status = 404
    url = f"{served.base}/gone.bin"
    with pytest.raises(ConnectionError) as caught:
        fetch([dead_url, url], tmp_path / "a.bin")
    message = str(caught.value)
    assert f"{dead_url}: " in message
    assert "refused" in message
    assert f"{url}: HTTP Error 404" in message
    assert f"put the file at {tmp_path}" in message
    assert not parts(tmp_path)


@pytest.mark.parametrize(
    ("checks", "fault"),
    [
        ({"sha256": "0" * 64}, f"SHA-256 {SHA256}, expected 0000"),
        ({"signature": b"\x89HDF"}, "of another format"),
    ],
)
def test_a_wrong_file_never_arrives(
    served: Served, tmp_path: Path, checks: dict[str, object], fault: str
) -> None:
    target = tmp_path / "a.bin"
    with pytest.raises(ConnectionError, match=fault):
        fetch([f"{served.base}/a.bin"], target, **checks)  # type: ignore[arg-type]
    assert not target.exists()
    assert not parts(tmp_path)  # its bytes are wrong: nothing to resume


def test_a_full_disk_while_writing(
    served: Served, tmp_path: Path, full_device: Callable[[Path], None]
) -> None:
    target, url = tmp_path / "a.bin", f"{served.base}/a.bin"
    served.breaks = [10, 0]
    with pytest.raises(ConnectionError):
        fetch([url], target)
    full_device(parts(tmp_path)[0])
    with pytest.raises(OSError, match=r"disk is full.*IWSFT_CACHE") as caught:
        fetch([url], target)
    assert caught.value.errno == errno.ENOSPC
    assert not target.exists()


@pytest.fixture
def full_device() -> Callable[[Path], None]:
    """Put the device on which every write fails for lack of space in place of a file."""

    def replace(path: Path) -> None:
        path.unlink()
        path.symlink_to("/dev/full")

    return replace


def test_a_file_larger_than_the_disk_is_refused_at_once(served: Served, tmp_path: Path) -> None:
    served.announce = 10**18
    with pytest.raises(OSError, match=r"1(,000){6} bytes are missing and [\d,]+ are"):
        fetch([f"{served.base}/a.bin"], tmp_path / "a.bin")
    assert not parts(tmp_path)


def test_two_at_once_download_once(served: Served, tmp_path: Path) -> None:
    target, url = tmp_path / "a.bin", f"{served.base}/a.bin"
    threads = [threading.Thread(target=fetch, args=([url], target)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_bytes() == CONTENT
    assert len(served.requests) == 1


def test_d4rl_by_name(
    episode_fields: Make,
    server: Served,
    dead_url: str,
    write: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write(episode_fields([5, 3], obs=11, act=3))
    server.content = path.read_bytes()
    mirrors = f"{dead_url.removesuffix('/a.bin')}, {server.base}/mirror/"
    monkeypatch.setenv("IWSFT_D4RL_MIRRORS", mirrors)
    monkeypatch.setenv("IWSFT_CACHE", str(tmp_path / "cache"))
    first = datasets.load("hopper-medium-replay-v2")
    assert server.requests == [("/mirror/hopper_medium_replay-v2.hdf5", None)]
    assert (first.name, first.env_id) == ("hopper-medium-replay-v2", "Hopper-v4")
    assert first.reference_scores == (-20.272305, 3234.3)
    assert first.source.endswith("gym_mujoco_v2/hopper_medium_replay-v2.hdf5")
    assert first.fingerprint == datasets.load(path).fingerprint

    again = datasets.load("hopper-medium-replay-v2", cache_dir=tmp_path / "cache")
    assert again.fingerprint == first.fingerprint
    assert len(server.requests) == 1
