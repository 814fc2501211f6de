"""Curation: from scored trajectories to the good ones, each with its multiplicity.

Algorithm 2 of the paper: percentiles of the scores cut the data into overlapping quality bins. Each
cut that a trajectory survives adds one to its multiplicity; no trajectory is copied.
"""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import Tensor

from iwsft.trajectory import (
    ASSISTANT_MASK,
    DATA_WEIGHT,
    DONE,
    GIVEN_REF_LOG_PROB,
    MASK,
    MULTIPLICITY,
    REWARD,
    STANDARD_SCORE,
    TRAJ_IDS,
    Segments,
    fit,
    layout,
    lengths,
    pack,
    per_trajectory,
    select,
)
from iwsft.validation import check_data_weights, check_links, check_tensordict
from iwsft.weights import check_number

Ties = Literal["rank", ">", ">="]
Score = str | tuple[str, ...] | Callable[[TensorDictBase], Tensor]
Weight = Literal["softmax", "linear"] | Callable[[Tensor], Tensor]


def curate(
    trajectories: TensorDictBase,
    *,
    cuts: Sequence[float] = (90,),
    ties: Ties = "rank",
    score: Score = "return",
    weight: Weight | None = None,
    beta: float | None = None,
    seed: int = 0,
) -> TensorDictBase:
    """Keep the trajectories that survive at least one cut (paper, Algorithm 2).

    With ``cuts=(90, 95, 98)`` the best 2 % count three times, the next 3 % twice and the next 5 %
    once: the paper's D_Q+. A single cut is plain filtering, as in SFT.

    Args:
        trajectories: Packed or padded trajectories; a padded batch is packed first.
        cuts: Percentiles of the scores, from 0 to below 100; without one, all count once, or as
            often as their ``multiplicity`` says. Those that it counts 0 times are left out.
        ties: ``"rank"`` keeps the best ceil((100 - cut) / 100 n) of n trajectories, at least one.
            It orders equal scores by a random permutation, so a higher cut keeps a subset of the
            trajectories that a lower cut keeps. ``">"`` (paper) and ``">="`` (authors' code)
            compare with the percentile, interpolated linearly between the scores.
        score: ``"return"`` (undiscounted), ``"length"``, a key of the data with one number for each
            trajectory (the same on all its steps), or a function from packed trajectories to
            ``[n]`` numbers. Higher is better.
        weight: Data weight of each survivor, from the scores s of the survivors: ``"softmax"`` for
            exp(s / beta), divided by its mean over the draws; ``"linear"`` for s itself; or a
            function from ``[k]`` scores to ``[k]`` weights. ``"softmax"`` of all trajectories is
            reward-weighted regression (Peters and Schaal 2007).
        beta: Temperature of ``"softmax"``, in units of the score.
        seed: Seed of the permutation among equal scores.

    Returns:
        Packed TensorDict of the survivors in their order, with ``multiplicity``, int64 per step
        (the number of cuts that the trajectory survived), ``standard_score``, float32 (its score
        among all scores, 0 if all are equal), and with ``weight`` ``data_weight``, float32. It
        shares memory with ``trajectories`` where all survive.

    Raises:
        KeyError: The score is neither a known name nor a key.
        ValueError: No trajectory survives, a score or weight is NaN or infinite, all weights are 0,
            the trajectories have a multiplicity (with ``cuts``) or a data weight (with ``weight``)
            already, or a setting is wrong.
    """
    check_tensordict(trajectories)
    _check_cuts(cuts)
    _check_settings(ties, weight, beta)
    for key, taken in ((MULTIPLICITY, bool(cuts)), (DATA_WEIGHT, weight is not None)):
        if taken and trajectories.get(key, default=None) is not None:
            raise ValueError(f"these hold {key!r} already; curate the data they come from")
    packed = trajectories
    if len(layout(trajectories)) == 2:
        check_links(trajectories)
        _check_padding_told(trajectories)
        packed = pack(trajectories)
    check_links(packed)
    sizes = lengths(packed)
    # Scores are few and compared on the host, so that a seed means the same on any device.
    scores = trajectory_scores(packed, score).detach().cpu()
    if score in ("return", "length"):
        _tell_of_parts(packed, sizes, str(score))
    if packed.get(MULTIPLICITY, default=None) is None:
        multiplicity = _count_survived(scores, cuts, ties, seed).to(sizes.device)
    else:
        multiplicity = per_trajectory(packed, MULTIPLICITY)
    positions = multiplicity.nonzero().squeeze(-1)
    if not len(positions):
        raise ValueError(f"all {len(sizes)} trajectories count 0 times; none is left")
    # Selecting copies, so a whole dataset is not selected.
    survivors = packed.copy() if len(positions) == len(sizes) else select(packed, positions)
    sizes, multiplicity = sizes[positions], multiplicity[positions]
    standard = _standard_scores(scores)[positions.cpu()].to(sizes.device)
    survivors.set(MULTIPLICITY, multiplicity.repeat_interleave(sizes))
    survivors.set(STANDARD_SCORE, standard.repeat_interleave(sizes))
    if weight is not None:
        scores = scores[positions.cpu()]
        of_scores = _data_weights(scores, multiplicity.cpu(), weight, beta)
        survivors.set(DATA_WEIGHT, of_scores.to(sizes.device).repeat_interleave(sizes))
    return survivors


def join(*parts: TensorDictBase) -> TensorDictBase:
    """Join the curated sets of several datasets into one; trajectory ids count from 0.

    Each dataset is curated by itself, so scores are compared within it only: the top 5 % of one and
    the top 5 % of another are not the top 5 % of both. The parts are packed or padded. Where one
    has no ``multiplicity``, each of its trajectories counts once. Where only some have
    ``data_weight``, it is 1 in the others; a missing ``given_ref_log_prob`` is NaN, unknown. The
    result has ``standard_score`` (within its part) if all have it.

    Raises:
        ValueError: There is no part, or parts differ in an entry, its size or its dtype.
    """
    packed: list[TensorDictBase] = []
    first = 0
    for part in parts:
        check_tensordict(part)
    missing = {DATA_WEIGHT: 1.0, GIVEN_REF_LOG_PROB: math.nan}
    some = [key for key in missing if any(key in part.keys(True) for part in parts)]
    for part in parts:
        part = pack(part)
        ids = Segments.of(part).index + first
        first = int(ids[-1]) + 1
        part.set(TRAJ_IDS, ids)
        if part.get(MULTIPLICITY, default=None) is None:
            part.set(MULTIPLICITY, torch.ones_like(ids))
        for key in some:
            if part.get(key, default=None) is None:
                part.set(key, torch.full_like(ids, missing[key], dtype=torch.float32))
        packed.append(part)
    if not packed:
        raise ValueError("there is nothing to join")
    if any(part.get(STANDARD_SCORE, default=None) is None for part in packed):
        # Parts that are not curated have none.
        packed = [part.exclude(STANDARD_SCORE) for part in packed]
    entries = [
        {(key, x.dtype, x.shape[1:], x.device) for key, x in part.items(True, True)}
        for part in packed
    ]
    differ = sorted({_name(key) for part in entries for key, *_ in part ^ entries[0]})
    if differ:
        raise ValueError(f"these trajectories differ in {', '.join(differ)}; make them alike")
    return torch.cat(packed)


def trajectory_returns(packed: TensorDictBase) -> Tensor:
    """Return the undiscounted sum of ``("next", "reward")`` of each trajectory, float64 ``[n]``."""
    reward = packed.get(REWARD, default=None)
    if reward is None:
        raise KeyError(f"the return needs {REWARD!r}; pass another score where there is none")
    shape, mask = layout(packed), packed.get(MASK, default=None)
    reward = fit(reward, shape, repr(REWARD))
    if mask is not None:
        reward = torch.where(fit(mask, shape, repr(MASK)).bool(), reward, 0)
    # Not a sum by the index of each step, which fills three times the memory of the data.
    return torch.segment_reduce(reward.reshape(-1).double(), "sum", lengths=lengths(packed))


def trajectory_scores(trajectories: TensorDictBase, score: Score) -> Tensor:
    """Return finite scores of packed trajectories, float64 ``[n]``; see :func:`curate`."""
    sizes = lengths(trajectories)
    if callable(score):
        scores = torch.as_tensor(score(trajectories)).double()
        if scores.shape != sizes.shape:
            shape = list(scores.shape)
            raise ValueError(f"the score function gave {shape} for {len(sizes)} trajectories")
    elif score == "return":
        scores = trajectory_returns(trajectories)
    elif score == "length":
        scores = Segments.of(trajectories).lengths[: len(sizes)].double()
    elif score in set(trajectories.keys(True, True)):
        scores = per_trajectory(trajectories, score).double()
    else:
        names = ["return", "length", *map(_name, trajectories.keys(True, True))]
        close = difflib.get_close_matches(_name(score), names, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(names)}"
        raise KeyError(f"score {_name(score)} is unknown; {hint}")
    bad = (~scores.isfinite()).nonzero()
    if len(bad):
        first = int(bad[0])
        traj_id = int(trajectories.get(TRAJ_IDS)[int(sizes[:first].sum())])
        name = f"the score ({_name(score)}) of trajectory {first} (id {traj_id})"
        others = f"{len(bad)} of {len(scores)} scores are NaN or infinite"
        raise ValueError(f"{name} is {float(scores[first])}, and {others}")
    return scores


def _check_padding_told(padded: TensorDictBase) -> None:
    """Refuse a mask of steps under another key, as TorchRL's helpers write: padding would count."""
    if padded.get(MASK, default=None) is not None:
        return
    steps = layout(padded).numel()
    for key, entry in padded.items(True, True):
        under = key[0] if isinstance(key, tuple) else key
        # The mask of the assistant's tokens does not mark padding.
        marks = under in ("mask", "masks") and key != ASSISTANT_MASK and entry.dtype == torch.bool
        if marks and entry.numel() == steps and not bool(entry.all()):
            way_out = f"trajectories[{MASK!r}] = trajectories[{key!r}]"
            raise ValueError(f"{key!r} marks padding, which is read from {MASK!r}: {way_out}")


def _tell_of_parts(packed: TensorDictBase, sizes: Tensor, score: str) -> None:
    """Warn of trajectories without an end beside ended ones, as a collector's batch cuts them."""
    done = packed.get(DONE, default=None)
    if done is None:
        return
    ended = fit(done, packed.batch_size, repr(DONE)).bool()[sizes.cumsum(0) - 1]
    parts = len(ended) - int(ended.sum())
    if 0 < parts < len(ended):
        problem = f"{parts} of {len(ended)} trajectories do not end: {DONE!r} is false throughout"
        way_out = "drop them with iwsft.trajectory.select, or pass another score"
        warnings.warn(f"{problem}, so their {score} is that of a part; {way_out}", stacklevel=3)


def _standard_scores(scores: Tensor) -> Tensor:
    """How many standard deviations each score is above the mean, float32 ``[n]``."""
    # By a power of two, which changes no digit: squares of 1e200 and 1e-200 are inf and 0.
    exponent = math.frexp(float(scores.abs().max()))[1]
    scores = scores * math.ldexp(1.0, min(-exponent, 1000))
    above = scores - scores.mean()
    spread = above.square().mean().sqrt()
    equal = bool((scores == scores[0]).all())
    return (torch.zeros_like(above) if equal else above / spread).float()


def _count_survived(scores: Tensor, cuts: Sequence[float], ties: Ties, seed: int) -> Tensor:
    """Count the cuts that each trajectory survives, int64 ``[n]``."""
    if not cuts:
        return torch.ones(len(scores), dtype=torch.int64)
    if ties == "rank":
        survived = _cut_by_rank(scores, cuts, seed)
    else:
        thresholds = torch.as_tensor(np.percentile(scores.numpy(), cuts))[:, None]
        survived = scores > thresholds if ties == ">" else scores >= thresholds
        # A cut at 0 keeps all, but ">" would drop the least score, which is the 0th percentile.
        survived |= (torch.tensor(cuts) == 0)[:, None]
    if not bool(survived.any()):
        raise ValueError(f"the curated set is empty: {_keeps_none(min(cuts), ties, scores)}")
    for cut, row in zip(cuts, survived, strict=True):
        if not bool(row.any()):
            warnings.warn(_keeps_none(cut, ties, scores), stacklevel=3)
        elif ties == ">=" and cut > 0 and len(scores) > 1 and bool(row.all()):
            at_bottom = int((scores == scores.min()).sum())
            why = f"{at_bottom} of the scores are the minimum; pass ties='>' or ties='rank'"
            all_kept = f"cut {cut} with ties='>=' keeps all {len(scores)} trajectories"
            warnings.warn(f"{all_kept}: {why}", stacklevel=3)
    return survived.sum(0)


def _cut_by_rank(scores: Tensor, cuts: Sequence[float], seed: int) -> Tensor:
    count = len(scores)
    if count > 1 and max(cuts) > 0 and bool((scores == scores[0]).all()):
        equal_scores = f"all {count} scores are {float(scores[0]):.6g}"
        way_out = "pass cuts=(0,) to keep all, or another score"
        chance = f"cuts {tuple(cuts)} keep trajectories by chance"
        warnings.warn(f"{equal_scores}: {chance}; {way_out}", stacklevel=4)
    shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    best = shuffled[scores[shuffled].argsort(descending=True, stable=True)]
    survived = torch.zeros(len(cuts), count, dtype=torch.bool)
    for row, cut in zip(survived, cuts, strict=True):
        # Rounded first: 100 - 99.6 is a little more than 0.4, and ceil would see it.
        survivors = best[: max(1, math.ceil(round((100 - cut) / 100 * count, 9)))]
        row[survivors] = True
        # A cut that falls among equal scores, if they are half of the survivors.
        last = scores[survivors[-1]]
        by_chance, equal = int((scores[survivors] == last).sum()), int((scores == last).sum())
        if by_chance < equal < count and 2 * by_chance >= len(survivors) and equal > 2:
            among = f"cut {cut} falls among {equal} equal scores ({float(last):.6g})"
            chance = f"{by_chance} of the {len(survivors)} trajectories kept are drawn by chance"
            way_out = "ties='>=' keeps all or ties='>' none of the equal ones"
            warnings.warn(f"{among}: {chance} from them; {way_out}", stacklevel=4)
    return survived


def _data_weights(
    scores: Tensor, multiplicity: Tensor, weight: Weight, beta: float | None
) -> Tensor:
    """Data weights of trajectories from their scores, float32 ``[n]``; see :func:`curate`."""
    if callable(weight):
        weights = torch.as_tensor(weight(scores))
        if weights.shape != scores.shape:
            wrong = f"gave shape {list(weights.shape)}; there are {len(scores)} trajectories"
            raise ValueError(f"the function of the weights {wrong}")
    elif weight == "softmax" and beta is not None:
        # The mean weight is that of the draws.
        log_draws = multiplicity.double().log()
        log_total = (scores / beta + log_draws).logsumexp(0) - log_draws.logsumexp(0)
        weights = (scores / beta - log_total).exp()
        # Such a beta is mostly one of another unit. Among few trajectories it may be meant.
        share = float((weights * multiplicity).max() / multiplicity.sum())
        if share > 0.5 and len(scores) >= 10:
            heaviest = f"beta={beta:g} gives one of {len(scores)} trajectories {share:.0%}"
            spread = f"the scores' standard deviation is {float(scores.std()):.3g}"
            warnings.warn(f"{heaviest} of the weight; {spread}, pass a larger beta", stacklevel=3)
    elif weight == "linear":
        weights = scores
    else:
        raise ValueError(f"weight={weight!r} is neither 'softmax', 'linear' nor a function")
    check_data_weights(weights.float(), "the data weight of the scores")
    return weights.float()


def _keeps_none(cut: float, ties: Ties, scores: Tensor) -> str:
    why = f"{int((scores == scores.max()).sum())} of {len(scores)} scores are the maximum"
    problem = f"cut {cut} with ties={ties!r} keeps no trajectory"
    return f"{problem}: {why}; pass ties='rank' or '>=', or lower cuts"


def _check_cuts(cuts: Sequence[float]) -> None:
    if not isinstance(cuts, Sequence) or isinstance(cuts, str):
        raise TypeError(f"cuts={cuts!r} must be a sequence of percentiles, such as (90,)")
    for cut in cuts:
        check_number(f"cut {cut!r}", cut)
        if not 0 <= cut < 100:
            raise ValueError(f"cut {cut} is not a percentile in [0, 100); 90 keeps the top 10 %")
    if cuts and 0 < max(cuts) < 1:
        meant = f"did you mean {tuple(100 * cut for cut in cuts)}?"
        problem = f"cuts={tuple(cuts)} are percentiles and keep nearly everything"
        warnings.warn(f"{problem}; {meant}", stacklevel=3)


def _check_settings(ties: Ties, weight: Weight | None, beta: float | None) -> None:
    if ties not in get_args(Ties):
        raise ValueError(f"ties={ties!r} is unknown; it is one of {', '.join(get_args(Ties))}")
    if beta is not None:
        check_number(f"beta={beta!r}", beta)
    positive = beta is not None and 0 < beta < math.inf
    if positive != (weight == "softmax") or (beta is not None and not positive):
        raise ValueError(f"beta={beta}: weight='softmax' needs a positive one, others take none")


def _name(score: Score) -> str:
    if callable(score):
        return getattr(score, "__name__", type(score).__name__)
    return ".".join(score) if isinstance(score, tuple) else str(score)
