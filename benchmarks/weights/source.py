"""Whose weights: log q and log pi_ref of each step of a run's data, or of a file of rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from tensordict import TensorDictBase
from torch import Tensor

from benchmarks.runs import CONFIG, tell
from benchmarks.weights.options import RUN
from iwsft.chain import Chain
from iwsft.checkpoint import CheckpointError
from iwsft.diagnostics import top_share, weighed
from iwsft.objective import ImportanceWeightedMLE, Terms
from iwsft.trajectory import DATA_WEIGHT, STANDARD_SCORE, lengths
from iwsft.weights import log_ess


@dataclass(frozen=True)
class Source:
    """Curated packed trajectories with log q and, under ``ref_log_prob``, log pi_ref of each step.

    ``name`` says what is weighed, ``notes`` what q, pi_ref and the data are, a sentence each.
    ``make_loss`` makes the loss of a chain, and ``chain`` is that of the weights.
    """

    name: str
    notes: tuple[str, ...]
    chain: Chain
    make_loss: Callable[[Chain], ImportanceWeightedMLE]
    trajectories: TensorDictBase
    log_q: Tensor

    @cached_property
    def loss(self) -> ImportanceWeightedMLE:
        """The loss of the chain."""
        return self.make_loss(self.chain)

    @cached_property
    def terms(self) -> Terms:
        """Terms of the loss where the policy is q."""
        return self._terms(self.loss)

    @cached_property
    def log_ratio(self) -> tuple[Tensor, Tensor]:
        """Log-ratios of trajectories (of steps with ``reduce=None``) without transforms, shares."""
        plain = replace(self.chain, step=(), trajectory=(), negative=None)
        terms = self._terms(self.make_loss(plain))
        if self.chain.reduce is None:
            counted = terms.share > 0
            return terms.log_weight[counted], terms.share[counted]
        trajectories = weighed(self.loss, terms)
        return trajectories.log_weight, trajectories.draws

    def ess(self, k: float) -> float:
        """Effective sample size of the weights exp(k log-ratio), as a share of the draws."""
        log_ratio, share = self.log_ratio
        return float(log_ess(k * log_ratio.double(), share).exp())

    def top1(self, k: float) -> float:
        """Share of the weight exp(k log-ratio) that the heaviest 1 % of the draws have."""
        log_ratio, share = self.log_ratio
        above = log_ratio.double() - log_ratio.amax()
        return float(top_share((k * above).exp(), share))

    def _terms(self, loss: ImportanceWeightedMLE) -> Terms:
        data = self.trajectories
        segments = loss.segments(data)
        share = loss.share(data, segments)
        weights = loss.weigh(data, self.log_q, segments=segments, share=share)
        # Not checked as those of a training, which a negative one could let diverge.
        data_weight = data.get(DATA_WEIGHT, default=None)
        return Terms(segments, share, self.log_q, *weights[:2], None, data_weight)


def read_run(run: Path) -> tuple[dict[str, Any], Path]:
    """Read the ``config.json`` of a run, and find the folder that its --out named."""
    path = run / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        if trains := config["benchmark"] in ("d4rl", "llm"):
            names = [str(config[name]) for name in ("benchmark", "dataset", "algo")]
            names.append(f"seed-{config['seed']}")
            variant = config["options"].get("variant")
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is not what a run writes ({reason})") from error
    if not trains:
        raise ValueError(f"{run} is a run of {config['benchmark']}; a run is {RUN}")
    parts = (*filter(None, [variant]), *names)
    if run.absolute().parts[-len(parts) :] != parts:
        raise ValueError(
            f"{run} was moved: its config.json is of OUT/{'/'.join(parts)}, and what it shares "
            "with other runs is found from there; move it back"
        )
    return config, run.absolute().parents[len(parts) - 1]


def notes_of(q: str, reference: str, rows: str, trajectories: TensorDictBase) -> tuple[str, ...]:
    """What q, pi_ref and the data are; where there is no score to correlate with, a line says so.

    The line comes before the policies run, which may take minutes.
    """
    score = trajectories.get(STANDARD_SCORE, default=None)
    if score is None or bool((score == score[0]).all()):
        tell("all trajectories have the same score, or none: the weights correlate with no score")
    size = f"{len(lengths(trajectories)):,} trajectories of {len(trajectories):,} steps"
    return f"q is {q}.", f"pi_ref is {reference}.", f"The data are {rows}: {size}."


def chain_of(name: str, chain: Chain, *, weighted: bool) -> tuple[Chain, tuple[str, ...]]:
    """The chain that an algorithm's weights are shown for, and a note where it has none."""
    if chain.reference == "synced":
        raise ValueError(f"{name} divides by the policy at the last sync, which no file holds")
    note = f"{name} has no weights; these are those of k = 1."
    return (chain, ()) if weighted else (type(chain)(), (note,))
