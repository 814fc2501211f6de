"""The GSM8K recipe: any causal language model on labelled solutions of word problems."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.llm.recipes import OWN, Evaluation, Prepared, Sources
from benchmarks.llm.recipes.chat import ChatRecipe, Group, right_against_wrong
from benchmarks.llm.settings import Settings

if TYPE_CHECKING:
    from iwsft.datasets.text.rows import Row
    from iwsft.datasets.text.sources import Record

BUNDLED = Path(__file__).parent / "data" / "gsm8k-solutions.jsonl"
_CAUTION = "the questions are from GSM8K's test set: report no GSM8K score of what trains on them"
# GSM8K marks what its calculator computed: 3*4 = <<3*4=12>>12.
_CALCULATION = re.compile(r"<<[^<>]*>>")
_LABEL, _TEXT = "is_correct", "solution"


@dataclass(frozen=True)
class Gsm8kRecipe(ChatRecipe):
    """Right solutions are D+; a model is tested by how far it prefers right ones to wrong ones.

    Those are solutions to held-out questions that others wrote: a model of any size can tell them
    apart to a degree, where exact match is 0 for small ones. The defaults are SmolLM2-135M and 400
    bundled questions; larger models want a lower learning rate.
    """

    defaults: Settings = Settings(
        learning_rate=1e-4, batch_size=8, max_steps=60, warmup=0.1, max_length=512
    )
    # The solutions have no score, which SFT(Q) needs.
    algos: tuple[str, ...] = ("base", "sft", "iw-sft", "iw-sft-hard", "iw-sft-ema", "iw-sft-step")
    needs: tuple[str, ...] = ()
    compares: bool = False
    model: str = "smollm2-135m"
    data: str = str(BUNDLED)
    # 53 of the 208 bundled questions that have right and wrong solutions.
    share: float | None = 0.255
    tested: int = 64

    def read(self, source: str) -> list[Row]:
        """Read labelled solutions, or questions of GSM8K's ``example_model_solutions.jsonl``.

        Those have ``question``, and for each model an object with ``is_correct`` and ``solution``.
        """
        from iwsft.datasets.text.sources import records

        return [
            row
            for where, record in records(source)
            for row in (
                _of_question(record, where) if "question" in record else [_labelled(record, where)]
            )
        ]

    def testable(self, group: Group) -> bool:
        """Whether a question has right and wrong solutions."""
        return len({row.correct for row in group}) == 2

    def prepare(self, folder: Path, sources: Sources = OWN, *, seed: int) -> Prepared:
        """See :meth:`ChatRecipe.prepare`."""
        prepared = super().prepare(folder, sources, seed=seed)
        notes = {**prepared.notes, **({} if sources.data else {"caution": _CAUTION})}
        return replace(prepared, score_name="right likelier than wrong", notes=notes)

    def evaluate(self, model: Any, tokenizer: Any, prepared: Prepared, *, seed: int) -> Evaluation:
        """Compare log-probs of right and wrong solutions, see ``right_against_wrong``."""
        return right_against_wrong(self.log_probs(model, tokenizer, prepared))


def _of_question(record: Record, where: str) -> Iterator[Row]:
    from iwsft.datasets.text.rows import check_text
    from iwsft.datasets.text.sources import row_named

    with row_named(where):
        question = check_text(record["question"], "question").strip()
    prompt = f"Question: {question}\nAnswer:\n"
    solutions = {
        name: value
        for name, value in record.items()
        if isinstance(value, Mapping) and _LABEL in value and _TEXT in value
    }
    if not question or not solutions:
        raise ValueError(f"{where}: needs a question, and for a model {{{_LABEL}, {_TEXT}}}")
    for name, value in solutions.items():
        here = f"{where}, {name}"
        with row_named(here):
            text = _CALCULATION.sub("", check_text(value[_TEXT], _TEXT)).strip()
        yield _labelled({"prompt": prompt, "completion": text, "correct": value[_LABEL]}, here)


def _labelled(record: Record, where: str) -> Row:
    from iwsft.datasets.text.rows import to_row

    row = to_row(record, where)
    if row.completion is None or row.correct is None:
        raise ValueError(f"{where}: a labelled solution has 'prompt', 'completion' and 'correct'")
    return row


RECIPE = Gsm8kRecipe()
