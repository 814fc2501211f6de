"""The paper's recipe: Qwen2.5-32B-Instruct on the 1,000 reasoning traces of s1K-1.1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.llm.models import load_tokenizer, locate, mean_log_probs
from benchmarks.llm.recipes import Evaluation, Prepared, Recipe, Settings
from benchmarks.statistics import bootstrap_interval
from iwsft.datasets.text import s1k
from iwsft.datasets.text.rows import Row, read

MODEL = "Qwen/Qwen2.5-32B-Instruct"
DATA = "simplescaling/s1K-1.1"

# Paper, section 4.1 and appendix C; what it leaves open (lengths, precision, accumulation) is as in
# the authors' runs.
PAPER = Settings(
    learning_rate=1e-5,
    batch_size=8,
    epochs=5,
    warmup=0.05,
    weight_decay=1e-4,
    adam_beta1=0.9,
    adam_beta2=0.95,
    scheduler="cosine",
    max_length=22_000,
    length_normalize=False,
    preset="paper_llm",
    micro_batch_size=1,
    precision="bfloat16",
    gradient_checkpointing=True,
)
# Their code has other weights, and divides a trajectory's log-probability by its length.
AUTHORS = replace(PAPER, length_normalize=True, preset="authors_llm")
_BENCHMARKS = (
    "python -m benchmarks.llm evaluate --model RUN --backend vllm --tasks math-500 aime-2024 "
    "gpqa-diamond --max-tokens 32000"
)


@dataclass(frozen=True)
class S1kRecipe(Recipe):
    """All rows of s1K-1.1 are D+: the set is curated, and the paper trains on all 1,000.

    The default settings are those of the authors' code. The paper's own weights, ``PAPER``, start
    at e^(0.02 T) for a trajectory of T tokens: beyond float32 for T > 4,436, and most traces are
    longer.

    The test is how well the training rows are fitted. What the paper reports takes hours of
    generation: run it on the finished model, see ``notes["benchmarks"]``.
    """

    name: str = "s1k"
    defaults: Settings = AUTHORS
    presets: Mapping[str, Settings] = field(
        default_factory=lambda: {"paper_llm": PAPER, "authors_llm": AUTHORS}
    )
    # Rows that the test reads at the most.
    tested: int = 32

    def prepare(
        self,
        folder: Path,
        *,
        seed: int,
        model: str | None = None,
        data: str | None = None,
        trust_remote_code: bool = False,
    ) -> Prepared:
        """See :meth:`Recipe.prepare`; nothing is drawn, so all seeds have the same rows.

        A given model must have Qwen2.5's tokenizer. Given rows have the columns of s1K or s1K-1.1.
        """
        del seed
        where = locate(MODEL if model is None else model, folder)
        s1k.set_pad_token(load_tokenizer(where, trust_remote_code=trust_remote_code))
        rows = read(DATA if data is None else data, make=s1k.to_row)
        graded = [row.correct for row in rows if row.correct is not None]
        notes: dict[str, Any] = {
            "rows": len(rows),
            "graded": len(graded),
            "graded_right": sum(graded),
            "pad_token": s1k.PAD_TOKEN,
            "benchmarks": _BENCHMARKS,
        }
        return Prepared(
            model=where,
            # A grade would make D+ of the right rows alone.
            rows=[replace(row, correct=None) for row in rows],
            score_name="token probability, training rows",
            notes=notes,
        )

    def tested_rows(self, prepared: Prepared) -> list[Row]:
        """See :meth:`Recipe.tested_rows`."""
        return prepared.rows[: self.tested]

    def evaluate(self, model: Any, tokenizer: Any, prepared: Prepared, *, seed: int) -> Evaluation:
        """Measure how well the first training rows are fitted.

        ``score`` is exp of ``log_prob``: the mean over rows of the mean log p of a token, in nats.
        """
        log_probs = mean_log_probs(
            model, tokenizer, self.tested_rows(prepared), max_length=self.defaults.max_length
        )
        low, high = bootstrap_interval(log_probs, seed=seed)
        return {
            "score": math.exp(log_probs.mean()),
            "interval": (math.exp(low), math.exp(high)),
            "n": len(log_probs),
            "log_prob": float(log_probs.mean()),
        }


RECIPE = S1kRecipe()
