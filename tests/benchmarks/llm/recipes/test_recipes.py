"""The registry of recipes and their settings."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from benchmarks.llm.recipes import load_recipe
from benchmarks.llm.settings import Settings
from iwsft.trajectory import Segments


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'arithmetics'.*did you mean 'arithmetic'.*gsm8k, s1k"):
        load_recipe("arithmetics")


def test_the_registry_loads_no_transformers() -> None:
    code = "import sys, benchmarks.llm.recipes; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def weights(defaults: Settings, *, per_step: bool = False) -> list[float]:
    """Weights of two trajectories whose log-ratios are (0.1, 0.3) and (-0.2, 4.0)."""
    segments = Segments(torch.Size((4,)), torch.tensor([0, 0, 1, 1]), None, 2)
    ratio, count = torch.tensor([0.1, 0.3, -0.2, 4.0]), torch.full((4,), 0.5)
    chain = defaults.importance_weights(per_step=per_step)
    return chain(ratio, segments, count)[0].exp().tolist()


def test_the_chain_of_a_recipe_is_tempered_reduced_clipped_and_normalised_in_this_order() -> None:
    defaults = Settings(
        learning_rate=1e-3,
        batch_size=2,
        max_steps=1,
        temperature=2.0,
        reduce="sum",
        max_weight=5.0,
        self_normalize=True,
    )
    # exp(2 * 0.4) = 2.2255 and exp(2 * 3.8), clipped to 5, over their mean
    first, second = 2.2255409284924674, 5.0
    mean = (first + second) / 2
    expected = [first / mean, first / mean, second / mean, second / mean]
    assert weights(defaults) == pytest.approx(expected, rel=1e-5)


def test_the_presets_are_those_of_paper_and_authors() -> None:
    plain: dict[str, Any] = {"learning_rate": 1e-3, "batch_size": 2, "max_steps": 1}
    # 0.1 clip(x, 0.2, 1.8), summed: 0.02 + 0.03 and 0.02 + 0.18
    paper = [1.0512711, 1.0512711, 1.2214028, 1.2214028]
    assert weights(Settings(**plain, preset="paper_llm")) == pytest.approx(paper, rel=1e-5)
    # exp of the mean: 0.2 and 1.9
    authors = [1.2214028, 1.2214028, 6.6858944, 6.6858944]
    assert weights(Settings(**plain, preset="authors_llm")) == pytest.approx(authors, rel=1e-5)


def test_the_per_step_variant_clips_each_ratio() -> None:
    defaults = Settings(learning_rate=1e-3, batch_size=2, max_steps=1, step_clip=(0.9, 1.2))
    expected = [1.1051709, 1.2, 0.9, 1.2]
    assert weights(defaults, per_step=True) == pytest.approx(expected, rel=1e-5)
