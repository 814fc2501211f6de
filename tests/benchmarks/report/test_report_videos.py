from __future__ import annotations

import base64
from pathlib import Path

from benchmarks.report.page import write_report
from tests.benchmarks.report.conftest import MakeRun


def test_a_page_plays_one_video_of_each_algorithm(make_run: MakeRun, tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    for seed in (1, 2, 3):
        for algo in ("sft-q", "iw-sft-q", "bc"):
            folder = make_run(runs, "hopper-a", algo, seed, 50.0 + seed)
            if algo != "bc":
                (folder / "video.mp4").write_bytes(f"{algo} {seed}".encode())
    page = write_report(runs, tmp_path / "report").page.read_text()
    for algo in ("sft-q", "iw-sft-q"):
        for seed in (1, 2, 3):
            data = base64.b64encode(f"{algo} {seed}".encode()).decode()
            assert (f'src="data:video/mp4;base64,{data}"' in page) == (seed == 1)
    assert page.count("<video") == 2 and page.endswith("</html>\n")
    # The browser may play them.
    assert "media-src data:" in page
    for video in runs.rglob("video.mp4"):
        video.unlink()
    assert "<video" not in write_report(runs, tmp_path / "report").page.read_text()
