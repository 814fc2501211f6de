"""Packed and padded batches have the same tokens, sampled by multiplicity; resuming is exact."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictBase
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from iwsft import CausalLMPolicy
from iwsft.language.batches import EpochBatches, EpochSampler, TrajectoryDataset, collate
from iwsft.language.loss import token_loss
from iwsft.samplers import TrajectorySampler
from iwsft.trajectory import (
    ASSISTANT_MASK,
    ATTENTION_MASK,
    IMPORTANCE_WEIGHT,
    MULTIPLICITY,
    REF_LOG_PROB,
    TOKENS,
    TRAJ_IDS,
    pad,
)
from tests.language import tiny


def dataset(sizes: list[int], multiplicity: list[int] | None = None) -> TensorDict:
    """Trajectories of the given lengths whose every entry tells its trajectory and place."""
    size = torch.tensor(sizes)
    traj = torch.arange(len(sizes)).repeat_interleave(size)
    place = torch.cat([torch.arange(n) for n in sizes])
    data = TensorDict(
        {
            "tokens": {"full": 100 * traj + place + 1},
            "masks": {
                "all_attention_mask": torch.ones_like(traj, dtype=torch.bool),
                "all_assistant_mask": place > 0,
            },
            "collector": {"traj_ids": traj},
            "ref_log_prob": -(traj + place / 100).float(),
            "importance_weight": 1.0 + traj.float(),
            "score": traj.double(),
        },
        [len(traj)],
    )
    if multiplicity is not None:
        data.set(MULTIPLICITY, torch.tensor(multiplicity).repeat_interleave(size))
    return data


def content(batch: TensorDictBase) -> dict[int, dict[str, Any]]:
    """Each trajectory of a batch of either layout, by id, read off its masks."""
    on = batch.get(ATTENTION_MASK)
    out: dict[int, dict[str, Any]] = {}
    for traj_id in batch.get(TRAJ_IDS)[on].unique().tolist():
        own = on & (batch.get(TRAJ_IDS) == traj_id)
        out[traj_id] = {
            str(key): batch.get(key)[own].tolist()
            for key in (TOKENS, ASSISTANT_MASK, REF_LOG_PROB, IMPORTANCE_WEIGHT, MULTIPLICITY)
        }
    return out


SIZES = st.lists(st.integers(1, 20), min_size=1, max_size=8)


@settings(max_examples=80)
@given(sizes=SIZES, data=st.data(), multiple=st.integers(1, 16), pad=st.integers(0, 3000))
def test_padded_and_packed_hold_the_same(sizes, data, multiple, pad):
    trajectories = dataset(sizes)
    entries = TrajectoryDataset(trajectories)
    numbers = data.draw(st.lists(st.integers(0, len(sizes) - 1), min_size=1, max_size=10))
    examples = [entries[number] for number in numbers]
    packed = collate(examples, layout="packed")
    padded = collate(examples, pad_token_id=pad, multiple_of=multiple)

    counts = Counter(numbers)
    batched = content(packed)
    assert batched == content(padded)
    assert set(batched) == set(counts)
    for traj_id, own in batched.items():
        source = trajectories[trajectories.get(TRAJ_IDS) == traj_id]
        assert own[str(TOKENS)] == source.get(TOKENS).tolist()
        assert own[str(REF_LOG_PROB)] == source.get(REF_LOG_PROB).tolist()
        assert own[str(MULTIPLICITY)] == [counts[traj_id]] * sizes[traj_id]
    default = collate(examples)
    assert default.batch_size[1] % 8 == 0
    assert bool((default.get(TOKENS)[~default.get(ATTENTION_MASK)] == 0).all())
    longest = max(sizes[number] for number in numbers)
    assert packed.batch_size == (sum(sizes[i] for i in counts),)
    assert padded.batch_size[0] == len(counts)
    assert longest <= padded.batch_size[1] < longest + multiple
    assert padded.batch_size[1] % multiple == 0
    off = ~padded.get(ATTENTION_MASK)
    assert bool((padded.get(TOKENS)[off] == pad).all())
    assert not bool(padded.get(ASSISTANT_MASK)[off].any())
    # Right padding: the valid tokens of a row come first.
    assert bool((padded.get(ATTENTION_MASK).long().diff(dim=1) <= 0).all())
    assert bool((packed.get(TRAJ_IDS).diff() >= 0).all())


def test_padding_that_is_eos_does_not_hide_it():
    trajectories = dataset([3, 5])
    trajectories.set(TOKENS, torch.tensor([7, 8, 2, 5, 6, 7, 8, 2]))
    entries = TrajectoryDataset(trajectories)
    batch = collate([entries[0], entries[1]], pad_token_id=2, multiple_of=1)
    assert batch.get(ASSISTANT_MASK)[0].tolist() == [False, True, True, False, False]
    assert batch.get(TOKENS)[0].tolist() == [7, 8, 2, 2, 2]


def test_a_tokenizer_without_a_pad_token_pads_with_0():
    batch = EpochSampler(dataset([3, 5]), 2, pad_token_id=None, multiple_of=1).sample()
    assert batch.get(TOKENS)[0].tolist() == [1, 2, 3, 0, 0]


def test_what_tokenize_returns_has_the_trajectories():
    whole = SimpleNamespace(trajectories=dataset([3, 5]))
    with pytest.raises(TypeError, match="not a SimpleNamespace; pass its .trajectories"):
        EpochSampler(whole, 2)  # type: ignore[arg-type]


def test_examples_that_cannot_be_in_one_batch():
    entries = TrajectoryDataset(dataset([3, 4]))
    other = entries[1].clone()
    other.get(TRAJ_IDS).zero_()
    with pytest.raises(ValueError, match="two different examples have the id 0"):
        collate([entries[0], other])
    with pytest.raises(ValueError, match=r"one trajectory, not \[0, 1\]"):
        collate([dataset([3, 4])])
    with pytest.raises(ValueError, match="only some examples have ref_log_prob"):
        collate([entries[0], entries[1].exclude(REF_LOG_PROB)])
    with pytest.raises(ValueError, match="layout='ragged' must be one of"):
        collate([entries[0]], layout="ragged")  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="what iwsft.language.tokenize makes"):
        TrajectoryDataset(dataset([3]).exclude("masks"))
    with pytest.raises(ValueError, match="padded; use trajectory.pack"):
        TrajectoryDataset(pad(dataset([3, 2])))


def test_a_multiplicity_of_an_example_counts_with_its_repeats():
    data = dataset([3, 4], [3, 1])
    example = data[:3].exclude("score")
    batch = collate([example, example], layout="packed")
    assert batch.get(MULTIPLICITY).tolist() == [6, 6, 6]


def test_entries_follow_multiplicity_and_contain_what_is_written_later():
    data = dataset([3, 4, 2], [2, 0, 3])
    entries = TrajectoryDataset(data)
    assert [int(entries[k].get(TRAJ_IDS)[0]) for k in range(len(entries))] == [0, 0, 2, 2, 2]
    assert entries.sizes.tolist() == [3, 3, 2, 2, 2]
    drawn = entries.drawn([4, 0, 3])
    assert drawn.get(TRAJ_IDS).tolist() == [0, 0, 0, 2, 2]
    assert drawn.get(MULTIPLICITY).tolist() == [1, 1, 1, 2, 2]
    data.set(IMPORTANCE_WEIGHT, torch.full((9,), 5.0))
    assert entries[0].get(IMPORTANCE_WEIGHT).tolist() == [5.0] * 3
    handed_out = set(entries[0].keys(True, True))
    assert not handed_out & {MULTIPLICITY, "score"}


@pytest.mark.parametrize("settings", [{"batch_size": 4}, {"token_budget": 30}])
@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_an_epoch_holds_each_trajectory_as_often_as_it_counts(settings, layout):
    multiplicity = [1, 2, 3, 1, 0, 2, 1]
    data = dataset([5, 7, 3, 9, 4, 6, 8], multiplicity)
    sampler = EpochSampler(data, **settings, layout=layout, multiple_of=2, seed=3)
    for epoch in range(3):
        occurrences: Counter[int] = Counter()
        assert sampler.epoch == epoch
        for _ in range(len(sampler.batches)):
            batch = sampler.sample()
            for traj_id, own in content(batch).items():
                occurrences[traj_id] += own[str(MULTIPLICITY)][0]
            if "token_budget" in settings:
                assert batch.batch_size.numel() <= 30
        assert [occurrences[i] for i in range(7)] == multiplicity


def test_epochs_differ_seeds_differ_and_the_same_seed_is_the_same():
    sizes = torch.full((50,), 3)

    def order(seed: int, epoch: int) -> list[list[int]]:
        batches = EpochBatches(sizes, batch_size=8, seed=seed)
        batches.set_epoch(epoch)
        return list(batches)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1) != order(1, 0)
    assert len({str(order(0, epoch)) for epoch in range(100)}) == 100
    both = EpochBatches(sizes, batch_size=8)
    assert [list(both), list(both)] == [order(0, 0), order(0, 1)]
    assert [len(batch) for batch in order(0, 0)] == [8] * 6 + [2]


def test_token_budgets_are_filled():
    sizes = torch.randint(1, 10, (400,), generator=torch.Generator().manual_seed(0))
    batches = list(EpochBatches(sizes, token_budget=40))
    tokens = [int(sizes[batch].sum()) for batch in batches]
    assert max(tokens) <= 40
    # A batch is closed only by an entry that did not fit any more.
    for batch, following in zip(batches, batches[1:], strict=False):
        assert sizes[batch].sum() + sizes[following[0]] > 40
    padded = list(EpochBatches(sizes, token_budget=40, padded=True, multiple_of=4))
    rounded = -(-sizes // 4) * 4
    assert max(int(rounded[batch].max()) * len(batch) for batch in padded) <= 40
    assert sorted(sum(padded, [])) == list(range(400))


@pytest.mark.parametrize("stop", [0, 3, 5, 11])
def test_a_resumed_sampler_gives_the_remaining_batches(stop):
    data = dataset([5, 7, 3, 9, 4, 6, 8], [1, 2, 3, 1, 1, 2, 1])

    def sampler() -> EpochSampler:
        return EpochSampler(data, token_budget=24, layout="packed", seed=1)

    whole = sampler()
    expected = [content(whole.sample()) for _ in range(16)]
    first = sampler()
    for _ in range(stop):
        first.sample()
    second = sampler()
    second.sample()
    second.load_state_dict(first.state_dict())
    assert [content(second.sample()) for _ in range(16 - stop)] == expected[stop:]
    other = EpochSampler(data, token_budget=26, layout="packed", seed=1)
    with pytest.raises(ValueError, match="token_budget=24, not 26"):
        other.load_state_dict(first.state_dict())
    data[TOKENS] = data[TOKENS].flip(0)
    with pytest.raises(ValueError, match="this state is of a sampler with data="):
        sampler().load_state_dict(first.state_dict())


def test_settings_of_batches():
    sizes = torch.tensor([3, 9])
    for wrong in ({}, {"batch_size": 1, "token_budget": 9}):
        with pytest.raises(ValueError, match="one of them"):
            EpochBatches(sizes, **wrong)
    with pytest.raises(ValueError, match="batch_size=0 or .* must be at least 1"):
        EpochBatches(sizes, batch_size=0)
    with pytest.raises(ValueError, match="entry 1 has 9 tokens, more than token_budget=8"):
        EpochBatches(sizes, token_budget=8)
    with pytest.raises(ValueError, match="entry 1 has 9 tokens, more than token_budget=10"):
        EpochBatches(sizes, token_budget=10, padded=True, multiple_of=4)
    with pytest.raises(ValueError, match="not a single entry"):
        EpochBatches(sizes[:0], batch_size=1)
    # The longest entry may fill the budget.
    assert sorted(EpochBatches(sizes, token_budget=9, padded=True)) == [[0], [1]]


@pytest.mark.parametrize("workers", [0, 1])
def test_a_data_loader_hands_out_the_same_batches(forkserver, workers):
    data = dataset([5, 7, 3, 9, 4, 6, 8])
    entries = TrajectoryDataset(data)
    make = partial(collate, layout="packed")
    batches = EpochBatches(entries.sizes, batch_size=3, seed=2)
    loader = DataLoader(
        entries,
        batch_sampler=batches,
        collate_fn=make,
        num_workers=workers,
        multiprocessing_context=forkserver if workers else None,
    )
    own = EpochSampler(data, 3, layout="packed", seed=2)
    assert [content(batch) for batch in loader] == [content(own.sample()) for _ in range(3)]


def test_sampling_with_replacement_is_that_of_the_trajectory_sampler():
    data = dataset([5, 7, 3], [1, 2, 1]).exclude("score")
    batch = TrajectorySampler(data, 10, seed=0).sample()
    starts = batch.get(TRAJ_IDS).diff(prepend=torch.tensor([-1])) > 0
    assert int(batch.get(MULTIPLICITY)[starts].sum()) == 10
    assert EpochSampler(data, 4).sample().batch_size == (3, 8)
    again = collate([TrajectoryDataset(data)[0]] * 2, layout="packed")
    assert set(again.keys(True, True)) == set(batch.keys(True, True))


@pytest.mark.parametrize("sizes", [[3], [3, 4]])
def test_a_batch_without_entries_is_a_trajectory_that_does_not_count(sizes):
    entries = TrajectoryDataset(dataset(sizes))
    make = partial(collate, layout="packed")
    loader = DataLoader(entries, batch_sampler=[[*range(len(sizes))], []], collate_fn=make)
    multiplicity = [batch.get(MULTIPLICITY).tolist() for batch in loader]
    assert multiplicity == [[1] * sum(sizes), [0] * 3]


def test_first_tokens_are_taken_out_of_the_assistant_mask() -> None:
    data, all_on = dataset([3, 1, 4]), dataset([3, 1, 4])
    all_on.set(ASSISTANT_MASK, torch.ones(8, dtype=torch.bool))
    for trajectories in (data, all_on):
        masks = [TrajectoryDataset(trajectories)[k].get(ASSISTANT_MASK).tolist() for k in range(3)]
        assert masks == [[False, True, True], [False], [False, True, True, True]]


def test_a_trainer_of_ones_own_reads_the_batches(tmp_path: Path) -> None:
    """As the docstring of ``collate`` says; the truth is transformers' own likelihood."""
    model, data = tiny.model(), tiny.trajectories()
    loss = token_loss(CausalLMPolicy(model), proposal="reference")

    class Own(Trainer):
        def _prepare_inputs(self, inputs: Any) -> Any:
            return inputs.to(self.args.device)

        def compute_loss(self, model: Any, inputs: Any, *args: Any, **settings: Any) -> Any:
            return loss(inputs)["loss_iw_mle"]

    settings = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "save_strategy": "no"}
    args = TrainingArguments(
        str(tmp_path), max_steps=1, per_device_train_batch_size=tiny.ENTRIES, **settings
    )
    expected = []
    for number in range(tiny.ENTRIES):
        own = data[data[TRAJ_IDS] == number]
        labels = own[TOKENS].masked_fill(~own[ASSISTANT_MASK], -100)
        with torch.no_grad():
            expected.append(float(model(own[TOKENS][None], labels=labels[None]).loss))
    run = Own(model, args, train_dataset=TrajectoryDataset(data), data_collator=collate)
    assert run.train().training_loss == pytest.approx(sum(expected) / tiny.ENTRIES, rel=1e-5)
