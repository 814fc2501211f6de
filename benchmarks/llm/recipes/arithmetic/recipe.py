"""The arithmetic recipe: a base model of strategies, its own judged samples, held-out sums."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.llm.recipes import OWN, Evaluation, Prepared, Recipe, Sources
from benchmarks.llm.recipes.arithmetic import BaseSettings
from benchmarks.llm.settings import Settings


@dataclass(frozen=True)
class ArithmeticRecipe(Recipe):
    """Sums of six digits, solved by a small decoder that knows three ways to write them down.

    One base model serves all seeds: a seed draws the problems that it samples, its samples, the
    order of training and the answers of the test.
    """

    defaults: Settings = Settings(
        learning_rate=8e-4,
        batch_size=32,
        max_steps=80,
        warmup=10,
        quality_cuts=(0, 50, 60),
        sync_every=10,
        ema_decay=0.9,
        # The bandit's weight is q / pi_ref of the whole text.
        reduce="sum",
        self_normalize=True,
        rwr_beta=0.2,
    )
    seeds: tuple[int, ...] = (0, 1, 2)
    base: BaseSettings = BaseSettings()
    base_seed: int = 0
    # Problems that the model solves once each; the right ones are D+.
    samples: int = 2000
    # Problems of the test, the same for all seeds.
    held_out: int = 1000

    def prepare(self, folder: Path, sources: Sources = OWN, *, seed: int) -> Prepared:
        """See :meth:`Recipe.prepare`.

        The cache holds the base model, and the rows of each seed as JSON lines. A given model must
        have this recipe's tokenizer; it is sampled instead. With given rows nothing is sampled, and
        those on held-out problems are left out with a warning.
        """
        from benchmarks.llm.recipes.arithmetic import base, samples

        notes: dict[str, Any] = {}
        model = sources.model
        if model is None:
            home = base.base_model(folder, seed=self.base_seed, settings=self.base)
            record = json.loads((home / "record.json").read_text())
            notes["base"] = {key: record[key] for key in ("parameters", "seed", "cpu_seconds")}
            model = str(home)
        if sources.data is None:
            trusted = sources.trust_remote_code
            rows = samples.drawn(
                model, folder, seed=seed, number=self.samples, trust_remote_code=trusted
            )
        else:
            rows = samples.usable(sources.data)
        notes |= samples.facts(rows)
        return Prepared(model=model, rows=rows, score_name="exact match", notes=notes)

    def evaluate(self, model: Any, tokenizer: Any, prepared: Prepared, *, seed: int) -> Evaluation:
        """Let the model solve held-out problems once each.

        ``score`` is the share of right answers at temperature 1, the policy's expected score;
        ``greedy`` that of the likeliest tokens. ``share_*`` is the exact chance of each strategy,
        ``success_*`` the share of right answers within it. ``validation`` is the score on problems
        that the test does not ask, to choose settings by.
        """
        del prepared
        from benchmarks.llm.recipes.arithmetic import samples

        return samples.solve_held_out(model, tokenizer, self.held_out, seed=seed)


RECIPE = ArithmeticRecipe()
