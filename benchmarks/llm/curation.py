"""Which rows of a recipe an algorithm trains on, and how often each one counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from tensordict import TensorDictBase

from benchmarks.llm.options import Algorithm
from benchmarks.llm.recipes.chat import prompt_digest
from benchmarks.llm.settings import Settings
from benchmarks.stopping import warnings_until
from iwsft.curation import curate, join
from iwsft.datasets.text.rows import Row
from iwsft.datasets.text.tokens import CORRECT, SCORE
from iwsft.language import correct_only, tokenize, weigh_correct
from iwsft.trajectory import MULTIPLICITY, lengths, per_trajectory

# With --q auto, the rows of one prompt in five choose the exponent and are not trained on.
_EVERY = 5


def curated(
    rows: Sequence[Row], tokenizer: Any, algorithm: Algorithm, settings: Settings, *, seed: int
) -> TensorDictBase:
    """Curate rows into D+ (or D_Q+), with ``q="auto"`` its judges too, of multiplicity 0."""
    if algorithm.signed:
        data = tokenize(rows, tokenizer, max_length=settings.max_length).trajectories
        return _signed(algorithm, data, margin=settings.baseline_margin)
    cuts = settings.quality_cuts if algorithm.quality else settings.cuts
    beta = settings.rwr_beta if algorithm.by_score else None
    training, judges = (rows, []) if settings.q is None else _apart(rows)
    if judges:
        # With multiplicity 0 they would judge, too.
        training = [row for row in training if row.count != 0]
    trained = curated_rows(training, tokenizer, settings.max_length, cuts, beta=beta, seed=seed)
    if settings.q is None:
        return trained
    # Each counts once, however often it would be trained on.
    judges = [replace(row, count=None) for row in judges]
    judged = tokenize(judges, tokenizer, max_length=settings.max_length).trajectories
    score = judged.get(CORRECT if judges[0].correct is not None else SCORE).float()
    of_trajectory = score[lengths(judged).cumsum(0) - 1]
    judged = curate(judged, cuts=(), score=lambda _: of_trajectory, seed=seed)
    judged.set(MULTIPLICITY, torch.zeros_like(judged.get(MULTIPLICITY)))
    return join(*(part.exclude(CORRECT, SCORE) for part in (trained, judged)))


def effective(settings: Settings, rows: Sequence[Row]) -> Settings:
    """The settings, or those of weights 1 where the rows can't choose an exponent."""
    if settings.q is None or why_unweighted(rows) is None:
        return settings
    return replace(settings, q=None, temperature=0.0, preset="recipe")


def why_unweighted(rows: Sequence[Row]) -> str | None:
    """Why ``--q auto`` leaves all weights at 1, in words; None if it does not."""
    _, judges = _apart(rows)
    scores = {row.score if row.correct is None else float(row.correct) for row in judges}
    if len(scores) > 1:
        return None
    which = "have no score" if scores <= {None} else "have the same score"
    many = f"the {len(judges)} rows that choose it {which}" if judges else "no prompt chooses it"
    return f"{many}, so --q auto leaves all weights at 1, as in SFT"


def _apart(rows: Sequence[Row]) -> tuple[list[Row], list[Row]]:
    """Rows to train on, and those of other prompts that choose the exponent.

    The text of a prompt decides, so that rounds of a loop agree. A data set whose every prompt
    would choose has none that do.
    """
    parts: tuple[list[Row], list[Row]] = [], []
    for row in rows:
        # The split of held-out prompts orders them by the first bytes.
        judging = int.from_bytes(prompt_digest(row)[-4:], "big") % _EVERY == 0
        # A row that counts 0 times does not judge either.
        if not (judging and row.count == 0):
            parts[judging].append(row)
    return parts if parts[0] else (list(rows), [])


def curated_rows(
    rows: Sequence[Row],
    tokenizer: Any,
    max_length: int | None,
    cuts: Sequence[float],
    *,
    beta: float | None = None,
    seed: int,
) -> TensorDictBase:
    """Curate rows into packed trajectories with their multiplicity; wrong ones are left out.

    Rows with a multiplicity count as curated. With ``beta`` they weigh exp(score / beta).
    """
    trajectories: TensorDictBase = tokenize(rows, tokenizer, max_length=max_length).trajectories
    if trajectories.get(CORRECT, default=None) is not None:
        trajectories = correct_only(trajectories)
    if trajectories.get(MULTIPLICITY, default=None) is not None:
        cuts = ()
    score = SCORE if cuts or beta is not None else _score_of(trajectories)
    weight: Any = None if beta is None else "softmax"
    with warnings_until("; ties="):
        return curate(trajectories, cuts=cuts, score=score, weight=weight, beta=beta, seed=seed)


def _score_of(trajectories: TensorDictBase) -> Any:
    """The rows' score, or equal ones, with which nothing is correlated."""
    equal = torch.zeros(len(lengths(trajectories)))
    return SCORE if trajectories.get(SCORE, default=None) is not None else lambda _: equal


def _signed(algorithm: Algorithm, trajectories: TensorDictBase, *, margin: float) -> TensorDictBase:
    """Weigh right answers 1 and wrong ones -1; in AsymRE 1 and 0, less a baseline."""
    weighed = weigh_correct(trajectories)
    if algorithm.related == "asymre":
        rate = float(per_trajectory(trajectories, CORRECT).float().mean())
        baseline = rate - margin
        if baseline <= 0:
            raise ValueError(
                f"--baseline-margin {margin:g} must be below the share of right rows, {rate:.3g}: "
                "with a baseline of at most 0, wrong answers count as right ones do"
            )
        weighed = weigh_correct(trajectories, right=1 - baseline, wrong=-baseline)
    counted = weighed.get(MULTIPLICITY, default=None) is not None
    return weighed if counted else curate(weighed, cuts=(), score=_score_of(weighed))
