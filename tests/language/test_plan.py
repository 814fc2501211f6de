"""Updates have the same entries, however they are divided into micro-batches."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iwsft.language import ImportanceWeightedConfig
from iwsft.language.batches import EpochBatches
from iwsft.language.plan import UpdatePlan, plan_updates

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


def _plan(entries: int, shape: tuple[int, int, int], *, process: int = 0, **own: int) -> UpdatePlan:
    batch, accumulation, processes = shape
    batches = EpochBatches(torch.full((entries,), 3), batch_size=batch, **own)
    return UpdatePlan(batches, accumulation, processes=processes, process=process, epochs=1)


def _counted(batches: list[list[int]]) -> Counter[int]:
    return Counter(entry for batch in batches for entry in batch)


@given(entries=st.integers(1, 60), shape=SHAPES, epoch=st.integers(0, 3))
def test_an_epoch_holds_each_entry_once_and_all_processes_run_alike(
    entries: int, shape: tuple[int, int, int], epoch: int
) -> None:
    plan = _plan(entries, shape)
    batches = plan.epoch(epoch)
    assert _counted(batches) == Counter(range(entries))
    assert len(batches) == len(plan) * plan.processes
    assert all(len(batch) <= shape[0] for batch in batches)
    # Only where no batch of the update can be split does a process have none.
    last = plan.update((epoch + 1) * plan.updates - 1)
    assert [] not in batches or max(map(len, last)) == 1


@given(entries=st.integers(1, 60), shape=SHAPES)
def test_an_update_is_that_of_one_process_with_large_batches(
    entries: int, shape: tuple[int, int, int]
) -> None:
    batch, accumulation, processes = shape
    plan = _plan(entries, shape)
    sizes = torch.full((entries,), 3)
    whole = EpochBatches(sizes, batch_size=batch * accumulation * processes)
    assert plan.updates == len(whole)
    for number, update in enumerate([*whole.of(0), *whole.of(1)]):
        assert _counted(plan.update(number)) == Counter(update)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    processes=st.integers(1, 4),
    padded=st.booleans(),
)
def test_with_a_budget_of_tokens_all_epochs_are_alike(
    sizes: list[int], processes: int, padded: bool
) -> None:
    batches = EpochBatches(torch.tensor(sizes), token_budget=12, padded=padded)
    plan = UpdatePlan(batches, accumulation=2, processes=processes, process=0, epochs=3)
    for epoch in range(3):
        planned = plan.epoch(epoch)
        assert len(planned) == len(plan) * processes
        assert _counted(planned) == Counter(range(len(sizes)))
        assert [] not in planned or max(map(len, planned)) == 1
        for batch in planned:
            tokens = [sizes[entry] for entry in batch]
            assert (max(tokens, default=0) * len(tokens) if padded else sum(tokens)) <= 12


def test_a_process_runs_its_share_of_the_given_epoch() -> None:
    plan = _plan(13, (2, 1, 3))
    shares = [_plan(13, (2, 1, 3), process=process) for process in range(3)]
    for epoch in (0, 2):
        if epoch:
            for share in shares:
                share.set_epoch(epoch)
        dealt = [list(share) for share in shares]
        assert [len(each) for each in dealt] == [len(share) for share in shares] == [3, 3, 3]
        together = [batch for beside in zip(*dealt, strict=True) for batch in beside]
        assert together == plan.epoch(epoch)
        # An epoch is put together once, not for each of its updates.
        assert plan.epoch(epoch) is plan.epoch(epoch)


def test_epochs_differ_and_depend_on_the_seed() -> None:
    assert _plan(30, (2, 1, 1)).epoch(0) != _plan(30, (2, 1, 1)).epoch(1)
    assert _plan(30, (2, 1, 1)).epoch(1) == _plan(30, (2, 1, 1)).epoch(1)
    assert _plan(30, (2, 1, 1)).epoch(1) != _plan(30, (2, 1, 1), seed=1).epoch(1)


SIZES = torch.tensor([9, 5, 4, 4, 3, 7, 6, 2, 8, 1, 5, 5, 2, 11, 3, 6, 1, 1, 2, 2, 3, 4, 5, 6, 7])


def _planned(folder: Path, processes: int = 2, **own: Any) -> UpdatePlan:
    settings = {"report_to": [], "use_cpu": True, **own}
    args = ImportanceWeightedConfig(output_dir=str(folder), **settings)
    return plan_updates(SIZES, args, processes=processes, process=0)


@pytest.mark.parametrize(
    ("own", "batches"),
    [
        ({"per_device_train_batch_size": 3}, {"batch_size": 3, "seed": 42}),
        ({"per_device_train_batch_size": 3, "seed": 5}, {"batch_size": 3, "seed": 5}),
        (
            {"per_device_train_batch_size": 3, "seed": 5, "data_seed": 0},
            {"batch_size": 3, "seed": 0},
        ),
        (
            {"token_budget": 20, "layout": "packed"},
            {"token_budget": 20, "padded": False, "seed": 42},
        ),
        (
            {"token_budget": 24, "pad_to_multiple_of": 4},
            {"token_budget": 24, "padded": True, "multiple_of": 4, "seed": 42},
        ),
    ],
)
def test_the_plan_of_a_run_has_its_settings(
    tmp_path: Path, own: dict[str, Any], batches: dict[str, Any]
) -> None:
    plan = _planned(tmp_path, gradient_accumulation_steps=3, num_train_epochs=4, **own)
    entries = EpochBatches(SIZES, **({"padded": True, "multiple_of": 8} | batches))
    direct = UpdatePlan(entries, 3, processes=2, process=0, epochs=4)
    assert plan.settings() == direct.settings()
    for epoch in range(4):
        assert plan.epoch(epoch) == direct.epoch(epoch)


# With this seed and budget, epochs have 10, 11, 11, 12, 12, 13, 11 micro-batches.
@pytest.mark.parametrize(
    ("own", "epochs"),
    [
        ({"num_train_epochs": 0.5}, 1),
        ({"num_train_epochs": 1}, 1),
        ({"num_train_epochs": 1.5}, 2),
        ({"num_train_epochs": 6}, 6),
        # transformers' default is three epochs, and an update is one micro-batch.
        ({"max_steps": 33}, 3),
        ({"max_steps": 34}, 4),
        ({"max_steps": 70}, 6),
    ],
)
def test_a_run_is_planned_for_its_epochs_and_no_more(
    tmp_path: Path, own: dict[str, Any], epochs: int
) -> None:
    """With a budget of tokens, the epoch with most micro-batches says how long all are."""
    plan = _planned(tmp_path, processes=1, token_budget=12, layout="packed", data_seed=6, **own)
    entries = EpochBatches(SIZES, token_budget=12, seed=6)
    assert len(plan) == max(len(entries.of(epoch)) for epoch in range(epochs))
    for update in range(own.get("max_steps", plan.updates * epochs)):
        assert plan.update(update)
