"""Samples of transitions: their entries, and their frequency."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from iwsft.samplers import TRANSITION, StepSampler, TrajectorySampler, TransitionSampler
from iwsft.trajectory import MASK, MULTIPLICITY, TRAJ_IDS, pad

SIZES = torch.tensor([3, 1, 6, 2])
N = int(SIZES.sum())


def dataset() -> TensorDict:
    step = torch.arange(N, dtype=torch.float32)[:, None]
    flag = torch.zeros(N, 1, dtype=torch.bool)
    data = TensorDict(
        {
            "observation": step,
            "action": -step,
            "other": step,
            "next": {"observation": step + 0.5, "reward": 2 * step, "done": flag},
        },
        [N],
    )
    data["next", "terminated"] = flag.clone()
    data[TRAJ_IDS] = torch.arange(4).repeat_interleave(SIZES)
    return data


def counts(data: TensorDict, draws: int = 300) -> torch.Tensor:
    sampler = TransitionSampler(data, 100, seed=3)
    seen = torch.cat([sampler.sample()["observation"] for _ in range(draws)])
    return torch.bincount(seen.flatten().long(), minlength=N)


def test_all_parts_of_a_transition_belong_together() -> None:
    batch = TransitionSampler(dataset(), 64, seed=0).sample()
    assert batch.batch_size == (64,)
    assert set(batch.keys(True, True)) == set(TRANSITION)
    step = batch["observation"]
    assert torch.equal(batch["action"], -step)
    assert torch.equal(batch["next", "observation"], step + 0.5)
    assert torch.equal(batch["next", "reward"], 2 * step)
    after = TransitionSampler(dataset(), 64, seed=0, keys=["next"]).sample()
    assert torch.equal(after["next", "reward"], batch["next", "reward"])


@pytest.mark.parametrize("multiplicity", [None, [1, 2, 0, 1], [2, 2, 0, 2], [2, 2, 2, 2]])
@pytest.mark.parametrize("masked", [[], [0, 4]])
def test_steps_are_drawn_by_the_multiplicity_of_their_trajectory(
    multiplicity: list[int] | None, masked: list[int]
) -> None:
    data = dataset()
    chance = torch.ones(N, dtype=torch.float64)
    if multiplicity is not None:
        each = torch.tensor(multiplicity).repeat_interleave(SIZES)
        data[MULTIPLICITY] = each
        chance *= each
    if masked:
        mask = torch.ones(N, dtype=torch.bool)
        mask[masked] = False
        data[MASK] = mask
        chance *= mask
    seen = counts(data).double()
    wanted = seen.sum() * chance / chance.sum()
    assert torch.equal(seen[chance == 0], torch.zeros(int((chance == 0).sum())).double())
    # Five standard deviations of a count.
    assert ((seen - wanted).abs() <= 5 * wanted.sqrt()).all()


def test_the_state_continues_with_the_same_samples() -> None:
    first = TransitionSampler(dataset(), 8, seed=5)
    first.sample()
    second = TransitionSampler(dataset(), 8, seed=6)
    second.load_state_dict(first.state_dict())
    for _ in range(3):
        assert torch.equal(first.sample()["observation"], second.sample()["observation"])


@pytest.mark.parametrize("key", ["data_weight", "importance_weight"])
@pytest.mark.parametrize("kind", [TransitionSampler, StepSampler, TrajectorySampler])
def test_a_state_is_not_continued_with_other_weights(kind: type, key: str) -> None:
    """Weights that the first run had not count, too; a data weight of 1 is none."""
    plain, halves = kind(dataset(), 8), kind(dataset().set(key, torch.full((N,), 0.5)), 8)
    with pytest.raises(ValueError, match=f"this state is of a sampler with {key}"):
        kind(dataset().set(key, torch.full((N,), 0.25)), 8).load_state_dict(halves.state_dict())
    if key == "data_weight":
        for first, second in ((plain, halves), (halves, plain)):
            with pytest.raises(ValueError, match=f"this state is of a sampler with {key}"):
                second.load_state_dict(first.state_dict())
        kind(dataset().set(key, torch.ones(N)), 8).load_state_dict(plain.state_dict())


def test_missing_entries_are_named() -> None:
    with pytest.raises(KeyError, match="next.*reward.*is missing"):
        TransitionSampler(dataset().exclude(("next", "reward")), 8)
    with pytest.raises(ValueError, match="padded"):
        TransitionSampler(pad(dataset()), 8)
    data = dataset()
    data[MASK] = torch.zeros(N, dtype=torch.bool)
    with pytest.raises(ValueError, match="every step is masked"):
        TransitionSampler(data, 8)
