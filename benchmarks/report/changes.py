"""What training changed in the log-likelihood of a test."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from benchmarks.statistics import t_interval


def change_line(result: Mapping[str, Any], base: Mapping[str, Any] | None) -> str | None:
    """How the log-likelihood of a token changed from the base, paired by prompt, in a sentence.

    None where one of the two has no log-probs by prompt.
    """
    if base is None or "log_probs" not in result or "log_probs" not in base:
        return None
    differences = np.subtract(result["log_probs"], base["log_probs"])
    low, high = t_interval(differences)
    interval = f"95 % interval {low:+.3f} to {high:+.3f}" if len(differences) > 1 else "no interval"
    return (
        f"{result['algo']} seed {result['seed']}: log-likelihood of a token {base['log_prob']:.3f} "
        f"-> {result['log_prob']:.3f}, change {differences.mean():+.3f} ({interval}, "
        f"prompts: {result['n']})"
    )
