"""Small D4RL files and a real HTTP server on this machine."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

Fields = dict[str, Any]


@pytest.fixture(scope="session")
def episode_fields() -> Callable[..., Fields]:
    """Fields of random steps; odd episodes end by a timeout, even ones by a terminal."""

    def make(lengths: list[int], *, obs: int = 3, act: int = 2) -> Fields:
        rng = np.random.default_rng(0)
        rows = sum(lengths)
        ends = np.cumsum(lengths) - 1
        terminals, timeouts = np.zeros(rows, bool), np.zeros(rows, bool)
        terminals[ends[0::2]] = True
        timeouts[ends[1::2]] = True
        return {
            "observations": rng.normal(size=(rows, obs)).astype(np.float32),
            "actions": rng.uniform(-1, 1, size=(rows, act)).astype(np.float32),
            "rewards": rng.normal(size=rows).astype(np.float32),
            "terminals": terminals,
            "timeouts": timeouts,
        }

    return make


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Write fields as an HDF5 file; keywords are attributes."""

    def write(fields: Fields, name: str = "mine.hdf5", **attributes: Any) -> Path:
        path = tmp_path / name
        with h5py.File(path, "w") as file:
            for key, values in fields.items():
                file[key] = values
            file.attrs.update(attributes)
        return path

    return write


@dataclass
class Served:
    """What the server does and what it saw.

    ``breaks`` holds, for the coming requests, how many bytes of the body to send before the
    connection is cut; an empty list means all of them.
    """

    content: bytes = b""
    breaks: list[int] = field(default_factory=list)
    ranges: bool = True
    announce: int | None = None
    status: int = 200
    base: str = ""
    requests: list[tuple[str, str | None]] = field(default_factory=list)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    """An HTTP server with Range support that can break in the middle of a body."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    served = Served()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked = self.headers.get("Range")
            served.requests.append((self.path, asked))
            start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
            total = len(served.content)
            if served.status != 200:
                self.send_error(served.status)
                return
            if served.ranges and start >= total > 0:
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{total}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if served.ranges and asked:
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
            else:
                start = 0
                self.send_response(200)
            self.send_header("Content-Length", str(served.announce or total - start))
            self.end_headers()
            limit = served.breaks.pop(0) if served.breaks else total
            self.wfile.write(served.content[start : start + limit])

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        served.base = f"http://127.0.0.1:{httpd.server_port}"
        thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield served
        httpd.shutdown()
        thread.join()
