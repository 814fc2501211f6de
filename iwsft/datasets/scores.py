"""D4RL's reference scores, against which returns are normalised."""

from __future__ import annotations

import functools
import json
from importlib import resources

from iwsft.datasets.catalog import CATALOG


def reference_scores(name_or_env_id: str) -> tuple[float, float] | None:
    """The (minimum, maximum) return that D4RL counts as 0 and 100 (https://arxiv.org/abs/2004.07219).

    Args:
        name_or_env_id: a D4RL name (``hopper-medium-v2``), or the gymnasium environment that a
            D4RL task runs in (``Hopper-v4``).

    Returns:
        The pair, or None where D4RL has none.
    """
    table = _table()
    if name_or_env_id in table:
        return table[name_or_env_id]
    for name, entry in CATALOG.items():
        if entry.env_id == name_or_env_id:
            return table[name]
    return None


@functools.cache
def _table() -> dict[str, tuple[float, float]]:
    text = (resources.files("iwsft.datasets") / "data" / "d4rl_reference_scores.json").read_text()
    return {name: (low, high) for name, (low, high) in json.loads(text)["scores"].items()}
