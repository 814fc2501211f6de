"""The algorithms that iw-SFT is compared with: a file each, and one line here.

    from baselines import algorithm

    iql = algorithm("iql")
    settings, source = iql.published("hopper-medium-replay-v2")
    learner = iql.build(dataset.trajectories, settings, seed=0)
    learner.fit()

``docs/extending.md`` says how to add one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from baselines.learner import Baseline as Baseline
    from baselines.learner import Learner as Learner

__all__ = ["BASELINES", "Baseline", "Learner", "algorithm"]

# The module of each algorithm; it is imported when it is used.
BASELINES = {
    "awac": "baselines.awac",
    "iql": "baselines.iql",
    "td3-bc": "baselines.td3_bc",
    "rebrac": "baselines.rebrac",
    "cql": "baselines.cql",
    "dt": "baselines.dt",
}


def algorithm(name: str) -> Baseline:
    """Return the module of a name in ``BASELINES``.

    Raises:
        ValueError: An unknown name.
    """
    if name not in BASELINES:
        raise ValueError(f"unknown baseline {name!r}; there are {', '.join(BASELINES)}")
    return import_module(BASELINES[name])


def __getattr__(name: str) -> Any:
    # torch loads with the first use of these.
    if name in ("Baseline", "Learner"):
        return getattr(import_module("baselines.learner"), name)
    raise AttributeError(f"module 'baselines' has no attribute {name!r}")
