"""The algorithms and the command line of ``iwsft llm``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from benchmarks.device import check_device, chosen_device
from benchmarks.llm.recipes import RECIPES, Recipe, load_recipe
from benchmarks.llm.settings import METHOD_SETTINGS, Engine, Related, Saving, Settings, setting
from benchmarks.options import (
    TRACKERS,
    check_at_least,
    check_file,
    check_folder,
    check_known,
    check_once,
    check_seeds,
    check_used,
    config_words,
    defaults_of,
    flag,
    groups_of,
    option,
    parse_groups,
    peek,
    to_config,
)
from iwsft.extras import EXTRAS, require

if TYPE_CHECKING:
    from iwsft import ImportanceWeights
    from iwsft.objective import Proposal

# The model as it is, tested alone.
BASE = "base"


@dataclass(frozen=True)
class Algorithm:
    """One of the algorithms: what q is, which rows count, and what weighs them.

    ``proposal`` is what q is, see :class:`iwsft.language.config.ImportanceWeightedConfig`.
    ``quality`` trains on D_Q+, where better rows count several times, instead of D+. ``per_step``
    lets each token's ratio weigh its own loss, instead of the trajectory's. ``related`` is a preset
    of :class:`iwsft.ImportanceWeights` that has settings of its own. ``by_score`` weighs rows by
    exp(score / rwr_beta), which are data weights.
    """

    proposal: Proposal
    quality: bool = False
    by_score: bool = False
    per_step: bool = False
    related: str | None = None

    @property
    def weighted(self) -> bool:
        """Whether trajectories are weighed as wholes, by the settings of all such algorithms."""
        return self.proposal != "reference" and not self.per_step and self.related is None

    @property
    def signed(self) -> bool:
        """Whether it learns from wrong answers, too, by the sign of their data weights."""
        return self.related in ("topr", "asymre", "nft")

    @property
    def syncs_reference(self) -> bool:
        """Whether q is divided by the policy at the last sync."""
        return self.related == "psft"

    def importance_weights(self, settings: Settings) -> ImportanceWeights:
        """Build its chain of weights."""
        return settings.importance_weights(per_step=self.per_step, related=self.related)


ALGORITHMS = {
    "sft": Algorithm("reference"),
    "sft-q": Algorithm("reference", quality=True),
    "rwr": Algorithm("reference", by_score=True),
    "iw-sft": Algorithm("current"),
    "iw-sft-hard": Algorithm("cached"),
    "iw-sft-ema": Algorithm("lagged"),
    "iw-sft-q": Algorithm("current", quality=True),
    "iw-sft-step": Algorithm("current", per_step=True),
    **{
        name: Algorithm("current", related=name.replace("-", "_"))
        for name in (
            *("dft", "power", "chord-phi", "psft", "eaft", "asft", "minor-sft", "topr", "nft"),
        )
    },
    # Its weights are 1.
    "asymre": Algorithm("reference", related="asymre"),
}
NAMES = (BASE, *ALGORITHMS)


def choose_q(algorithm: Algorithm, settings: Settings, parts: int) -> tuple[Proposal, int | None]:
    """Choose what q is, and how many updates follow a hard sync.

    Weights that are compared with each other have to be known for the whole update. In several
    micro-batches (``parts``, of all processes) they are computed before it; q is still theta.
    """
    weights = algorithm.importance_weights(settings)
    if algorithm.proposal == "cached" or algorithm.syncs_reference:
        return algorithm.proposal, settings.sync_every
    if algorithm.proposal == "current" and parts > 1 and weights.compares:
        return "cached", 1
    return algorithm.proposal, None


_HELP = {"-h", "--help"}
# Options that are not settings, and change nothing in the base.
_OF_TRAINING = ("log_every", "save_every", "report_to")
# Settings that change the base, too, by its test.
_OF_TEST = ("max_length",)
# Schedules of transformers that need numbers of their own, or a score after each evaluation.
_OTHER_SCHEDULES = (
    *("reduce_lr_on_plateau", "greedy", "warmup_stable_decay"),
    *("cosine_with_min_lr", "cosine_warmup_with_min_lr"),
)


def _of_method(name: str) -> Callable[[Algorithm, Settings], bool]:
    """Whether a setting is that of an algorithm's related method."""
    return lambda algorithm, _: name.startswith(f"{algorithm.related}_")


# Setting -> which algorithms it changes something in, given all settings.
_USED: dict[str, Callable[[Algorithm, Settings], bool]] = {
    "cuts": lambda algorithm, _: not algorithm.quality and not algorithm.signed,
    "quality_cuts": lambda algorithm, _: algorithm.quality,
    "sync_every": lambda algorithm, _: algorithm.proposal == "cached" or algorithm.syncs_reference,
    "ema_decay": lambda algorithm, _: algorithm.proposal == "lagged",
    "q": lambda algorithm, _: algorithm.proposal == "cached",
    "preset": lambda algorithm, settings: algorithm.weighted and not settings.q,
    "reduce": lambda algorithm, settings: algorithm.weighted and settings.preset == "recipe",
    "step_clip": lambda algorithm, _: algorithm.per_step,
    "reference": lambda algorithm, _: algorithm.weighted or algorithm.per_step,
    **{name: _of_method(name) for name in METHOD_SETTINGS},
    "rwr_beta": lambda algorithm, _: algorithm.by_score,
    "baseline_margin": lambda algorithm, _: algorithm.related == "asymre",
    **dict.fromkeys(
        ("temperature", "max_weight", "self_normalize"),
        lambda algorithm, settings: (
            algorithm.weighted and settings.preset == "recipe" and not settings.q
        ),
    ),
}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """What to run: every algorithm with every seed, on the model and the rows of a recipe."""

    recipe: Annotated[
        str,
        option("NAME", help=f"Model, data, settings and test: one of {', '.join(RECIPES)}."),
    ] = "arithmetic"
    # Names are checked by us: tyro would not say which one is near.
    algo: Annotated[
        tuple[str, ...],
        setting("NAME [NAME ...]", help=f"One or several of {', '.join(NAMES)}."),
    ] = Recipe.algos
    seeds: Annotated[tuple[int, ...], setting("INT [INT ...]")] = Recipe.seeds
    """Seeds of samples, order of training and test; one run each, but base has one."""
    model: Annotated[str | None, setting("ID|DIR", "its own model; chat has none")] = None
    """Model to start from."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    data: Annotated[str | None, setting("ID|FILE", "its own rows; chat has none")] = None
    """Rows to train on: a file, a folder, or a dataset of the hub as NAME, NAME:SPLIT or
    NAME:SPLIT:CONFIG."""
    eval_data: Annotated[str | None, setting("ID|FILE", "a share of --data")] = None
    """Rows to test on."""
    eval_share: Annotated[float | None, setting("FLOAT", "its own share")] = None
    """Share of the prompts of --data to hold out and test on, instead of --eval-data."""


@dataclass(frozen=True, kw_only=True)
class Machine(Engine):
    """Where to run."""

    jobs: Annotated[int | None, option("INT", "one per core; one on a GPU or with --deepspeed")] = (
        None
    )
    """Runs at a time."""


@dataclass(frozen=True, kw_only=True)
class Output(Saving):
    """Where results go."""

    out: Path = Path("runs")
    """Folder of all runs: OUT/llm/RECIPE/ALGO/seed-K/."""


@dataclass(frozen=True, kw_only=True)
class Options(Experiment, Machine, Output):
    """Fine-tune and test a language model by several algorithms and seeds."""

    settings: Settings

    @property
    def own_device(self) -> str:
        """The device of a run that is one process, ``cpu`` or ``cuda``."""
        return chosen_device(self.device)


def parse(words: Sequence[str], command: str = "llm", description: str | None = None) -> Options:
    """Read and check a command line; other settings are those of the recipe and the preset."""
    values, settings, changed = parse_values(groups_of(Options), words, command, description)
    options = Options(**values, settings=settings)
    recipe = load_recipe(options.recipe)
    if recipe.compares and BASE not in options.algo:
        options = replace(options, algo=(BASE, *options.algo))
    check(options, changed)
    return options


def parse_values(
    groups: Sequence[type],
    words: Sequence[str],
    command: str,
    description: str | None,
    recipe: str | None = None,
) -> tuple[dict[str, Any], Settings, dict[str, Any]]:
    """Read a command line into the options of ``groups``, by name, and the settings of training.

    ``recipe`` has the defaults of the settings, by default the one that the command line names.
    The last value is the settings that differ from those, for :func:`check`.
    """
    every = [*groups, *groups_of(Settings)]
    configured = config_words(words, command, every, {})
    given = peek([*configured, *words], "recipe", "preset", "lora_rank")
    name = recipe or given["recipe"] or Experiment.recipe
    found = load_recipe(name)
    start = _start(found, given["preset"], given["lora_rank"])
    # The length of training is set in one of two ways; the one that is given replaces the other.
    blank = replace(start, max_steps=None, epochs=None)
    shown = blank if _HELP.isdisjoint(words) else start
    own = {"recipe": name, "algo": found.algos, "seeds": found.seeds} if recipe is None else {}
    defaults = {**defaults_of(every), **vars(shown), **own}
    values = parse_groups(every, command, description, words, defaults)
    settings = Settings(**{each.name: values.pop(each.name) for each in fields(Settings)})
    changed = _differences(settings, blank)
    if given["preset"] is not None:
        changed["preset"] = settings.preset
    if settings.max_steps is None and settings.epochs is None:
        settings = replace(settings, max_steps=start.max_steps, epochs=start.epochs)
    return values, settings, changed


def _start(recipe: Recipe, preset: str | None, lora_rank: Any) -> Settings:
    """The settings that a command line starts from."""
    start = recipe.presets.get(preset or "", recipe.defaults)
    if lora_rank not in (None, "None"):
        start = replace(start, learning_rate=10 * start.learning_rate)
    return start


def _differences(settings: Settings, others: Settings) -> dict[str, Any]:
    return {name: value for name, value in vars(settings).items() if value != vars(others)[name]}


def to_file(options: Options, algo: str, seed: int) -> dict[str, Any]:
    """The options of one run alone, which ``--config`` takes back."""
    settings, recipe = options.settings, load_recipe(options.recipe)
    content = to_config(options) | {"recipe": options.recipe, "algo": [algo], "seeds": [seed]}
    changed = _differences(settings, _start(recipe, settings.preset, settings.lora_rank))
    if algo == BASE:
        kept = {name: value for name, value in content.items() if name not in _OF_TRAINING}
        return kept | {name: value for name, value in changed.items() if name in _OF_TEST}
    if settings.preset != recipe.defaults.preset:
        changed["preset"] = settings.preset
    for name, value in changed.items():
        replaced = value is None and name in ("max_steps", "epochs")
        if not replaced and uses(name, ALGORITHMS[algo], settings):
            content[name] = list(value) if isinstance(value, tuple) else value
    return content


def uses(name: str, algorithm: Algorithm, settings: Settings) -> bool:
    """Whether a setting changes something in an algorithm."""
    return name not in _USED or _USED[name](algorithm, settings)


def recorded(settings: Settings, algorithm: Algorithm) -> dict[str, Any]:
    """Settings for ``config.json``, without those of related methods that change nothing."""
    names = [each.name for each in fields(Related)]
    unused = [
        name for name in names if not (getattr(settings, name) and uses(name, algorithm, settings))
    ]
    return {name: value for name, value in asdict(settings).items() if name not in unused}


def check(options: Options, changed: dict[str, Any]) -> None:
    """Check what can be wrong before anything is prepared; ``changed`` settings were given."""
    settings = options.settings
    _check_data(options, load_recipe(options.recipe))
    for name in options.algo:
        check_known("algorithm", name, NAMES)
    check_once(algo=options.algo)
    check_seeds(options.seeds)
    config = options.deepspeed
    if config is not None and len(config) > 1:
        raise ValueError(f"--deepspeed {' '.join(config)}: one config, or none to choose one")
    for name in ("jobs", "device"):
        check_used(name, getattr(options, name), config is None, "with --deepspeed")
    for name in _OF_TRAINING:
        value = getattr(options, name)
        changes = None if value == getattr(Options, name) else value
        check_used(name, changes, set(options.algo) != {BASE}, "in base")
    if options.device is not None:
        check_known("device", options.device, ("cpu", "cuda"))
    check_at_least(1, jobs=options.jobs, log_every=options.log_every, save_every=options.save_every)
    algorithms = [ALGORITHMS[name] for name in options.algo if name != BASE]
    for name, value in changed.items():
        preset = f" with preset {settings.preset!r}" if settings.preset != "recipe" else ""
        anywhere = any(uses(name, algorithm, settings) for algorithm in algorithms)
        anywhere |= name in _OF_TEST and BASE in options.algo
        check_used(name, value, anywhere, f"in the algorithms asked for{preset}")
    if settings.scheduler == "constant":
        check_used("warmup", changed.get("warmup"), False, "with --scheduler constant")
    elif settings.max_steps and (problem := describe_warmup(settings, settings.max_steps)):
        if changed.get("warmup") is not None:
            raise ValueError(problem)
        # A short try of a recipe works, with its own warm-up.
        warnings.warn(problem, stacklevel=2)
    _check_numbers(settings)
    _check_elsewhere(options, settings.scheduler)


def describe_warmup(settings: Settings, updates: int) -> str | None:
    """Why a run of so many updates never reaches its learning rate; None if it does."""
    warmup = settings.warmup
    # As transformers counts them; the first update of a warm-up has the learning rate 0.
    steps = warmup if warmup >= 1 else math.ceil(warmup * updates)
    if settings.scheduler == "constant" or steps < updates:
        return None
    few = "1 update never reaches" if updates == 1 else f"{updates} updates never reach"
    return f"a warm-up of {warmup:g}: {few} --learning-rate; pass a smaller --warmup, or 0 for none"


def own_warmup(options: Options) -> float:
    """The warm-up of a recipe and preset, where the command line sets none."""
    settings = options.settings
    return _start(load_recipe(options.recipe), settings.preset, settings.lora_rank).warmup


def _check_elsewhere(options: Options, scheduler: str) -> None:
    """Check what torch and transformers know; they take seconds to import."""
    if unknown := set(options.report_to) - set(TRACKERS):
        from transformers.integrations.integration_utils import (
            get_available_reporting_integrations,
        )

        known = sorted({*TRACKERS, *get_available_reporting_integrations()})
        for tracker in unknown:
            check_known("tracker", tracker, known)
    for tracker in set(options.report_to) & set(EXTRAS):
        require(tracker)
    if scheduler not in ("constant", "cosine", "linear"):
        from transformers import SchedulerType

        known = [each.value for each in SchedulerType if each.value not in _OTHER_SCHEDULES]
        check_known("scheduler", scheduler, known)
    check_device(options.device or "cpu")


def _check_data(options: Options, recipe: Recipe) -> None:
    for name in recipe.needs:
        if getattr(options, name) is None:
            raise ValueError(
                f"{flag(name)} is missing; the recipe {options.recipe} has none of its own"
            )
    if options.model is not None:
        check_folder(options.model)
    for source in filter(None, (options.data, options.eval_data)):
        check_file(source)
    for name in ("eval_data", "eval_share"):
        check_used(name, getattr(options, name), recipe.holds_out, f"in recipe {options.recipe}")
    share = options.eval_share
    if share is not None and options.eval_data is not None:
        raise ValueError("--eval-data and --eval-share: pass one of them")
    if share is not None and not 0 < share < 1:
        raise ValueError(f"--eval-share {share}: above 0 and below 1")
    if options.settings.lora_rank is not None:
        require("peft")


def _check_numbers(settings: Settings) -> None:
    if settings.max_steps is not None and settings.epochs is not None:
        raise ValueError("--max-steps and --epochs: pass one of them")
    counts = ("batch_size", "micro_batch_size", "max_steps", "sync_every", "lora_rank")
    finite = ("learning_rate", "epochs", "temperature", *METHOD_SETTINGS)
    for names, fits, words in (
        (counts, lambda number: number >= 1, "at least 1"),
        (finite, lambda number: 0 < number < math.inf, "a finite number above 0"),
        (("max_grad_norm", "max_weight"), lambda number: number > 0, "above 0"),
        (("warmup", "weight_decay"), lambda number: 0 <= number < math.inf, "0 or above"),
        (("ema_decay", "adam_beta1", "adam_beta2"), lambda number: 0 <= number < 1, "in [0, 1)"),
        (("max_length", "eaft_top_k"), lambda number: number >= 2, "at least 2"),
        (("nft_epsilon",), lambda number: number <= 1, "at most 1"),
    ):
        for name in names:
            number = getattr(settings, name)
            if number is not None and not fits(number):
                raise ValueError(f"{flag(name)} {number}: {words}")
    if settings.warmup > 1 and settings.warmup % 1:
        raise ValueError(f"--warmup {settings.warmup}: a whole number of updates, or below 1")
    for cut in (*settings.cuts, *settings.quality_cuts):
        if not 0 <= cut < 100:
            raise ValueError(f"cut {cut}: a percentile from 0 to below 100; 90 keeps the top 10 %")
    low, high = settings.step_clip
    if not 0 <= low <= high:
        raise ValueError(f"--step-clip {low} {high}: from 0 on, the smaller limit first")
