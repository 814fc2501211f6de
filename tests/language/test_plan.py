"""Updates have the same entries, however they are divided into micro-batches."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from iwsft.language.batches import EpochBatches
from iwsft.language.plan import UpdatePlan

SHAPES = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))


def _plan(entries: int, shape: tuple[int, int, int], *, process: int = 0, **own: int) -> UpdatePlan:
    batch, accumulation, processes = shape
    batches = EpochBatches(torch.full((entries,), 3), batch_size=batch, **own)
    return UpdatePlan(batches, accumulation=accumulation, processes=processes, process=process)


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
    whole = _plan(entries, (batch * accumulation * processes, 1, 1))
    assert plan.updates == whole.updates
    for number in range(2 * plan.updates):
        assert _counted(plan.update(number)) == _counted(whole.update(number))


@given(entries=st.integers(1, 60), shape=SHAPES)
def test_each_update_has_work_for_each_process(entries: int, shape: tuple[int, int, int]) -> None:
    plan = _plan(entries, shape)
    for number in range(plan.updates):
        batches = plan.update(number)
        assert len(batches) % plan.processes == 0
        assert _counted(batches)


@given(
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    processes=st.integers(1, 4),
    padded=st.booleans(),
)
def test_with_a_budget_of_tokens_all_epochs_are_alike(
    sizes: list[int], processes: int, padded: bool
) -> None:
    batches = EpochBatches(torch.tensor(sizes), token_budget=12, padded=padded)
    plan = UpdatePlan(batches, accumulation=2, processes=processes, epochs=3)
    for epoch in range(3):
        planned = plan.epoch(epoch)
        assert len(planned) == len(plan) * processes
        assert _counted(planned) == Counter(range(len(sizes)))
        for batch in planned:
            tokens = [sizes[entry] for entry in batch]
            assert (max(tokens, default=0) * len(tokens) if padded else sum(tokens)) <= 12


def test_more_epochs_than_planned_for() -> None:
    sizes = torch.tensor([9, 5, 4, 4, 3, 7, 6, 2, 8, 1])
    plan = UpdatePlan(EpochBatches(sizes, token_budget=12), accumulation=1, processes=1, epochs=1)
    with pytest.raises(ValueError, match=r"the plan is for \d+; plan for more epochs"):
        for epoch in range(200):
            plan.epoch(epoch)


def test_a_process_runs_its_share_of_the_given_epoch() -> None:
    plan = _plan(13, (2, 1, 3))
    shares = [_plan(13, (2, 1, 3), process=process) for process in range(3)]
    for epoch in (0, 2):
        for share in shares:
            share.set_epoch(epoch)
        dealt = [list(share) for share in shares]
        assert [len(each) for each in dealt] == [len(share) for share in shares] == [3, 3, 3]
        together = [batch for beside in zip(*dealt, strict=True) for batch in beside]
        assert together == plan.epoch(epoch)


def test_epochs_differ_and_depend_on_the_seed() -> None:
    assert _plan(30, (2, 1, 1)).epoch(0) != _plan(30, (2, 1, 1)).epoch(1)
    assert _plan(30, (2, 1, 1)).epoch(1) == _plan(30, (2, 1, 1)).epoch(1)
    assert _plan(30, (2, 1, 1)).epoch(1) != _plan(30, (2, 1, 1), seed=1).epoch(1)
