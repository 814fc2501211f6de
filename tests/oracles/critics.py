"""The plain implementations of the baselines with critics, by the baseline's name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from baselines.learner import Learner
from tests.oracles.awac import PlainAWAC
from tests.oracles.cql import PlainCQL
from tests.oracles.iql import PlainIQL
from tests.oracles.networks import PlainLearner
from tests.oracles.rebrac import PlainReBRAC
from tests.oracles.td3_bc import PlainTD3BC

PLAIN: Mapping[str, Callable[[Learner, Any], PlainLearner]] = {
    "iql": PlainIQL,
    "awac": PlainAWAC,
    "td3-bc": PlainTD3BC,
    "rebrac": PlainReBRAC,
    "cql": PlainCQL,
}
