"""The recipe of the loop: all rows of a round are trained on, and a few of them are tested."""

from __future__ import annotations

from dataclasses import replace

from benchmarks.llm.recipes.chat import ChatRecipe

RECIPE = replace(ChatRecipe(), holds_out=False, compares=False, share=None, tested=64)
