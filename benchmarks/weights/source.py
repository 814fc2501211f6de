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
from iwsft.diagnostics import Weighed, top_share, weighed
from iwsft.objective import ImportanceWeightedMLE, Terms
from iwsft.trajectory import DATA_WEIGHT, STANDARD_SCORE, lengths
from iwsft.weights import log_ess


@dataclass(frozen=True)
class Source:
    """Trajectories with log q and, under ``ref_log_prob``, log pi_ref of each step.

    Attributes:
        name: What is weighed.
        notes: What q, pi_ref and the data are, a sentence each.
        chain: Transforms that the weights went through.
        make_loss: Makes the loss of a chain, which reads the trajectories.
        trajectories: Packed trajectories, curated.
        log_q: log q of each step.
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
    def weighed(self) -> Weighed:
        """The trajectories with the weights of the chain."""
        return weighed(self.loss, self.terms, self._score)[0]

    @cached_property
    def raw(self) -> tuple[Tensor, Tensor]:
        """Log-ratios of trajectories (of steps with ``reduce=None``) without transforms, shares."""
        plain = replace(self.chain, step=(), trajectory=(), negative=None)
        terms = self._terms(self.make_loss(plain))
        if self.chain.reduce is None:
            counted = terms.share > 0
            return terms.log_weight[counted], terms.share[counted]
        trajectories, _ = weighed(self.loss, terms)
        return trajectories.log_weight, trajectories.draws

    def ess(self, k: float) -> float:
        """Effective sample size of the weights exp(k log-ratio), as a share of the draws."""
        log_ratio, share = self.raw
        return float(log_ess(k * log_ratio.double(), share).exp())

    def top1(self, k: float) -> float:
        """Share of the weight exp(k log-ratio) that the heaviest 1 % of the draws have."""
        log_ratio, share = self.raw
        above = log_ratio.double() - log_ratio.amax()
        return float(top_share((k * above).exp(), share))

    @property
    def _score(self) -> Tensor | None:
        score: Tensor | None = self.trajectories.get(STANDARD_SCORE, default=None)
        return score

    def _terms(self, loss: ImportanceWeightedMLE) -> Terms:
        data = self.trajectories
        segments = loss.segments(data)
        share = loss.share(data, segments)
        weights = loss.weigh(data, self.log_q, segments=segments, share=share)
        # Not checked as those of a training, which a negative one could let diverge.
        data_weight = data.get(DATA_WEIGHT, default=None)
        return Terms(segments, share, self.log_q, *weights[:2], None, data_weight)


def read_config(run: Path) -> dict[str, Any]:
    """Read the ``config.json`` of a run."""
    path = run / CONFIG
    try:
        config: dict[str, Any] = json.loads(path.read_text())
        benchmark = config["benchmark"], config["options"]
    except (ValueError, KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise CheckpointError(f"{path} is not what a run writes ({reason})") from error
    if benchmark[0] not in ("d4rl", "llm"):
        raise ValueError(f"{run} is a run of {benchmark[0]}; a run is {RUN}")
    return config


def root_of(run: Path, config: dict[str, Any]) -> Path:
    """The folder that --out of a run named, by what its ``config.json`` says."""
    names = [config[name] for name in ("benchmark", "dataset", "algo")] + [f"seed-{config['seed']}"]
    variant = config["options"].get("variant")
    parts = ([variant] if variant else []) + names
    path = run.absolute()
    if path.parts[-len(parts) :] != tuple(parts):
        raise ValueError(
            f"{run} was moved: its config.json is of OUT/{'/'.join(parts)}, and what it shares "
            "with other runs is found from there; move it back"
        )
    return path.parents[len(parts) - 1]


def check_chain(chain: Chain, name: str) -> None:
    """Check that weights can be computed from the files of a run."""
    if chain.reference == "synced":
        raise ValueError(f"{name} divides by the policy at the last sync, which no file holds")


def tell_scores(trajectories: TensorDictBase) -> None:
    """Say where there is no rank correlation of the weights with the score."""
    score = trajectories.get(STANDARD_SCORE, default=None)
    if score is None or bool((score == score[0]).all()):
        tell("all trajectories have the same score, or none: the weights correlate with no score")


def counted(trajectories: TensorDictBase) -> str:
    """How many trajectories and steps there are, in words."""
    return f"{len(lengths(trajectories)):,} trajectories of {len(trajectories):,} steps"
