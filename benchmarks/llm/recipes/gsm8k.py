"""The GSM8K recipe: any causal language model on labelled solutions of word problems."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.llm.models import SMOLLM2, locate
from benchmarks.llm.recipes.likelihood import mean_log_probs, right_against_wrong
from benchmarks.llm.recipes.recipe import Evaluation, Prepared, Settings
from benchmarks.llm.recipes.solutions import Question, read_questions, rows_of, split

BUNDLED = Path(__file__).parent / "data" / "gsm8k-solutions.jsonl"
_CAUTION = "the questions are from GSM8K's test set: report no GSM8K score of what trains on them"


@dataclass(frozen=True)
class PreparedSolutions(Prepared):
    """Model and training rows with the questions of the test.

    Attributes:
        held_out: Questions with right and wrong solutions, none of them trained on.
    """

    held_out: Sequence[Question] = ()


@dataclass(frozen=True)
class Gsm8kRecipe:
    """Right solutions are D+; a model is tested by how far it prefers right ones to wrong ones.

    The test generates nothing: on held-out questions it compares the log-probs of solutions that
    others wrote, right against wrong, which a model of any size can tell apart to a degree, where
    exact match is 0 for small ones.

    Attributes:
        name: Name on the command line.
        describe: What it is, in a line.
        defaults: Settings of the fine-tuning, for a model as small as SmolLM2-135M; large ones want
            a lower learning rate.
        presets: Empty, as a preset changes the weights alone.
        seeds: Seeds of the runs.
        share: Share of the questions with right and wrong solutions that is held out, about; the
            same questions for all seeds.
        tested: Most held-out questions that the test asks.
    """

    name: str = "gsm8k"
    describe: str = "a causal LM on labelled solutions of GSM8K: right against wrong, held out"
    defaults: Settings = field(
        default_factory=lambda: Settings(
            learning_rate=1e-4, batch_size=8, max_steps=60, warmup=0.1, max_length=512
        )
    )
    presets: Mapping[str, Settings] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    share: float = 0.25
    tested: int = 64

    def prepare(
        self, folder: Path, *, seed: int, model: str | None = None, data: str | None = None
    ) -> PreparedSolutions:
        """See :meth:`Recipe.prepare`.

        Args:
            folder: The cache, for a model that is converted.
            seed: Not used, as nothing is drawn.
            model: Any causal language model, see :mod:`benchmarks.llm.models`; SmolLM2-135M by
                default.
            data: Labelled solutions, see :func:`.solutions.read_questions`; the bundled 400
                questions of GSM8K by default.
        """
        del seed
        questions = read_questions(BUNDLED if data is None else data)
        training, held_out = split(questions, share=self.share)
        rows = rows_of(training)
        notes: dict[str, Any] = {
            "questions": len(training),
            "rows": len(rows),
            "right": sum(bool(row.correct) for row in rows) / len(rows),
            "held_out": len(held_out),
            "tested": min(len(held_out), self.tested),
        }
        if data is None:
            notes["caution"] = _CAUTION
        return PreparedSolutions(
            model=locate(SMOLLM2 if model is None else model, folder),
            rows=rows,
            score_name="right likelier than wrong",
            notes=notes,
            held_out=held_out[: self.tested],
        )

    def evaluate(self, model: Any, tokenizer: Any, prepared: Prepared, *, seed: int) -> Evaluation:
        """Compare log-probs of right and wrong solutions; see :func:`.right_against_wrong`."""
        if not isinstance(prepared, PreparedSolutions):
            raise TypeError(f"{self.name} tests what its own prepare() gave, not {prepared!r:.60}")
        log_probs = mean_log_probs(
            model, tokenizer, rows_of(prepared.held_out), max_length=self.defaults.max_length
        )
        return right_against_wrong(prepared.held_out, log_probs, seed=seed)


RECIPE = Gsm8kRecipe()
