"""The algorithms of ``python -m benchmarks.llm``: settings of one path, by name."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.llm.recipes import Settings
from iwsft.objective import Proposal
from iwsft.weights import ImportanceWeights

# The model as it is, tested alone.
BASE = "base"


@dataclass(frozen=True)
class Algorithm:
    """An algorithm: values of one path.

    ``proposal`` is what q is, see :class:`iwsft.language.config.ImportanceWeightedConfig`.
    ``quality`` trains on D_Q+, where better rows count several times, instead of D+. ``per_step``
    lets each token's ratio weigh its own loss, instead of the trajectory's.
    """

    describe: str
    proposal: Proposal
    quality: bool = False
    per_step: bool = False

    @property
    def weighted(self) -> bool:
        """Whether trajectories are weighed as wholes."""
        return self.proposal != "reference" and not self.per_step

    def cuts(self, settings: Settings) -> tuple[float, ...]:
        """Return the percentiles of the scores that curate the rows; none keeps all once."""
        return settings.quality_cuts if self.quality else settings.cuts

    def weights(self, settings: Settings) -> ImportanceWeights:
        """Return what turns log-ratios into weights."""
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


def choose_q(algorithm: Algorithm, settings: Settings, parts: int) -> tuple[Proposal, int | None]:
    """Choose what q is, and how many updates follow a hard sync.

    Weights that are compared with each other (divided by their mean, say) have to be known for the
    whole update. Where an update has several micro-batches (``parts``, over all processes), its
    weights are therefore computed before it; q is still theta.
    """
    if algorithm.proposal == "cached":
        return "cached", settings.sync_every
    if algorithm.proposal == "current" and parts > 1 and algorithm.weights(settings).compares:
        return "cached", 1
    return algorithm.proposal, None
