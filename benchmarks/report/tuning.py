"""What choosing a setting costs: the score of the chosen one against online episodes.

Jackson et al. 2025, A Clean Slate for Offline Reinforcement Learning,
https://arxiv.org/abs/2504.11453.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from benchmarks.report import figures
from benchmarks.report.document import Grid
from benchmarks.report.figures import Panels
from benchmarks.report.scores import (
    Cell,
    algorithm_colour,
    algorithm_label,
    base,
    dataset_label,
)
from benchmarks.results import SCORE, RecordedRun
from benchmarks.statistics import Scores

EPISODES = 200
_TRIALS = 1_000
_SHOWN = (0, 10, 50, 200)  # episodes in the table
# A run's episodes are recorded as the means of so many groups of like scores, of equal size.
_GROUPS = 20
_UNIT = 100.0  # the score of an expert, as which the bandit takes a reward of 1
# Settings of an algorithm on a dataset, by the names of both.
Settings = Mapping[tuple[str, str], Sequence[Cell]]


class Tuned(NamedTuple):
    """Number of settings of an algorithm on a dataset, and what choosing one of them gives.

    ``scores`` are those after 0 ... ``EPISODES`` episodes, mean over 1,000 trials. ``best`` is the
    mean score of the best policy of each trial, which no tuning can exceed.
    """

    settings: int
    scores: Scores
    best: float


def episode_groups(run: RecordedRun) -> list[float]:
    """Scores of a run's episodes in order, averaged into twenty groups that count alike.

    An episode on the border of two groups is in both, in parts. The list is empty without episodes.
    """
    recorded = run.result.get("episode_groups")
    ordered = recorded or np.sort(np.array(run.result.get("episode_scores") or [], np.float64))
    groups = np.repeat(ordered, _GROUPS).reshape(_GROUPS, -1)
    return [round(float(group.mean()), 2) for group in groups if group.size]


def find_settings(group: Sequence[Cell]) -> Settings:
    """The settings of each algorithm on each dataset, of those whose episodes are recorded.

    Under-trained cells and runs of another library are left out.
    """
    settings: dict[tuple[str, str], list[Cell]] = {}
    for cell in group:
        usable = cell.score_key == SCORE and not cell.under_trained
        if usable and all(episode_groups(r) and "peer" not in r.result for r in cell.runs):
            settings.setdefault((cell.dataset, base(cell.algo)), []).append(cell)
    return settings


def tune(cells: Sequence[Cell]) -> Tuned:
    """Expected score of the setting that a bandit chooses, by the number of online episodes.

    In a trial each setting has one trained policy, that of a seed drawn at random. UCB1 chooses
    whose episode is played next; its score is drawn from the recorded ones of that policy. After
    each episode the policy of the highest mean so far would be deployed, and its score is the mean
    of all its recorded episodes. Without any episode one is chosen at random.

    The reading of the paper's protocol: its policies are of hyperparameters drawn from a range;
    here they are of the settings that were run.
    """
    generator = np.random.default_rng(0)
    arms = np.zeros((_TRIALS, len(cells), _GROUPS))
    for k, cell in enumerate(cells):
        runs = np.array([episode_groups(run) for run in cell.runs])
        arms[:, k] = runs[generator.integers(len(runs), size=_TRIALS)]
    means, trial = arms.mean(axis=2), np.arange(_TRIALS)
    totals, counts = np.zeros_like(means), np.zeros_like(means)
    expected = [float(means.mean())]
    for played in range(1, EPISODES + 1):
        seen = np.divide(totals, counts, out=np.full_like(means, np.inf), where=counts > 0)
        bonus = np.sqrt(2 * np.log(played) / np.maximum(counts, 1)) * _UNIT
        # Each setting is played once, in random order.
        first = generator.random(means.shape)
        upper = np.where(counts > 0, seen + bonus, 1e9 * (1 + first))
        arm = upper.argmax(axis=1)
        totals[trial, arm] += arms[trial, arm, generator.integers(_GROUPS, size=_TRIALS)]
        counts[trial, arm] += 1
        seen = np.divide(totals, counts, out=np.full_like(means, -np.inf), where=counts > 0)
        expected.append(float(means[trial, seen.argmax(axis=1)].mean()))
    return Tuned(len(cells), np.array(expected), float(means.max(axis=1).mean()))


def tune_all(settings: Settings) -> Mapping[tuple[str, str], Tuned]:
    """Tune each algorithm on each dataset where it has several settings."""
    return {names: tune(cells) for names, cells in settings.items() if len(cells) > 1}


def tuning_grid(tuned: Mapping[tuple[str, str], Tuned]) -> Grid:
    """Table of the expected score after some numbers of episodes."""
    columns = [f"{n} episodes" for n in _SHOWN]
    grid = Grid(["dataset", "algorithm", "settings", *columns, "best policy"])
    for (dataset, algo), (count, scores, best) in tuned.items():
        row = [dataset_label(dataset), algorithm_label(algo), str(count)]
        grid.rows.append([*row, *(f"{score:.1f}" for score in (*scores[[*_SHOWN]], best))])
    return grid


def draw_tuning(tuned: Mapping[tuple[str, str], Tuned]) -> Panels:
    """Draw the expected score over the number of episodes, one panel for each dataset."""
    panels = {}
    for dataset in dict.fromkeys(dataset for dataset, _ in tuned):
        curves = {algo: each.scores for (name, algo), each in tuned.items() if name == dataset}
        colour = {algo: algorithm_colour(algo) for algo in curves}
        ax = figures.make_panel(dataset_label(dataset), 2.5, colour)
        for algo, scores in curves.items():
            ax.plot(np.arange(1, EPISODES + 1), scores[1:], color=colour[algo], lw=1.4)
        ax.set(xlabel="online episodes spent on choosing", ylabel=figures.UNIT[SCORE])
        figures.scale_log(ax, "x")
        panels[dataset] = ax
    return figures.finish(panels)
