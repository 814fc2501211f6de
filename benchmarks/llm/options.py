"""The algorithms and the command line of ``python -m benchmarks.llm``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from transformers import SchedulerType
from transformers.integrations.integration_utils import get_available_reporting_integrations

from benchmarks.llm.recipes import RECIPES, Recipe, Settings, load_recipe
from benchmarks.options import (
    called_as,
    check_at_least,
    check_device,
    check_known,
    check_once,
    check_seeds,
    check_used,
    flag,
)
from iwsft.objective import Proposal

# The model as it is, tested alone.
BASE = "base"


@dataclass(frozen=True)
class Variant:
    """An algorithm, as a variant of weighted fine-tuning.

    ``proposal`` is what q is, see :class:`iwsft.language.config.ImportanceWeightedConfig`.
    ``quality`` trains on D_Q+, where better rows count several times, instead of D+. ``per_step``
    lets each token's ratio weigh its own loss, instead of the trajectory's.
    """

    proposal: Proposal
    quality: bool = False
    per_step: bool = False

    @property
    def weighted(self) -> bool:
        """Whether trajectories are weighed as wholes."""
        return self.proposal != "reference" and not self.per_step


ALGORITHMS = {
    "sft": Variant("reference"),
    "sft-q": Variant("reference", quality=True),
    "iw-sft": Variant("current"),
    "iw-sft-hard": Variant("cached"),
    "iw-sft-ema": Variant("lagged"),
    "iw-sft-q": Variant("current", quality=True),
    "iw-sft-step": Variant("current", per_step=True),
}
NAMES = (BASE, *ALGORITHMS)


def choose_q(algorithm: Variant, settings: Settings, parts: int) -> tuple[Proposal, int | None]:
    """Choose what q is, and how many updates follow a hard sync.

    Weights that are compared with each other (divided by their mean, say) have to be known for the
    whole update. Where an update has several micro-batches (``parts``, over all processes), its
    weights are therefore computed before it; q is still theta.
    """
    if algorithm.proposal == "cached":
        return "cached", settings.sync_every
    weights = settings.importance_weights(per_step=algorithm.per_step)
    if algorithm.proposal == "current" and parts > 1 and weights.compares:
        return "cached", 1
    return algorithm.proposal, None


# Setting -> which algorithms it changes something in, given all settings.
_USED: dict[str, Callable[[Variant, Settings], bool]] = {
    "cuts": lambda algorithm, _: not algorithm.quality,
    "quality_cuts": lambda algorithm, _: algorithm.quality,
    "sync_every": lambda algorithm, _: algorithm.proposal == "cached",
    "ema_decay": lambda algorithm, _: algorithm.proposal == "lagged",
    "preset": lambda algorithm, _: algorithm.weighted,
    "step_clip": lambda algorithm, _: algorithm.per_step,
    **dict.fromkeys(
        ("temperature", "reduce", "max_weight", "self_normalize"),
        lambda algorithm, settings: algorithm.weighted and settings.preset == "recipe",
    ),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Fine-tune and test a language model by several algorithms and seeds."""

    recipe: Annotated[
        str,
        tyro.conf.arg(
            metavar="NAME",
            help=f"Model, data, settings and test: one of {', '.join(RECIPES)}. What the command "
            "line leaves out is the recipe's.",
        ),
    ] = "arithmetic"
    # Names are checked by us: tyro would not say which one is near.
    algo: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="NAME [NAME ...]", help=f"One or several of {', '.join(NAMES)}."),
    ] = Recipe.algos
    seeds: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT [INT ...]")]
    """Seeds of samples, order of training and test; one run each, but base has one."""
    model: Annotated[str | None, tyro.conf.arg(metavar="ID|DIR")] = None
    """Model to start from; by default the recipe's own."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    data: Annotated[str | None, tyro.conf.arg(metavar="ID|FILE")] = None
    """Rows to train on: a file, a folder, or a dataset of the hub as NAME, NAME:SPLIT or
    NAME:SPLIT:CONFIG; by default the recipe's own."""
    eval_data: Annotated[str | None, tyro.conf.arg(metavar="ID|FILE")] = None
    """Rows to test on."""
    eval_share: float | None = None
    """Share of the prompts of --data to hold out and test on; by default the recipe's, unless there
    is --eval-data."""
    deepspeed: Annotated[
        tuple[str, ...] | None,
        tyro.conf.arg(
            metavar="[CONFIG]",
            help="Train under accelerate, with one process per GPU, or 2 on the CPU. CONFIG is a "
            "name in benchmarks/llm/configs, a YAML file of accelerate or a JSON file of "
            "DeepSpeed; without CONFIG the command chooses one that fits.",
        ),
    ] = None
    settings: Annotated[Settings, tyro.conf.arg(name="")]
    device: Annotated[str | None, tyro.conf.arg(metavar="cpu|cuda")] = None
    """Device of a run that is one process; by default a GPU where there is one."""
    jobs: int | None = None
    """Runs at a time; by default one per core, or one on a GPU. With --deepspeed one."""
    log_every: int = 1
    """Updates between log lines."""
    save_every: int | None = None
    """Updates between checkpoints; by default a fifth of the run."""
    report_to: tuple[str, ...] = ()
    """Send the metrics to these of transformers' trackers, too: tensorboard, wandb, trackio, ..."""
    out: Path = Path("runs")
    """Folder of all runs: OUT/llm/RECIPE/ALGO/seed-K/."""
    resume: bool = False
    """Continue runs that were cut off; finished ones are kept."""

    @property
    def own_device(self) -> Literal["cpu", "cuda"]:
        """The device of a run that is one process."""
        return "cpu" if self.device == "cpu" or not torch.cuda.is_available() else "cuda"


@dataclass(frozen=True)
class _Start:
    """The options that decide the defaults of the others."""

    recipe: str = Options.recipe
    preset: str | None = None
    lora_rank: int | None = None


def parse(words: Sequence[str], description: str | None = None) -> Options:
    """Read and check a command line; an error names the option, its value and the way out."""
    given, _ = tyro.cli(_Start, args=words, add_help=False, return_unknown_args=True)
    recipe = load_recipe(given.recipe)
    start = recipe.presets.get(given.preset or "", recipe.defaults)
    if given.lora_rank is not None:
        start = replace(start, learning_rate=10 * start.learning_rate)
    # The length of training is set in one of two ways; the one that is given replaces the other.
    blank = replace(start, max_steps=None, epochs=None)
    default = Options(recipe=given.recipe, algo=recipe.algos, seeds=recipe.seeds, settings=blank)
    options = tyro.cli(
        Options, args=words, prog=called_as("llm"), description=description, default=default
    )
    if recipe.compares and BASE not in options.algo:
        options = replace(options, algo=(BASE, *options.algo))
    settings = options.settings
    changed = {
        field.name: getattr(settings, field.name)
        for field in fields(settings)
        if getattr(settings, field.name) != getattr(blank, field.name)
    }
    if given.preset is not None:
        changed["preset"] = given.preset
    if settings.max_steps is None and settings.epochs is None:
        settings = replace(settings, max_steps=start.max_steps, epochs=start.epochs)
    _check(options, settings, changed)
    _check_data(options, recipe)
    return replace(options, settings=settings)


def _check(options: Options, settings: Settings, changed: dict[str, Any]) -> None:
    """Check all that can be known to be wrong before anything is prepared or trained."""
    for name in options.algo:
        check_known("algorithm", name, NAMES)
    check_once(algo=options.algo)
    check_seeds(options.seeds)
    config = options.deepspeed
    if config is not None and len(config) > 1:
        raise ValueError(f"--deepspeed {' '.join(config)}: one config, or none to choose one")
    for name in ("jobs", "device"):
        check_used(name, getattr(options, name), config is None, "with --deepspeed")
    for name in ("log_every", "save_every", "report_to"):
        value = getattr(options, name)
        changes = None if value == getattr(Options, name) else value
        check_used(name, changes, set(options.algo) != {BASE}, "in base")
    for tracker in options.report_to:
        check_known("installed tracker", tracker, get_available_reporting_integrations())
    if options.device is not None:
        check_known("device", options.device, ("cpu", "cuda"))
        check_device(options.device)
    check_at_least(1, jobs=options.jobs, log_every=options.log_every, save_every=options.save_every)
    algorithms = [ALGORITHMS[name] for name in options.algo if name != BASE]
    for name, value in changed.items():
        used = _USED.get(name, lambda algorithm, settings: True)
        preset = f" with preset {settings.preset!r}" if settings.preset != "recipe" else ""
        anywhere = any(used(algorithm, settings) for algorithm in algorithms)
        check_used(name, value, anywhere, f"in the algorithms asked for{preset}")
    if settings.scheduler == "constant":
        check_used("warmup", changed.get("warmup"), False, "with --scheduler constant")
    _check_numbers(settings)


def _check_data(options: Options, recipe: Recipe) -> None:
    for name in recipe.needs:
        if getattr(options, name) is None:
            raise ValueError(f"--recipe {recipe.name} needs {flag(name)}, which it has no own of")
    for name in ("eval_data", "eval_share"):
        check_used(name, getattr(options, name), recipe.holds_out, f"in recipe {recipe.name}")
    share = options.eval_share
    if share is not None and options.eval_data is not None:
        raise ValueError("--eval-data and --eval-share: pass one of them")
    if share is not None and not 0 < share < 1:
        raise ValueError(f"--eval-share {share}: above 0 and below 1")
    if options.settings.lora_rank is not None and find_spec("peft") is None:
        raise ImportError("--lora-rank needs the package peft: pip install 'iwsft[language]'")


def _check_numbers(settings: Settings) -> None:
    if settings.max_steps is not None and settings.epochs is not None:
        raise ValueError("--max-steps and --epochs: pass one of them")
    counts = ("batch_size", "micro_batch_size", "max_steps", "sync_every", "lora_rank")
    finite = ("learning_rate", "epochs", "temperature")
    for names, fits, words in (
        (counts, lambda number: number >= 1, "at least 1"),
        (finite, lambda number: 0 < number < math.inf, "a finite number above 0"),
        (("max_grad_norm", "max_weight"), lambda number: number > 0, "above 0"),
        (("warmup", "weight_decay"), lambda number: 0 <= number < math.inf, "0 or above"),
        (("ema_decay", "adam_beta1", "adam_beta2"), lambda number: 0 <= number < 1, "in [0, 1)"),
        (("max_length",), lambda number: number >= 2, "at least 2"),
    ):
        for name in names:
            number = getattr(settings, name)
            if number is not None and not fits(number):
                raise ValueError(f"{flag(name)} {number}: {words}")
    for cut in (*settings.cuts, *settings.quality_cuts):
        if not 0 <= cut < 100:
            raise ValueError(f"cut {cut}: a percentile from 0 to below 100; 90 keeps the top 10 %")
    check_known("scheduler", settings.scheduler, [scheduler.value for scheduler in SchedulerType])
    low, high = settings.step_clip
    if not 0 <= low <= high:
        raise ValueError(f"--step-clip {low} {high}: from 0 on, the smaller limit first")
