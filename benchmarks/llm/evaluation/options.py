"""The options of ``iwsft evaluate``: its command line and its settings."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from benchmarks.device import check_device, chosen_device
from benchmarks.options import (
    check_at_least,
    check_file,
    check_folder,
    check_seeds,
    check_used,
    option,
)
from benchmarks.runs import check_free
from iwsft import checkpoint

Backend = Literal["transformers", "vllm"]
# A batch is written as a whole; within it, vLLM schedules by itself.
_BATCH: dict[Backend, int] = {"transformers": 8, "vllm": 512}
# The options that do not decide the generations, or that a run knows by what they lead to.
_NOT_SETTINGS = {"model", "tasks", "batch_size", "device", "trust_remote_code", "out", "resume"}


@dataclass(frozen=True)
class Options:
    """Generate answers to the questions of tasks and grade them."""

    model: Annotated[str, option("ID|DIR")]
    """Model in transformers' format with its tokenizer: a folder or a hub id."""
    # A task may be followed by its file, so that tyro can't list the choices.
    tasks: Annotated[tuple[str, ...], option("NAME[=FILE] [...]")] = ("math-500",)
    """One or several of math-500, aime-2024, aime-2025, gpqa-diamond, gsm8k, minerva-math,
    olympiadbench, amc-2023. NAME=FILE reads a JSON-lines or Parquet file with the columns of the
    public dataset."""
    n: int = 1
    """Answers to each question; several need a --temperature above 0."""
    temperature: float = 0.0
    """Temperature of the softmax that tokens are sampled from; 0 takes the likeliest token."""
    top_p: float = 1.0
    """Probability mass of the likeliest tokens to sample from."""
    max_tokens: int = 4096
    """Most tokens of an answer; with --think-budget, of the part after the thinking."""
    think_budget: Annotated[int | None, option("INT", "no budget")] = None
    """Most tokens of thinking, by budget forcing (Muennighoff et al. 2025)."""
    waits: int = 0
    """How often "Wait" replaces the end of the thinking."""
    think_format: Literal["s1", "tags"] = "s1"
    """Delimiters of the model's thinking: <|im_start|>think, or <think>...</think>."""
    seed: int = 0
    """Seed of sampled tokens and of GPQA's order of choices."""
    limit: Annotated[int | None, option("INT", "all")] = None
    """Number of questions to take from the start of each task."""
    backend: Backend = "transformers"
    """Library that generates; vllm must be installed."""
    batch_size: Annotated[int | None, option("INT", "8, or 512 with vllm")] = None
    """Answers that are generated and written together."""
    device: Annotated[str | None, option("NAME", "a GPU where there is one")] = None
    """Device for transformers: cpu, cuda, ..., or auto to spread the model over all devices."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of the weights; auto keeps the format of the model's files."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    out: Path = Path("runs/llm-evaluation")
    """Folder of all results: OUT/MODEL/TASK/."""
    resume: bool = False
    """Continue an interrupted evaluation and keep what it generated."""

    @property
    def name(self) -> str:
        """The name of the model's folder of results; that of a run's model names the run."""
        folder = Path(self.model).resolve()
        run = folder.parts[-4:-1] if folder.name == checkpoint.FOLDER else ()
        return "-".join(run) or folder.name

    def folder(self, task: str) -> Path:
        """The folder of the results of a task, ``NAME`` or ``NAME=FILE``."""
        return self.out / self.name / task.partition("=")[0]

    @property
    def batch(self) -> int:
        """Answers that are generated together."""
        return _BATCH[self.backend] if self.batch_size is None else self.batch_size

    @property
    def used_device(self) -> str:
        """The device on which the model runs."""
        # vLLM and auto take GPUs.
        named = self.backend == "transformers" and self.device != "auto"
        return chosen_device(self.device if named else None)

    @property
    def settings(self) -> dict[str, Any]:
        """The options that decide what is generated."""
        return {
            "batch_size": self.batch,
            **{name: value for name, value in asdict(self).items() if name not in _NOT_SETTINGS},
            # vLLM chooses its own device.
            "device": chosen_device(self.device) if self.backend == "transformers" else None,
        }

    def check(self) -> None:
        """Check the values of the options."""
        check_folder(self.model)
        for task in self.tasks:
            check_file(task.partition("=")[2])
        positive = ("n", "max_tokens", "think_budget", "limit", "batch_size")
        check_at_least(1, **{name: getattr(self, name) for name in positive})
        check_at_least(0, waits=self.waits)
        check_seeds((self.seed,), "seed")
        thinks, without = self.think_budget is not None, "without --think-budget"
        for name, used, where in (
            ("waits", thinks, without),
            ("think_format", thinks, without),
            ("top_p", self.temperature != 0, "with --temperature 0"),
            ("device", self.backend == "transformers", "with --backend vllm"),
        ):
            value = getattr(self, name)
            check_used(name, None if value == getattr(Options, name) else value, used, where)
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"--temperature {self.temperature}: 0 or above")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p}: a probability mass in (0, 1]")
        if self.n > 1 and self.temperature == 0:
            raise ValueError(f"--n {self.n}: --temperature 0 gives the same answer each time")
        if self.backend == "vllm" and find_spec("vllm") is None:
            raise ImportError("vllm is not installed: pip install vllm, which no extra brings")
        # `auto` is always available.
        if self.device != "auto":
            check_device(self.device or "cpu")
        if not self.resume:
            check_free(map(self.folder, self.tasks))
