"""Recipes of ``python -m benchmarks.llm``: model, data, settings and test of a language task.

    from benchmarks.llm.recipes import load_recipe

    recipe = load_recipe("arithmetic")
    prepared = recipe.prepare(Path("cache"), seed=0, model=None, data=None)

A new recipe is one module with a ``RECIPE``, and one line here.
"""

from __future__ import annotations

from importlib import import_module

from benchmarks.llm.recipes.recipe import Evaluation, Prepared, Recipe, Settings
from benchmarks.options import check_known

__all__ = ["RECIPES", "Evaluation", "Prepared", "Recipe", "Settings", "load_recipe"]

# Name -> the module that holds it as RECIPE; it is imported where it is used.
RECIPES = {
    "arithmetic": "benchmarks.llm.recipes.arithmetic.recipe",
    "gsm8k": "benchmarks.llm.recipes.gsm8k",
    "s1k": "benchmarks.llm.recipes.s1k",
}


def load_recipe(name: str) -> Recipe:
    """Import the recipe of a name.

    Raises:
        ValueError: If the name is not in ``RECIPES``.
    """
    check_known("recipe", name, list(RECIPES))
    recipe: Recipe = import_module(RECIPES[name]).RECIPE
    return recipe
