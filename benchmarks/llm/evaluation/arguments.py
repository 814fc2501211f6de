"""The command line of ``python -m benchmarks.llm evaluate``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

Backend = Literal["transformers", "vllm"]
# A batch is what is written in one go; vLLM schedules within it by itself.
_BATCH: dict[Backend, int] = {"transformers": 8, "vllm": 512}


@dataclass(frozen=True)
class Arguments:
    """Generate answers to the questions of tasks and grade them."""

    model: Annotated[str, tyro.conf.arg(metavar="ID|DIR")]
    """In transformers' format, with its tokenizer: a folder, or a hub id."""
    # Names are checked by us: a task may be followed by the file it is read from.
    tasks: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME[=FILE] [...]")] = ("math-500",)
    """One or several of math-500, aime-2024, aime-2025, gpqa-diamond, gsm8k; NAME=FILE reads a
    JSON-lines or Parquet file with the columns of the public dataset."""
    n: int = 1
    """Answers a question; above 1 they are drawn (--temperature)."""
    temperature: float = 0.0
    """Of the distribution that tokens are drawn from; 0 takes the likeliest."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that hold this mass."""
    max_tokens: int = 4096
    """Tokens of an answer; with --think-budget, those after the thinking."""
    think_budget: int | None = None
    """Force the thinking to at most so many tokens (budget forcing, Muennighoff et al. 2025)."""
    waits: int = 0
    """How often the end of the thinking is replaced by "Wait"."""
    think_format: Literal["s1", "tags"] = "s1"
    """How the model marks its thinking: <|im_start|>think, or <think>...</think>."""
    limit: int | None = None
    """Only the first LIMIT questions of each task."""
    seed: int = 0
    """Of the draws, of GPQA's order of choices, and of bootstrap intervals."""
    backend: Backend = "transformers"
    """What generates; vllm where it is installed."""
    batch_size: int | None = None
    """Answers at a time, and written in one go; by default 8, with vllm 512."""
    device: str = "cpu"
    """Of transformers: cpu, cuda, ..., or auto to spread the model over what is there."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the weights; auto is what the model was saved in."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    out: Path = Path("runs/llm-evaluation")
    """Folder of all results: OUT/MODEL/TASK/."""
    resume: bool = False
    """Go on where a run was cut off; what is generated is kept."""

    @property
    def batch(self) -> int:
        """Answers at a time."""
        return _BATCH[self.backend] if self.batch_size is None else self.batch_size


def check(arguments: Arguments) -> None:
    """Check the numbers of a command line.

    Raises:
        ValueError: naming the setting, its value and the way out.
    """
    if not arguments.tasks:
        raise ValueError("nothing to evaluate: pass at least one name to --tasks")
    for flag, number in (
        ("--n", arguments.n),
        ("--max-tokens", arguments.max_tokens),
        ("--think-budget", arguments.think_budget),
        ("--limit", arguments.limit),
        ("--batch-size", arguments.batch_size),
    ):
        if number is not None and number < 1:
            raise ValueError(f"{flag} {number}: at least 1")
    if arguments.waits < 0:
        raise ValueError(f"--waits {arguments.waits}: 0 or more")
    if arguments.waits and arguments.think_budget is None:
        raise ValueError(f"--waits {arguments.waits} changes nothing without --think-budget")
    if arguments.temperature < 0:
        raise ValueError(f"--temperature {arguments.temperature}: 0 or above")
    if not 0 < arguments.top_p <= 1:
        raise ValueError(f"--top-p {arguments.top_p}: a mass in (0, 1]")
    if arguments.n > 1 and arguments.temperature == 0:
        raise ValueError(
            f"--n {arguments.n} with --temperature 0 gives the same answer {arguments.n} times; "
            "raise the temperature, or leave out --n"
        )
