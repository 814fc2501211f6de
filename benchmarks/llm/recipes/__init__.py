"""Recipes of ``iwsft llm``: model, data, settings and test of a language task.

A new recipe is one module with a ``RECIPE``, and one line here. The command line shows its
settings, so the module imports what takes long in the functions that use it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.llm.settings import Settings
from benchmarks.options import check_known

if TYPE_CHECKING:
    from iwsft.datasets.text.rows import Row

# Name -> the module that holds it as RECIPE; it is imported where it is used.
RECIPES = {
    "arithmetic": "benchmarks.llm.recipes.arithmetic.recipe",
    "chat": "benchmarks.llm.recipes.chat",
    "gsm8k": "benchmarks.llm.recipes.gsm8k",
    "s1k": "benchmarks.llm.recipes.s1k",
    "round": "benchmarks.llm.recipes.round",
}

# "score", "interval", "n", and further numbers by name.
Evaluation = Mapping[str, Any]


@dataclass(frozen=True)
class Sources:
    """Model and rows that a command line names; a recipe has its own for None.

    ``model`` is a hub id or a folder, ``data`` a file, a folder or a hub id. ``eval_data`` (as
    ``data``) or ``eval_share`` (of the prompts) say which rows are held out. ``trust_remote_code``
    runs code that comes with the model.
    """

    model: str | None = None
    data: str | None = None
    eval_data: str | None = None
    eval_share: float | None = None
    trust_remote_code: bool = False


OWN = Sources()


@dataclass(frozen=True)
class Prepared:
    """What a recipe trains: a model (a folder or hub id) and rows.

    ``score_name`` names the test's score in tables, ``notes`` are facts for the report, and
    ``held_out`` is what the test asks, where it comes with the rows. ``max_length`` is the most
    tokens of a row of the test, as of the training.
    """

    model: str
    rows: list[Row]
    score_name: str
    notes: Mapping[str, Any] = field(default_factory=dict)
    held_out: Sequence[Any] = ()
    max_length: int | None = None


@dataclass(frozen=True)
class Recipe(ABC):
    """A language task: where model and rows come from, how to train, how to test.

    Attributes:
        defaults: Settings of its runs, where the command line sets no others.
        presets: Settings by the preset of their weights, where a preset changes others too.
        seeds: Seeds of its runs, where the command line names none.
        algos: Algorithms of its runs, where the command line names none.
        needs: Options that it has no default for.
        holds_out: Whether it takes ``eval_data`` and ``eval_share``.
        compares: Whether the base is always tested too, so that a result shows the change.
    """

    defaults: Settings
    presets: Mapping[str, Settings] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    algos: tuple[str, ...] = (
        *("base", "sft", "sft-q", "iw-sft"),
        *("iw-sft-hard", "iw-sft-ema", "iw-sft-step"),
    )
    needs: tuple[str, ...] = ()
    holds_out: bool = False
    compares: bool = False

    @abstractmethod
    def prepare(self, folder: Path, sources: Sources = OWN, *, seed: int) -> Prepared:
        """Make or find model and rows in the cache ``folder``, the same ones for the same seed."""

    def tested_rows(self, prepared: Prepared) -> Sequence[Row]:
        """Return the rows that the test reads, cut to ``prepared.max_length`` tokens."""
        return ()

    @abstractmethod
    def evaluate(self, model: Any, tokenizer: Any, prepared: Prepared, *, seed: int) -> Evaluation:
        """Test a model, which is on its device; the same ``seed`` gives all models the same luck.

        Returns ``score`` in [0, 1], ``interval`` (its 95 % interval, both ends), ``n`` (what the
        score is a mean over), and further numbers by name.
        """


def load_recipe(name: str) -> Recipe:
    """Import the recipe of a name."""
    check_known("recipe", name, list(RECIPES))
    return import_module(RECIPES[name]).RECIPE
