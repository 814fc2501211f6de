"""The paper's recipe: Qwen2.5-32B-Instruct on the 1,000 reasoning traces of s1K-1.1."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.commands import program
from benchmarks.llm.recipes import OWN, Prepared, Sources
from benchmarks.llm.recipes.chat import ChatRecipe
from benchmarks.llm.settings import Settings

if TYPE_CHECKING:
    from iwsft.datasets.text.rows import Row

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
    "--model RUN --backend vllm --tasks math-500 aime-2024 gpqa-diamond --max-tokens 32000"
)


@dataclass(frozen=True)
class S1kRecipe(ChatRecipe):
    """All rows of s1K-1.1 are D+: the set is curated, and the paper trains on all 1,000.

    The default settings are those of the authors' code. The paper's own weights, ``PAPER``, start
    at e^(0.02 T) for a trajectory of T tokens: beyond float32 for T > 4,436, and most traces are
    longer. A given model must have Qwen2.5's tokenizer. Given rows have the columns of s1K or
    s1K-1.1.

    The test is how well the training rows are fitted. What the paper reports takes hours of
    generation: run it on the finished model, see ``notes["benchmarks"]``.
    """

    defaults: Settings = AUTHORS
    presets: Mapping[str, Settings] = field(
        default_factory=lambda: {"paper_llm": PAPER, "authors_llm": AUTHORS}
    )
    # The rows have no score, which SFT(Q) needs.
    algos: tuple[str, ...] = ("base", "sft", "iw-sft", "iw-sft-hard", "iw-sft-ema", "iw-sft-step")
    needs: tuple[str, ...] = ()
    compares: bool = False
    model: str = MODEL
    data: str = DATA
    share: float | None = None
    tested: int = 32

    def read(self, source: str) -> list[Row]:
        """Read traces; a grade would make D+ of the right rows alone, so it is left out."""
        from iwsft.datasets.text import s1k
        from iwsft.datasets.text.rows import read

        return [replace(row, correct=None) for row in read(source, make=s1k.to_row)]

    def prepare(self, folder: Path, sources: Sources = OWN, *, seed: int) -> Prepared:
        """See :meth:`ChatRecipe.prepare`."""
        from benchmarks.llm.models import load_tokenizer
        from iwsft.datasets.text import s1k

        prepared = super().prepare(folder, sources, seed=seed)
        trusted = sources.trust_remote_code
        s1k.set_pad_token(load_tokenizer(prepared.model, trust_remote_code=trusted))
        notes = {
            **prepared.notes,
            "pad_token": s1k.PAD_TOKEN,
            "benchmarks": f"{program('llm evaluate')} {_BENCHMARKS}",
        }
        return replace(prepared, notes=notes)


RECIPE = S1kRecipe()
