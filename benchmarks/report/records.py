"""Every run of a report as one line of JSON: what it was, what it scored, what it cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from benchmarks.report.language import Recipe
from benchmarks.report.provenance import Recorded, shareable
from benchmarks.results import FinishedRun

# What each episode gave stays with the run.
_EPISODES = ("episode_scores", "episode_returns", "episode_lengths", "episode_successes")


def records(runs: Sequence[FinishedRun], recipes: Sequence[Recipe]) -> str:
    """A JSON array, a run a line: the result without its episodes, settings, versions, command."""
    held = [_record(run, run.variant) for run in runs]
    held += [_record(run, recipe.variant) for recipe in recipes for run in recipe.runs]
    return "[\n" + ",\n".join(map(json.dumps, held)) + "\n]\n"


def _record(run: Recorded, variant: str) -> dict[str, Any]:
    result = {name: value for name, value in run.result.items() if name not in _EPISODES}
    return {
        **({"variant": variant} if variant else {}),
        **result,
        "settings": run.config.get("settings"),
        "versions": run.versions,
        "hardware": run.config.get("hardware"),
        "command": shareable(run.config["command"]) if "command" in run.config else None,
    }
