"""The two flat examples learn what they say, and stay short."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from examples import control, language

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("name", ["control", "language"])
def test_the_whole_method_stays_under_120_lines(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 120


def test_control_improves_on_the_reference() -> None:
    settings = control.Settings(reference_updates=60, updates=30, batch_size=16, episodes=3)
    returns = control.main(settings)
    assert returns["iw-sft-q"] > returns["reference"] > 0
    short = replace(settings, reference_updates=3, updates=3, episodes=1)
    assert control.main(short) == control.main(short)


def test_language_improves_on_the_base_model() -> None:
    shares = language.main(base_updates=120, updates=51, each=10)
    # Four in ten rows are wrong, so a base model that has learned them all answers 60 % correctly.
    assert 0.2 < shares["base"] < 0.7
    assert shares["iw-sft"] > shares["base"] + 0.2
