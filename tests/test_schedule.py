"""Learning rates in closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iwsft.training import Schedule


@given(warmup=st.integers(0, 60), more=st.integers(1, 100))
def test_warm_up_is_linear_from_0_and_the_rest_is_torchs_cosine(warmup: int, more: int) -> None:
    schedule = Schedule(steps=warmup + more, lr=3.0, warmup=warmup)
    assert [schedule.factor(i) * warmup for i in range(warmup)] == pytest.approx([*range(warmup)])
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=more)
    for i in range(more):
        assert schedule.factor(warmup + i) == pytest.approx(cosine.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        cosine.step()
    assert schedule.factor(warmup) == 1
    assert schedule.factor(warmup + more) == pytest.approx(0, abs=1e-12)


def test_a_constant_rate_stays() -> None:
    schedule = Schedule(steps=9, lr=1.0, warmup=2, decay="constant")
    assert [schedule.factor(step) for step in range(9)] == [0, 0.5, 1, 1, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 0},
        {"steps": 1e4},
        {"warmup": 0.1},
        {"lr": 0.0},
        {"lr": -1.0},
        {"lr": math.nan},
        {"warmup": -1},
        {"warmup": 25},
        {"decay": "linear"},
    ],
)
def test_a_schedule_that_makes_no_sense_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Schedule(**{"steps": 24, "lr": 0.01, "warmup": 5} | wrong)


@pytest.mark.parametrize("name", ["lr", "weight_decay", "clip_norm"])
def test_a_number_that_is_text_is_named(name: str) -> None:
    text: Any = {name: "1e-3"}
    with pytest.raises(TypeError, match=f"{name} must be a number"):
        Schedule(**{"steps": 24, "lr": 0.01} | text)


@given(steps=st.integers(1, 30), warmup=st.integers(0, 40), constant=st.booleans())
def test_a_schedule_reaches_its_learning_rate_or_is_refused(
    steps: int, warmup: int, constant: bool
) -> None:
    decay: Any = "constant" if constant else "cosine"
    try:
        schedule = Schedule(steps, 1.0, warmup, decay)
    except ValueError as error:
        assert "never reaches lr" in str(error)
        # A line from 0 that is 1 at update ``warmup``, of the updates 0 to steps - 1.
        assert all(step / warmup < 1 for step in range(steps))
    else:
        assert max(map(schedule.factor, range(steps))) == 1
