"""The command line of ``python -m benchmarks.llm``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import tyro

from benchmarks.llm.algorithms import DEFAULT, NAMES
from benchmarks.llm.recipes.recipe import Defaults, Recipe

if TYPE_CHECKING:

    @dataclass(frozen=True)
    class Settings:
        """Settings in place of the recipe's; None leaves it."""

else:
    # The recipe's settings once more, none of them set; their help is that of Defaults.
    Settings = make_dataclass(
        "Settings",
        [
            (name, kind if type(None) in getattr(kind, "__args__", ()) else kind | None, None)
            for name, kind in get_type_hints(Defaults).items()
        ],
        frozen=True,
    )
    Settings.__doc__, Settings.__module__ = Defaults.__doc__, __name__


@dataclass(frozen=True)
class Arguments:
    """Fine-tune and test a language model by several algorithms and seeds."""

    recipe: Annotated[str, tyro.conf.arg(metavar="NAME")] = "arithmetic"
    """Model, data, settings and test: arithmetic, gsm8k or s1k."""
    # Names are checked by us: tyro would not say which one is near.
    algo: Annotated[
        tuple[str, ...],
        tyro.conf.arg(metavar="NAME [NAME ...]", help=f"One or several of {', '.join(NAMES)}."),
    ] = DEFAULT
    seeds: Annotated[tuple[int, ...] | None, tyro.conf.arg(metavar="INT [INT ...]")] = None
    """Of samples, order of training and test; a run each, base apart, which has one. By default
    0 1 2 for arithmetic, 0 for the others."""
    model: Annotated[str | None, tyro.conf.arg(metavar="ID|DIR")] = None
    """Start here, in place of the recipe's own model."""
    trust_remote_code: bool = False
    """Run code that comes with the model."""
    data: Annotated[str | None, tyro.conf.arg(metavar="ID|FILE")] = None
    """Rows in place of the recipe's own."""
    deepspeed: Annotated[
        tuple[str, ...] | None,
        tyro.conf.arg(
            metavar="[CONFIG]",
            help="Train under accelerate, one process a GPU, or 2 on the CPU: by a config of "
            "benchmarks/llm/configs, a YAML file of accelerate, a JSON file of DeepSpeed, or, "
            "without a word, by one that fits.",
        ),
    ] = None
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)
    """In place of the recipe's."""
    device: Annotated[str | None, tyro.conf.arg(metavar="cpu|cuda")] = None
    """Of a run that is one process; by default a GPU where there is one."""
    jobs: int | None = None
    """Runs at a time; by default one a core, or one on a GPU. With --deepspeed one."""
    log_every: int = 1
    """Updates between log lines."""
    save_every: int | None = None
    """Updates between checkpoints; by default a fifth of the run."""
    report_to: tuple[str, ...] = ()
    """Also log to these of transformers' trackers, such as wandb; metrics.jsonl and TensorBoard
    are always written."""
    out: Path = Path("runs")
    """Folder of all runs: OUT/llm/RECIPE/ALGO/seed-K/."""
    resume: bool = False
    """Continue runs that were cut off; finished ones are kept."""

    @property
    def seeds_or_default(self) -> tuple[int, ...]:
        """The seeds of the runs."""
        if self.seeds is not None:
            return self.seeds
        return (0, 1, 2) if self.recipe == "arithmetic" else (0,)


def asked(settings: Settings) -> dict[str, Any]:
    """What a command line sets, by name."""
    return {name: value for name, value in asdict(settings).items() if value is not None}


def settings_of(recipe: Recipe, said: Mapping[str, Any]) -> Defaults:
    """The recipe's settings, with what the command line says in their place.

    Raises:
        ValueError: settings that exclude each other.
    """
    said = dict(said)
    presets: Mapping[str, Defaults] = getattr(recipe, "presets", {})
    start = presets.get(said.get("preset", ""), recipe.defaults)
    if {"max_steps", "epochs"} <= said.keys():
        raise ValueError("--max-steps and --epochs: pass one of them")
    # One of them is set; the other gives way.
    if "max_steps" in said:
        said["epochs"] = None
    elif "epochs" in said:
        said["max_steps"] = None
    return replace(start, **said)


def flag(name: str) -> str:
    """The flag of a setting."""
    return f"--{name.replace('_', '-')}"
