"""The arithmetic recipe: a base model of strategies, its own judged samples, held-out sums."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.llm.kept import RECORD
from benchmarks.llm.recipes.arithmetic.base import BaseSettings
from benchmarks.llm.recipes.arithmetic.cache import base_model
from benchmarks.llm.recipes.arithmetic.checker import check
from benchmarks.llm.recipes.arithmetic.evaluation import evaluate
from benchmarks.llm.recipes.arithmetic.samples import Sample, rates, sample, to_rows
from benchmarks.llm.recipes.arithmetic.task import parse, problems, split_of
from benchmarks.llm.recipes.arithmetic.theory import after_rounds, mean_score
from benchmarks.llm.recipes.arithmetic.tokenizer import VOCABULARY
from benchmarks.llm.recipes.recipe import Defaults, Evaluation, Prepared
from iwsft.datasets.text.rows import Row, read
from iwsft.files import written_whole
from iwsft.fingerprint import fingerprint

# The base model's texts are drawn with small seeds.
_FIRST_SAMPLE_SEED = 1_000_000
# Settings were chosen on the held-out problems of seed 0; the test is on others.
TEST_SEED = 1


def _defaults() -> Defaults:
    return Defaults(
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
        name: as on the command line.
        describe: what it is, in a line.
        defaults: settings of the fine-tuning.
        base: size and training of the base model.
        base_seed: of its weights and texts.
        samples: problems it solves once each; the right ones are D+.
        held_out: problems of the test, the same for all seeds.
    """

    name: str = "arithmetic"
    describe: str = "a 1M-parameter decoder solves sums by three strategies, tuned on its successes"
    defaults: Defaults = field(default_factory=_defaults)
    base: BaseSettings = field(default_factory=BaseSettings)
    base_seed: int = 0
    samples: int = 2000
    held_out: int = 1000

    def prepare(
        self, folder: Path, *, seed: int, model: str | None = None, data: str | None = None
    ) -> Prepared:
        """See :meth:`Recipe.prepare`.

        Args:
            folder: of the cache: the base model, and the rows of each seed as JSON lines.
            seed: of the problems and the samples, at least 0.
            model: a folder with a decoder that has this recipe's tokenizer; it is sampled instead.
            data: rows of this task with ``prompt``, ``completion`` and ``correct``; nothing is
                sampled. Rows on held-out problems are left out with a warning.
        """
        if seed < 0:
            raise ValueError(f"seed={seed} must be at least 0")
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
                asked = problems(self.samples, _FIRST_SAMPLE_SEED + seed, "train")
                _write(path, to_rows(sample(decoder, tokenizer, asked, seed=seed)))
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
        """Held-out problems, one sampled answer each; see :class:`.evaluation.Outcome`."""
        del prepared
        outcome = evaluate(
            model, tokenizer, problems(self.held_out, TEST_SEED, "held-out"), seed=seed
        )
        return {
            "score": outcome.sampled.share,
            "interval": outcome.sampled.interval,
            "n": outcome.sampled.problems,
            "greedy": outcome.greedy.share,
            "greedy_interval": outcome.greedy.interval,
            **{f"share_{name}": share for name, share in outcome.shares.items()},
            **{f"success_{name}": share for name, share in outcome.success.items()},
            "parses": outcome.parses,
            "tokens": outcome.tokens,
        }


def facts(rows: Sequence[Row]) -> Mapping[str, Any]:
    """What the rows say of the policy that wrote them, and what theory says of tuning on them.

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
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
        decoder = AutoModelForCausalLM.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{model} can't be loaded ({str(error).splitlines()[0]}); pass a folder written by "
            "save_pretrained, or no model"
        ) from error
    if tokenizer.get_vocab() != {token: index for index, token in enumerate(VOCABULARY)}:
        raise ValueError(
            f"the tokenizer of {model} is not that of the arithmetic recipe ({len(VOCABULARY)} "
            "tokens), which its texts and its test need; pass a model trained on this task, or none"
        )
    return decoder.eval(), tokenizer


def _usable(rows: list[Row]) -> list[Row]:
    kept = []
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
            kept.append(row)
    if not kept:
        raise ValueError(f"all {len(rows)} rows are on held-out problems, on which the test asks")
    if len(kept) < len(rows):
        warnings.warn(
            f"{len(rows) - len(kept)} of {len(rows)} rows are on held-out problems and left out: "
            "the test asks those",
            UserWarning,
            stacklevel=3,
        )
    return kept


def _write(path: Path, rows: Sequence[Row]) -> None:
    columns = ("prompt", "completion", "score", "correct")
    with written_whole(path) as partial, partial.open("w") as file:
        for row in rows:
            values = asdict(row)
            file.write(json.dumps({name: values[name] for name in columns}) + "\n")


RECIPE = ArithmeticRecipe()
