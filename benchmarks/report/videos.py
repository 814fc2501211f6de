"""Videos of runs in a report's page."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from benchmarks.report.scores import algorithm_label, dataset_label
from benchmarks.results import RecordedRun
from benchmarks.runs import VIDEO

# A page with larger videos would be slow to load.
_LARGEST = 4_000_000


def video_section(runs: Sequence[RecordedRun]) -> str:
    """HTML with one video of each algorithm and dataset; empty without any."""
    first: dict[tuple[str, str], RecordedRun] = {}
    for run in sorted(runs, key=lambda run: run.seed):
        file = run.folder / VIDEO
        if file.is_file() and file.stat().st_size <= _LARGEST:
            first.setdefault((run.dataset, run.algo), run)
    parts = ['<h2 id="videos">Videos</h2>', "<p>The first episode of the final score.</p>"]
    for (dataset, algo), run in first.items():
        data = base64.b64encode((run.folder / VIDEO).read_bytes()).decode()
        words = escape(f"{dataset_label(dataset)}, {algorithm_label(algo)}, seed {run.seed}")
        parts.append(
            f'<figure><video controls style="max-width: 100%" src="data:video/mp4;base64,{data}">'
            f"</video><figcaption>{words}</figcaption></figure>"
        )
    return "\n".join([*parts, ""]) if first else ""
