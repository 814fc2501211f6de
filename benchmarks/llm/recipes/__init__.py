"""Recipes of ``python -m benchmarks.llm``: model, data, settings and test of a language task.

    from benchmarks.llm.recipes import load_recipe

    recipe = load_recipe("arithmetic")
    prepared = recipe.prepare(Path("cache"), seed=0, model=None, data=None)

A new recipe is one module with a ``RECIPE``, and one line here.
"""

from __future__ import annotations

import difflib
from importlib import import_module

from benchmarks.llm.recipes.recipe import Defaults, Evaluation, Prepared, Recipe

__all__ = ["RECIPES", "Defaults", "Evaluation", "Prepared", "Recipe", "load_recipe"]

# name -> the module that holds it as RECIPE; imported where it is used
RECIPES = {
    "arithmetic": "benchmarks.llm.recipes.arithmetic.recipe",
    "gsm8k": "benchmarks.llm.recipes.gsm8k",
    "s1k": "benchmarks.llm.recipes.s1k",
}


def load_recipe(name: str) -> Recipe:
    """The recipe of a name in ``RECIPES``.

    Raises:
        ValueError: a name that is not there.
    """
    if name not in RECIPES:
        close = difflib.get_close_matches(name, RECIPES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise ValueError(f"unknown recipe {name!r}; {hint}There are {', '.join(RECIPES)}")
    found: Recipe = import_module(RECIPES[name]).RECIPE
    return found
