"""The algorithms of ``python -m benchmarks.llm``: settings of one path, by name."""

from __future__ import annotations

import difflib
from dataclasses import dataclass

from benchmarks.llm.recipes.recipe import Defaults
from iwsft.objective import Proposal
from iwsft.weights import ImportanceWeights

# The model as it is, tested alone.
BASE = "base"


@dataclass(frozen=True)
class Algorithm:
    """What a name stands for.

    Attributes:
        describe: what it is, in a few words.
        proposal: what q is, see :class:`iwsft.language.config.ImportanceWeightedConfig`.
        quality: train on D_Q+, where better rows count several times, instead of D+.
        per_step: each token's ratio weighs its own loss, instead of the trajectory's.
    """

    describe: str
    proposal: Proposal
    quality: bool = False
    per_step: bool = False

    @property
    def weighted(self) -> bool:
        """Whether trajectories are weighed as wholes."""
        return self.proposal != "reference" and not self.per_step

    def cuts(self, settings: Defaults) -> tuple[float, ...]:
        """Percentiles of the scores that curate the rows; none keeps all once."""
        return settings.quality_cuts if self.quality else settings.cuts

    def weights(self, settings: Defaults) -> ImportanceWeights:
        """From log-ratios to weights."""
        return settings.importance_weights(per_step=self.per_step)


ALGORITHMS = {
    "sft": Algorithm("SFT on D+", "reference"),
    "sft-q": Algorithm("SFT on D_Q+", "reference", quality=True),
    "iw-sft": Algorithm("iw-SFT, q = theta", "current"),
    "iw-sft-hard": Algorithm("iw-SFT, q = theta at the last sync", "cached"),
    "iw-sft-ema": Algorithm("iw-SFT, q = moving average of theta", "lagged"),
    "iw-sft-q": Algorithm("iw-SFT on D_Q+, q = theta", "current", quality=True),
    "iw-sft-step": Algorithm("iw-SFT step by step", "current", per_step=True),
}
NAMES = (BASE, *ALGORITHMS)
DEFAULT = (BASE, "sft", "sft-q", "iw-sft", "iw-sft-hard", "iw-sft-ema", "iw-sft-step")


def check_name(name: str) -> None:
    """Refuse a name that is no algorithm.

    Raises:
        ValueError: with the nearest one.
    """
    if name not in NAMES:
        near = difflib.get_close_matches(name.lower(), NAMES, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown algorithm {name!r}; {hint}it is one of {', '.join(NAMES)}")


def q_of(algorithm: Algorithm, settings: Defaults, parts: int) -> tuple[Proposal, int | None]:
    """What q is and how many updates a hard sync holds, where an update is made of ``parts``.

    Weights that are compared with each other (divided by their mean, say) have to be known for the
    whole update. Where its micro-batches are several, the update's weights are therefore computed
    before it: q = theta all the same.
    """
    if algorithm.proposal == "cached":
        return "cached", settings.sync_every
    compares = algorithm.weights(settings).compares
    if algorithm.proposal == "current" and parts > 1 and compares:
        return "cached", 1
    return algorithm.proposal, None
