"""The options of ``iwsft loop``: its command line and its settings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from benchmarks.llm.options import (
    ALGORITHMS,
    Options,
    check,
    parse_values,
    recorded,
    to_file,
)
from benchmarks.llm.settings import Engine, Saving, Settings
from benchmarks.options import (
    check_at_least,
    check_folder,
    check_known,
    check_once,
    check_seeds,
    check_used,
    option,
    to_config,
)
from iwsft.loop import check_free

# Name of a verifier -> kind of answer that it compares.
VERIFIERS = {"math": "math", "exact": "text", "integer": "integer", "choice": "letter"}
Drop = Literal["all-wrong", "all-right"]
# The recipe by which a round trains.
RECIPE = "round"
# Options that do not decide the result, or that are known by what they lead to.
_NOT_SETTINGS = {
    *("model", "prompts", "eval_prompts", "rounds", "stop_early", "trust_remote_code"),
    *("out", "resume", "log_every", "save_every", "report_to", "deepspeed", "device", "job"),
}


@dataclass(frozen=True, kw_only=True)
class Repetition:
    """What to repeat."""

    model: Annotated[str, option("ID|DIR")]
    """Model to start from, with its tokenizer."""
    prompts: Annotated[str, option("ID|FILE")]
    """Prompts to answer: JSON lines, Parquet, a folder, or a dataset of the hub as NAME, NAME:SPLIT
    or NAME:SPLIT:CONFIG, with a column prompt, messages, question or problem, and an answer."""
    verifier: Annotated[str, option("NAME|MODULE:FUNCTION")]
    """How an answer is scored: math (Math-Verify), exact, integer or choice compare it with the
    column answer; MODULE:FUNCTION takes the text and the row and returns a number."""
    rounds: int = 4
    """Number of rounds; with --resume it may be larger than before."""
    algo: Annotated[str, option("NAME", help=f"One of {', '.join(ALGORITHMS)}.")] = "iw-sft"
    seed: int = 0
    """Seed of samples and order of training."""
    start_from: Literal["last", "base"] = "last"
    """Model that each round trains: the last round's, or the first one again."""
    eval_prompts: Annotated[str | None, option("ID|FILE")] = None
    """Prompts that are held out, to test each round's model on."""
    eval_samples: int = 1
    """Answers to each of --eval-prompts: the likeliest one, or several sampled ones."""
    stop_early: bool = True
    """End after a round whose test score is below the interval of the best one."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample answers."""

    samples_per_prompt: int = 8
    """Answers to each prompt in a round."""
    sampling_temperature: float = 1.0
    """Temperature of the softmax that tokens are sampled from. With another than 1, answers are not
    drawn from pi_ref, which is the model itself."""
    top_p: float = 1.0
    """Probability mass of the likeliest tokens to sample from. Below 1, answers are not drawn from
    pi_ref, which is the model itself."""
    max_tokens: int = 512
    """Most tokens of an answer."""
    instruction: Annotated[str | None, option("TEXT")] = None
    """Text that follows each prompt, such as how to write the final answer."""
    limit: Annotated[int | None, option("INT", "all")] = None
    """Number of prompts to take from the start of --prompts."""
    backend: Literal["transformers", "vllm"] = "transformers"
    """Library that generates; vllm must be installed."""
    sampling_batch: Annotated[int | None, option("INT", "32, or 512 with vllm")] = None
    """Answers that are generated and written together."""


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which answers to train on."""

    min_score: float = 1.0
    """Least score of a right answer; scores of the named verifiers are 0 and 1."""
    max_per_prompt: Annotated[int | None, option("INT", "all")] = None
    """Most right answers to a prompt; algorithms that learn from wrong ones take as many of
    those."""
    drop: tuple[Drop, ...] = ("all-wrong",)
    """Prompts to leave out: those whose answers are all-wrong, all-right, or both."""
    deduplicate: bool = True
    """Keep one of several answers to a prompt that have the same text."""
    quality: Literal["score", "pass-rate"] = "score"
    """Quality of a right answer, for algorithms that cut by it: its score, or how rarely its
    prompt is answered rightly."""
    keep_rounds: int = 0
    """Number of earlier rounds whose answers are trained on again, each with the log-probabilities
    of the model that wrote them as its reference."""


@dataclass(frozen=True, kw_only=True)
class Output(Saving):
    """Where results go."""

    out: Path = Path("runs/loop")
    """Folder of the loop: OUT/round-K/."""


@dataclass(frozen=True, kw_only=True)
class LoopOptions(Repetition, Sampling, Selection, Engine, Output):
    """Sample answers, verify them, train on the right ones, and again; ``job`` is the training."""

    job: Options

    @property
    def batch(self) -> int:
        """Answers that are generated together."""
        return self.sampling_batch or (512 if self.backend == "vllm" else 32)

    @property
    def keeps_wrong(self) -> bool:
        """Whether wrong answers are rows, too: the algorithm, or --q auto, learns from them."""
        return ALGORITHMS[self.algo].signed or self.job.settings.q is not None

    def is_right(self, score: float | None) -> bool:
        """Whether an answer of this score is right; one without a verdict never is."""
        return score is not None and score >= self.min_score

    @property
    def by_quality(self) -> bool:
        """Whether the algorithm cuts or weighs right answers by their quality."""
        algorithm, settings = ALGORITHMS[self.algo], self.job.settings
        cuts = settings.quality_cuts if algorithm.quality else settings.cuts
        return algorithm.by_score or (bool(cuts) and not algorithm.signed)

    @property
    def needs_reference(self) -> bool:
        """Whether rows need log-probs of the model that wrote them, beside those of training."""
        weights = ALGORITHMS[self.algo].importance_weights(self.job.settings)
        used = ALGORITHMS[self.algo].proposal != "reference" and weights.reference == "fixed"
        return (used or bool(weights.kl)) and (self.keep_rounds > 0 or self.start_from == "base")

    @property
    def settings(self) -> dict[str, Any]:
        """The options that decide the result."""
        names = [each.name for each in fields(self) if each.name not in _NOT_SETTINGS]
        kept = {name: getattr(self, name) for name in names}
        training = recorded(self.job.settings, ALGORITHMS[self.algo])
        return {**kept, "sampling_batch": self.batch, "training": training}

    @property
    def file(self) -> dict[str, Any]:
        """The options, which ``--config`` takes back."""
        names = {each.name for each in fields(Settings)}
        training = to_file(self.job, self.algo, self.seed)
        needed = {name: getattr(self, name) for name in ("model", "prompts", "verifier")}
        chosen = {name: value for name, value in training.items() if name in names}
        return {**needed, **to_config(self), **chosen}

    def check(self) -> None:
        """Check the values of the options."""
        check_folder(self.model)
        counts = (
            *("rounds", "eval_samples", "samples_per_prompt", "max_tokens", "limit"),
            *("sampling_batch", "max_per_prompt"),
        )
        check_at_least(1, **{name: getattr(self, name) for name in counts})
        check_at_least(0, keep_rounds=self.keep_rounds)
        check_seeds((self.seed,), "seed")
        if self.drop:
            check_once(drop=self.drop)
        verifier_of(self.verifier)
        if not math.isfinite(self.min_score):
            raise ValueError(f"--min-score {self.min_score}: a finite number")
        if self.verifier in VERIFIERS and not 0 < self.min_score <= 1:
            raise ValueError(
                f"--min-score {self.min_score:g}: --verifier {self.verifier} gives 0 or 1, so it "
                "must be above 0 and at most 1"
            )
        if not 0 < self.sampling_temperature < math.inf:
            temperature = self.sampling_temperature
            raise ValueError(f"--sampling-temperature {temperature}: a finite number above 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p}: a probability mass in (0, 1]")
        held_out = self.eval_prompts is not None
        several = self.eval_samples if self.eval_samples != 1 else None
        check_used("eval_samples", several, held_out, "without --eval-prompts")
        if self.backend == "vllm" and find_spec("vllm") is None:
            raise ImportError("vllm is not installed: pip install vllm, which no extra brings")
        if self.by_quality and self.verifier in VERIFIERS and self.quality == "score":
            raise ValueError(
                f"{self.algo} learns by quality, and --verifier {self.verifier} gives all right "
                "answers the same; pass --quality pass-rate, or a verifier of your own"
            )
        normalized = self.job.settings.normalize_data_weights or None
        weighted = ALGORITHMS[self.algo].signed or ALGORITHMS[self.algo].by_score
        check_used("normalize_data_weights", normalized, weighted, f"in {self.algo} of the loop")


def verifier_of(name: str) -> str | None:
    """The file of a verifier of the user's own; None for a named one. It is not imported.

    Raises:
        ValueError: There is no such verifier.
    """
    if name in VERIFIERS:
        return None
    module, _, function = name.partition(":")
    if not module or not function:
        check_known("verifier", name, [*VERIFIERS, "MODULE:FUNCTION"])
    try:
        spec = find_spec(module)
    # A parent package that is not one.
    except ModuleNotFoundError:
        spec = None
    if spec is None:
        raise ValueError(
            f"--verifier {name}: there is no module {module}; run in its folder, or install it"
        )
    return spec.origin


def parse(words: Sequence[str], description: str | None) -> LoopOptions:
    """Read and check a command line; an error names the option, its value and the way out."""
    groups = LoopOptions.__bases__
    values, settings, changed = parse_values(groups, words, "llm loop", description, RECIPE)
    names = {each.name for each in fields(Options)}
    shared = {name: value for name, value in values.items() if name in names}
    check_known("algorithm", values["algo"], list(ALGORITHMS))
    shared |= {"algo": (values["algo"],), "seeds": (values["seed"],), "recipe": RECIPE}
    # The rows of a round are checked when they are there.
    job = Options(**shared, data="rows of the round", settings=settings)
    options = LoopOptions(**values, job=job)
    options.check()
    check(job, changed)
    if not options.resume:
        check_free(options.out)
    return options
