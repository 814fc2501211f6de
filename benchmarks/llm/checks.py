"""All that can be known to be wrong before anything is prepared or trained."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.llm.algorithms import ALGORITHMS, BASE, Algorithm, check_name
from benchmarks.llm.arguments import Arguments, asked, flag
from benchmarks.llm.recipes.recipe import Defaults

# Setting -> which algorithms it changes something in, given all settings.
_USED: dict[str, Callable[[Algorithm, Defaults], bool]] = {
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
_AT_LEAST_1 = ("batch_size", "micro_batch_size", "max_steps", "sync_every")
_ABOVE_0 = ("learning_rate", "epochs", "max_grad_norm", "temperature", "max_weight")


def check(arguments: Arguments, settings: Defaults) -> None:
    """Check what a command line asks for; takes no data.

    Args:
        arguments: of the command line.
        settings: the recipe's, with those of the command line in their place.

    Raises:
        ValueError: naming the setting, its value and the way out.
        FileNotFoundError: no such file.
    """
    seeds = arguments.seeds_or_default
    if not arguments.algo or not seeds:
        raise ValueError("nothing to run: pass at least one name to --algo and one to --seeds")
    for name in arguments.algo:
        check_name(name)
    _check_once("--algo", arguments.algo)
    _check_once("--seeds", seeds)
    for seed in seeds:
        if not 0 <= seed < 2**32:
            raise ValueError(f"--seeds {seed}: a seed lies in 0 ... 2^32 - 1")
    _check_processes(arguments)
    for name, number in (
        ("--jobs", arguments.jobs),
        ("--log-every", arguments.log_every),
        ("--save-every", arguments.save_every),
    ):
        if number is not None and number < 1:
            raise ValueError(f"{name} {number}: at least 1")
    said = asked(arguments.settings)
    _check_used(said, settings, [ALGORITHMS[name] for name in arguments.algo if name != BASE])
    _check_numbers(settings)


def _check_once(name: str, values: Sequence[object]) -> None:
    twice = sorted({str(value) for value in values if values.count(value) > 1})
    if twice:
        raise ValueError(f"{name} {' '.join(twice)}: asked for twice; name each once")


def _check_processes(arguments: Arguments) -> None:
    asked_for = arguments.deepspeed
    if asked_for is not None and len(asked_for) > 1:
        raise ValueError(f"--deepspeed {' '.join(asked_for)}: one config, or none to choose one")
    for name, value in (("--jobs", arguments.jobs), ("--device", arguments.device)):
        if asked_for is not None and value is not None:
            raise ValueError(
                f"{name} {value} with --deepspeed, which decides itself on what runs where; leave "
                "one of them out"
            )
    if arguments.device is not None:
        import torch

        if arguments.device not in ("cpu", "cuda"):
            raise ValueError(f"--device {arguments.device}: cpu or cuda")
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device cuda: torch sees no GPU; cpu can")


def _check_used(said: dict[str, Any], settings: Defaults, algorithms: list[Algorithm]) -> None:
    for name, value in said.items():
        used = _USED.get(name, lambda algorithm, settings: True)
        if not any(used(algorithm, settings) for algorithm in algorithms):
            preset = f" with preset {settings.preset!r}" if settings.preset != "recipe" else ""
            raise ValueError(
                f"{flag(name)} {value} changes nothing in the algorithms asked for{preset}; leave "
                "it out"
            )


def _check_numbers(settings: Defaults) -> None:
    for names, fits, words in (
        (_AT_LEAST_1, lambda number: number >= 1, "at least 1"),
        (_ABOVE_0, lambda number: number > 0, "above 0"),
        (("warmup", "weight_decay"), lambda number: number >= 0, "0 or above"),
        (("ema_decay",), lambda number: 0 <= number < 1, "a decay lies in [0, 1)"),
        (("max_length",), lambda number: number >= 2, "at least 2"),
    ):
        for name in names:
            number = getattr(settings, name)
            if number is not None and not fits(number):
                raise ValueError(f"{flag(name)} {number}: {words}")
    for cut in (*settings.cuts, *settings.quality_cuts):
        if not 0 <= cut < 100:
            raise ValueError(f"cut {cut}: a percentile from 0 to below 100; 90 keeps the top 10 %")
    from transformers import SchedulerType

    known = [each.value for each in SchedulerType]
    if settings.scheduler not in known:
        raise ValueError(f"--scheduler {settings.scheduler}: one of {', '.join(known)}")
    for per_step in (False, True):
        settings.importance_weights(per_step=per_step)
