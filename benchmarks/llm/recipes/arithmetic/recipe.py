"""The arithmetic recipe: a base model of strategies, its own judged samples, held-out sums."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.llm.kept import RECORD
from benchmarks.llm.models import load
from benchmarks.llm.recipes.arithmetic.base import VOCABULARY, BaseSettings, base_model
from benchmarks.llm.recipes.arithmetic.samples import (
    Sample,
    rates,
    sample,
    strategy_probabilities,
    to_rows,
)
from benchmarks.llm.recipes.arithmetic.strategies import (
    STRATEGIES,
    after_rounds,
    check,
    mean_score,
)
from benchmarks.llm.recipes.arithmetic.task import parse, problems, split_of
from benchmarks.llm.recipes.recipe import Evaluation, Prepared, Settings
from benchmarks.statistics import wilson_interval
from iwsft.datasets.text.rows import Row, read
from iwsft.files import written_whole
from iwsft.fingerprint import fingerprint

# The base model's texts are drawn with small seeds.
_FIRST_SAMPLE_SEED = 1_000_000
# Settings were chosen on the held-out problems of seed 0; the test is on others.
TEST_SEED = 1


def _defaults() -> Settings:
    return Settings(
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
    )


@dataclass(frozen=True)
class ArithmeticRecipe:
    """Sums of six digits, solved by a small decoder that knows three ways to write them down.

    One base model serves all seeds: a seed draws the problems that it samples, its samples, the
    order of training and the answers of the test.

    Attributes:
        name: Name on the command line.
        describe: What it is, in a line.
        defaults: Settings of the fine-tuning.
        presets: Empty, as a preset changes the weights alone.
        seeds: Seeds of the runs.
        base: Size and training of the base model.
        base_seed: Seed of the base model's weights and texts.
        samples: Number of problems that the model solves once each; the right ones are D+.
        held_out: Number of problems of the test, the same for all seeds.
    """

    name: str = "arithmetic"
    describe: str = "a 1M-parameter decoder solves sums by three strategies, tuned on its successes"
    defaults: Settings = field(default_factory=_defaults)
    presets: Mapping[str, Settings] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)
    base: BaseSettings = field(default_factory=BaseSettings)
    base_seed: int = 0
    samples: int = 2000
    held_out: int = 1000

    def prepare(
        self, folder: Path, *, seed: int, model: str | None = None, data: str | None = None
    ) -> Prepared:
        """See :meth:`Recipe.prepare`.

        Args:
            folder: The cache; it holds the base model, and the rows of each seed as JSON lines.
            seed: Seed of the problems and the samples.
            model: A decoder that has this recipe's tokenizer; it is sampled instead.
            data: Rows of this task with ``prompt``, ``completion`` and ``correct``; nothing is
                sampled. Rows on held-out problems are left out with a warning.
        """
        notes: dict[str, Any] = {}
        if model is None:
            home = base_model(folder, seed=self.base_seed, settings=self.base)
            record = json.loads((home / RECORD).read_text())
            notes["base"] = {key: record[key] for key in ("parameters", "seed", "cpu_seconds")}
            model = str(home)
        if data is None:
            decoder, tokenizer = _load(model)
            key = fingerprint(
                {
                    **decoder.state_dict(),
                    "config": decoder.config.to_json_string(),
                    "drawn": (seed, self.samples),
                }
            )
            path = Path(folder) / f"arithmetic-rows-{key[:16]}.jsonl"
            if not path.exists():
                examples = problems(self.samples, _FIRST_SAMPLE_SEED + seed, "train")
                _write(path, to_rows(sample(decoder, tokenizer, examples, seed=seed)))
            rows = read(path)
        else:
            rows = _usable(read(data))
        return Prepared(
            model=model,
            rows=rows,
            score_name="exact match",
            notes={**notes, **facts(rows)},
        )

    def evaluate(self, model: Any, tokenizer: Any, prepared: Prepared, *, seed: int) -> Evaluation:
        """Let the model solve held-out problems once each.

        Returns:
            ``score``: share of right answers at temperature 1, the policy's expected score, as the
            objective has it and the closed forms of ``strategies.py`` predict it; ``interval``
            (Wilson's) and ``n``; ``greedy``: the same of the likeliest tokens. ``share_*`` is the
            exact chance of each strategy, ``success_*`` the share of right answers within it,
            ``parses`` the share of texts in their strategy's form, ``tokens`` their mean length.
        """
        del prepared
        held_out = problems(self.held_out, TEST_SEED, "held-out")
        sampled = sample(model, tokenizer, held_out, seed=seed)
        greedy = sample(model, tokenizer, held_out, seed=seed, temperature=0.0)
        chances = strategy_probabilities(model, tokenizer, held_out).mean(0).tolist()
        success = rates(sampled)[1]
        n = len(held_out)
        right, right_greedy = (
            sum(solution.verdict.score for solution in solutions) for solutions in (sampled, greedy)
        )
        return {
            "score": right / n,
            "interval": wilson_interval(right, n),
            "n": n,
            "greedy": right_greedy / n,
            "greedy_interval": wilson_interval(right_greedy, n),
            **{f"share_{name}": share for name, share in zip(STRATEGIES, chances, strict=True)},
            **{f"success_{name}": share for name, share in success.items()},
            "parses": sum(solution.verdict.parses for solution in sampled) / n,
            "tokens": sum(solution.tokens for solution in sampled) / n,
        }


def facts(rows: Sequence[Row]) -> Mapping[str, Any]:
    """Compute what the rows say of their policy, and what theory predicts of tuning on them.

    Returns:
        ``rows``, ``right`` (share), ``shares`` and ``success`` of the strategies, and
        ``predicted``: the mean score of SFT in the limit and of the best strategy alone, both with
        the strategies as good as they are.
    """
    judged = []
    for row in rows:
        problem, text = parse(row.prompt), row.completion or ""
        judged.append(Sample(problem, text, len(text), check(problem, text)))
    shares, success = rates(judged)
    notes: dict[str, Any] = {
        "rows": len(rows),
        "right": sum(bool(row.correct) for row in rows) / len(rows),
        "shares": shares,
        "success": success,
    }
    if any(share * success[name] > 0 for name, share in shares.items()):
        notes["predicted"] = {
            "sft": mean_score(after_rounds(shares, success, 1), success),
            "best strategy": max(success.values()),
        }
    return notes


def _load(model: str) -> tuple[Any, Any]:
    decoder, tokenizer = load(model)
    if tokenizer.get_vocab() != {token: index for index, token in enumerate(VOCABULARY)}:
        raise ValueError(
            f"the tokenizer of {model} is not that of the arithmetic recipe ({len(VOCABULARY)} "
            "tokens), which its texts and its test need; pass a model trained on this task, or none"
        )
    return decoder.eval(), tokenizer


def _usable(rows: list[Row]) -> list[Row]:
    usable = []
    for row in rows:
        if row.completion is None or row.correct is None:
            raise ValueError(
                f"{row.where}: the arithmetic recipe needs prompt, completion and correct in each "
                "row; add what is missing, or pass no data to sample them"
            )
        try:
            problem = parse(row.prompt)
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from error
        if split_of(problem) == "train":
            usable.append(row)
    if not usable:
        raise ValueError(f"all {len(rows)} rows are on held-out problems, on which the test asks")
    if len(usable) < len(rows):
        warnings.warn(
            f"{len(rows) - len(usable)} of {len(rows)} rows are on held-out problems and left out: "
            "the test asks those",
            UserWarning,
            stacklevel=3,
        )
    return usable


def _write(path: Path, rows: Sequence[Row]) -> None:
    columns = ("prompt", "completion", "score", "correct")
    with written_whole(path) as partial, partial.open("w") as file:
        for row in rows:
            values = asdict(row)
            file.write(json.dumps({name: values[name] for name in columns}) + "\n")


RECIPE = ArithmeticRecipe()
