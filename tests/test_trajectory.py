"""Layouts and sums along trajectories, against loops and exactly rounded sums."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tensordict import TensorDict

from iwsft.trajectory import (
    DONE,
    MASK,
    MULTIPLICITY,
    REF_LOG_PROB,
    REWARD,
    TRAJ_IDS,
    Segments,
    from_steps,
    lengths,
    on_host,
    pack,
    pad,
    per_trajectory,
    select,
    steps_of,
)
from iwsft.validation import validate

SIZES = st.lists(st.integers(1, 7), min_size=1, max_size=9)


def packed_of(sizes: list[int], first_id: int = 0, gap: int = 1) -> TensorDict:
    n = sum(sizes)
    ids = first_id + gap * torch.arange(len(sizes))
    ids = torch.repeat_interleave(ids, torch.tensor(sizes))
    generator = torch.Generator().manual_seed(n)
    return from_steps(
        {
            "observation": torch.randn(n, 3, generator=generator),
            "action": torch.rand(n, 2, generator=generator),
            REWARD: torch.randn(n, 1, generator=generator),
            DONE: (torch.cat([ids[1:], ids[-1:] + 1]) != ids)[:, None],
            REF_LOG_PROB: torch.randn(n, generator=generator),
            MULTIPLICITY: torch.ones(n, dtype=torch.int64),
        },
        ids,
    )


def assert_same(a: Any, b: Any) -> None:
    assert a.batch_size == b.batch_size
    assert set(a.keys(True, True)) == set(b.keys(True, True))
    for key in a.keys(True, True):
        assert a.get(key).dtype == b.get(key).dtype and torch.equal(a.get(key), b.get(key)), key


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("kind", ["cancelling", "tiny-after-huge", "log-probs"])
def test_sums_over_20000_steps_are_exact_to_float32(layout: str, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    n = 20_000
    x = torch.randn(n, generator=generator) * 3 - 20
    if kind == "cancelling":
        x[: n // 2] = 1e4 * torch.randn(n // 2, generator=generator)
        x[n // 2 :] = -x[: n // 2].flip(0) + 1e-3
    if kind == "tiny-after-huge":
        x = torch.full((n,), 1e-4)
        x[0], x[n // 2] = 1e7, -1e7
    both = torch.cat([x, x[:7]])
    ids = torch.repeat_interleave(torch.tensor([0, 1]), torch.tensor([n, 7]))
    batch = from_steps({"observation": both[:, None]}, ids)
    batch = batch if layout == "packed" else pad(batch)
    sums = Segments.of(batch).sum(batch["observation"].squeeze(-1))
    assert sums.dtype == torch.float32
    for ours, values in zip(sums[:2].tolist(), (x.tolist(), x[:7].tolist()), strict=True):
        truth = math.fsum(values)
        # Half a unit of float32, and what a float64 accumulation may lose.
        half_ulp = 2.0**-24 * abs(truth)
        lost = len(values) * 2.0**-53 * math.fsum(map(abs, values))
        assert abs(ours - truth) <= half_ulp + lost
    means = Segments.of(batch).mean(batch["observation"].squeeze(-1))
    assert float(means[0]) == pytest.approx(math.fsum(x.tolist()) / n, rel=1e-6, abs=1e-9)


@settings(max_examples=40)
@given(sizes=SIZES, extra=st.integers(0, 3), batch_dims=st.sampled_from([1, 2]))
def test_segments_agree_with_a_loop_in_both_layouts(
    sizes: list[int], extra: int, batch_dims: int
) -> None:
    # [B] with a mask [B, 1] reads as packed, where a trailing 1 is dropped.
    assume(batch_dims == 2 or max(sizes) + extra > 1)
    packed = packed_of(sizes, first_id=4, gap=3)
    x = packed[REF_LOG_PROB]
    rows = x.split(sizes)
    padded = pad(packed, max(sizes) + extra)
    padded_x = padded[REF_LOG_PROB].clone()
    padded_x[~padded[MASK]] = torch.nan
    padded.batch_size = padded.batch_size[:batch_dims]
    for batch, values in ((packed, x), (padded, padded_x)):
        segments = Segments.of(batch)
        k = len(sizes)
        occupied = segments.lengths > 0
        assert segments.lengths[occupied].tolist() == sizes
        assert int(occupied.sum()) == k
        torch.testing.assert_close(
            segments.sum(values)[occupied], torch.stack([r.double().sum() for r in rows]).float()
        )
        torch.testing.assert_close(
            segments.mean(values)[occupied], torch.stack([r.double().mean() for r in rows]).float()
        )
        assert bool((segments.sum(values)[~occupied] == 0).all())
        assert int(segments.valid.sum()) == sum(sizes)
        ranks = torch.arange(segments.slots, dtype=torch.float32)
        spread = segments.spread(ranks)
        assert spread.shape == values.shape
        expected = torch.repeat_interleave(ranks[occupied], torch.tensor(sizes))
        assert torch.equal(spread[segments.valid], expected)


def test_sums_keep_gradients_and_wide_dtypes() -> None:
    batch = packed_of([3, 2])
    x = batch[REF_LOG_PROB].double().requires_grad_()
    sums = Segments.of(batch).sum(x)
    assert sums.dtype == torch.float64
    (sums * torch.tensor([1.0, 10.0])).sum().backward()
    assert x.grad is not None and x.grad.tolist() == [1, 1, 1, 10, 10]
    assert Segments.of(batch).sum(batch[REF_LOG_PROB].bfloat16()).dtype == torch.float32


def test_a_padded_row_is_cut_where_its_id_changes() -> None:
    ids = torch.tensor([[5, 5, 2, 2], [2, 2, 2, 9]])
    batch = TensorDict({"x": torch.arange(8.0).view(2, 4), TRAJ_IDS: ids}, [2, 4])
    segments = Segments.of(batch)
    assert segments.lengths[:4].tolist() == [2, 2, 3, 1]
    assert segments.sum(batch["x"])[:4].tolist() == [1, 5, 15, 7]


def test_slots_that_are_empty_or_masked() -> None:
    batch = packed_of([3, 1, 2, 1])
    batch[MASK] = torch.tensor([True, False, True, False, True, True, False])
    segments = Segments.of(batch)
    for slots in ([1, 3], [1]):
        assert segments.without_valid_step.tolist() == slots
        means = segments.mean(torch.full((7,), 2.0))
        assert len(means) == 4
        # Where the number of trajectories can't be read, each step has a slot.
        (static,) = torch.vmap(lambda x, b=batch: Segments.of(b).mean(x))(torch.full((1, 7), 2.0))
        assert static.tolist() == [*means.tolist(), 0, 0, 0]
        batch[MASK][6] = True
        segments = Segments.of(batch)


def test_a_padded_batch_of_nested_entries_is_read_where_it_is() -> None:
    nested = {"next": {"reward": torch.zeros(2, 3, device="meta")}}
    segments = Segments.of(TensorDict(nested, [2, 3]))
    assert segments.index.device.type == "meta" and segments.index.shape == (6,)
    assert on_host(torch.zeros(1)) and not on_host(segments.index)
    rows = TensorDict({MASK: torch.ones(2, 3, 1, dtype=torch.bool)}, [2])
    assert Segments.of(rows).shape == (2, 3)


def test_a_masked_packed_batch_counts_valid_steps() -> None:
    batch = packed_of([3, 2])
    batch[MASK] = torch.tensor([True, False, True, True, True])
    segments = Segments.of(batch)
    assert segments.lengths[:2].tolist() == [2, 2]
    wide = Segments.of(batch, mask=batch[MASK].unsqueeze(-1))
    assert torch.equal(wide.lengths, segments.lengths)


@settings(max_examples=40)
@given(sizes=SIZES, extra=st.integers(0, 3), first_id=st.integers(0, 5), gap=st.integers(1, 3))
def test_pad_and_pack_are_inverse(sizes: list[int], extra: int, first_id: int, gap: int) -> None:
    packed = packed_of(sizes, first_id, gap)
    padded = pad(packed, max(sizes) + extra)
    assert padded.batch_size == (len(sizes), max(sizes) + extra)
    assert padded[MASK].sum(1).tolist() == sizes
    for key in padded.keys(True, True):
        if key not in (TRAJ_IDS, MASK):
            assert not padded.get(key)[~padded[MASK]].any(), key
    assert_same(pack(padded), packed)
    assert_same(pad(pack(padded), max(sizes) + extra), padded)


def test_pad_refuses_a_length_that_is_too_small() -> None:
    with pytest.raises(ValueError, match="5 steps, more than length=4"):
        pad(packed_of([2, 5]), 4)


def test_pack_renumbers_rows_that_would_melt() -> None:
    falling = TensorDict({TRAJ_IDS: torch.tensor([[1, 1], [3, 3], [2, 2]])}, [3, 2])
    assert pack(falling)[TRAJ_IDS].tolist() == [0, 0, 1, 1, 2, 2]
    padded = pad(packed_of([3, 2, 2]))
    for ids in ([7, 7, 7], [9, 4, 1]):
        padded[TRAJ_IDS] = torch.tensor(ids)[:, None].expand(3, 3).contiguous()
        packed = pack(padded)
        assert lengths(packed).tolist() == [3, 2, 2]
        validate(packed)
    without = pack(padded.exclude(TRAJ_IDS))
    assert without[TRAJ_IDS].tolist() == [0, 0, 0, 1, 1, 2, 2]


@settings(max_examples=40)
@given(sizes=SIZES, data=st.data())
def test_select_takes_whole_trajectories(sizes: list[int], data: st.DataObject) -> None:
    packed = packed_of(sizes)
    chosen = sorted(data.draw(st.sets(st.integers(0, len(sizes) - 1), min_size=1)))
    index = torch.tensor(chosen)
    assert lengths(packed).tolist() == sizes
    parts = packed.split(sizes)
    assert_same(select(packed, index), torch.cat([parts[j] for j in chosen]))
    # steps_of also repeats and reorders.
    drawn = torch.tensor(
        data.draw(st.lists(st.sampled_from(chosen), max_size=5)), dtype=torch.int64
    )
    starts = [sum(sizes[:j]) for j in range(len(sizes))]
    expected = [i for j in drawn.tolist() for i in range(starts[j], starts[j] + sizes[j])]
    assert steps_of(torch.tensor(sizes), drawn).tolist() == expected


@pytest.mark.parametrize(
    ("values", "first"),
    [
        ([1, math.nan, 2], 1),
        ([math.nan, 1, 2], 1),
        ([1, 1, math.nan], None),
        ([math.nan] * 3, None),
    ],
)
def test_one_nan_among_numbers_is_a_change(values: list[float], first: int | None) -> None:
    """Two trajectories, of two steps and of one."""
    packed = packed_of([2, 1]).set("score", torch.tensor(values)[:, None])
    if first is None:
        expected = torch.tensor([values[0], values[2]])
        torch.testing.assert_close(per_trajectory(packed, "score"), expected, equal_nan=True)
    else:
        with pytest.raises(ValueError, match=f"'score' changes .* first at step {first}"):
            per_trajectory(packed, "score")


def test_ids_and_numbers_may_be_columns() -> None:
    packed = packed_of([2, 3, 1], first_id=4, gap=3)
    columns = packed.clone().set(TRAJ_IDS, packed[TRAJ_IDS][:, None])
    assert_same(pad(columns), pad(packed))
    assert torch.equal(lengths(columns), lengths(packed))


def test_select_refuses_wrong_positions() -> None:
    packed = packed_of([2, 3, 1])
    for index in ([3], [-1], [0, 7], [1, 0], [1, 1]):
        with pytest.raises(ValueError, match="must increase and run from 0 to 2"):
            select(packed, torch.tensor(index))


def test_an_entry_that_is_the_same_on_all_steps_of_a_trajectory() -> None:
    packed = from_steps({"x": torch.tensor([1.0, 1.0, torch.nan, torch.nan])}, torch.arange(4) // 2)
    first = per_trajectory(packed, "x")
    assert first[0] == 1.0 and first[1].isnan() and len(first) == 2
    packed["x"] = torch.tensor([1.0, 1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="'x' changes within a trajectory, first at step 3"):
        per_trajectory(packed, "x")
    packed["wide"] = torch.zeros(4, 2)
    with pytest.raises(ValueError, match=r"'wide' has shape \[4, 2\]"):
        per_trajectory(packed, "wide")
