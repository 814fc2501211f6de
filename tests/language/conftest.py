"""Fixtures of the tests of language models."""

from __future__ import annotations

import gc

import pytest


@pytest.fixture(scope="module", autouse=True)
def younger_objects() -> None:
    """Leave what earlier modules keep out of the collections that each training runs in full."""
    gc.freeze()
